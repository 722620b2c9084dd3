"""Check that normalisations are recognised: text, meaning, refusals, properties."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.dialects.onnx.facts import facts_of
from graphopt.passes import FuseNormalizations
from graphopt.testing import Trial, try_pass
from tests.onnx_models import calls, trial

HEAD = "(float[N,3,8] x) => (float[N,3,8] y)"
NUMBERS: dict[str, Any] = {
    "k": [-1],
    "two": np.float32(2),
    "one": np.float32(1),
    "half": np.float32(-0.5),
    "eps": np.float32(2**-16),
}
SQUARES = {"power": "s = Pow({t}, two)", "product": "s = Mul({t}, {t})"}
ROOTS = {
    "quotient": "r = Sqrt(v) n = Div({t}, r)",
    "reciprocal": "r = Sqrt(v) i = Reciprocal(r) n = Mul({t}, i)",
    "one over it": "r = Sqrt(v) i = Div(one, r) n = Mul(i, {t})",
    "negative power": "i = Pow(v, half) n = Mul({t}, i)",
}


def spelled(square: str, root: str, value: str) -> str:
    """Return the root-mean-square normalisation of a value, ``n``."""
    return f"{SQUARES[square]} q = ReduceMean<keepdims = 1>(s, k) v = Add(q, eps) {ROOTS[root]}".format(t=value)


CENTRED = "m = ReduceMean<keepdims = 1>(a, k) d = Sub(a, m) "


def inside(body: str, opset: int = 20, raise_opset: bool = False, head: str = HEAD, **constants: Any) -> Trial:
    """Run the pass on what turns ``a`` into ``b``, between two products."""
    weights = {"first": (8, 8), "last": (8, 8), **NUMBERS, **constants}
    used = {"first", "last", *re.findall(r"\w+", body)}
    weights = {name: value for name, value in weights.items() if name in used}
    text = f"a = MatMul(x, first) {body} y = MatMul(b, last)"
    return trial(FuseNormalizations(raise_opset), head, text, weights, opset=opset)


def sound(done: Trial) -> None:
    assert done.difference() < 1e-9
    assert done.notices_damage()
    assert done.again().unchanged


def test_text() -> None:
    done = trial(
        FuseNormalizations(),
        HEAD,
        f"a = MatMul(x, first) {CENTRED} {spelled('power', 'quotient', 'd')} o = Mul(n, gain) b = Add(shift, o) "
        "t = MatMul(b, last) u = Mul(t, t) c = ReduceMean<keepdims = 1>(u, j) e = Add(c, eps) f = Sqrt(e) "
        "y = Div(t, f)",
        {"first": (8, 8), "last": (8, 8), "gain": (8,), "shift": (1, 8), "j": [1]}
        | {name: NUMBERS[name] for name in ("k", "two", "eps")},
    )
    assert done.text().splitlines() == TEXT
    assert [(site.name, site.reason) for site in done.applied] == [("Div_0", "9 calls make LayerNormalization")]
    assert [(site.name, site.reason) for site in done.skipped] == [
        ("Div_1", "the mean is over dimensions 1 of 3, which are not the last ones")
    ]
    sound(done)


TEXT = [
    "-%two: float32[] = @two",
    "-%shift: float32[1, 8] = @shift",
    "-%ReduceMean_0: float32[2?, 3, 1] = onnx.ReduceMean(%MatMul_0, [-1], keepdims=1)",
    "-%Sub_0: float32[2?, 3, 8] = onnx.Sub(%MatMul_0, %ReduceMean_0)",
    "-%Pow_0: float32[2?, 3, 8] = onnx.Pow(%Sub_0, %two)",
    "-%ReduceMean_1: float32[2?, 3, 1] = onnx.ReduceMean(%Pow_0, [-1], keepdims=1)",
    "-%Add_0: float32[2?, 3, 1] = onnx.Add(%ReduceMean_1, %eps)",
    "-%Sqrt_0: float32[2?, 3, 1] = onnx.Sqrt(%Add_0)",
    "-%Div_0: float32[2?, 3, 8] = onnx.Div(%Sub_0, %Sqrt_0)",
    "-%Mul_0: float32[2?, 3, 8] = onnx.Mul(%Div_0, %gain)",
    "-%Add_1: float32[2?, 3, 8] = onnx.Add(%shift, %Mul_0)",
    "-%MatMul_1: float32[2?, 3, 8] = onnx.MatMul(%Add_1, %last)",
    "+%shift_flat: float32[8] = @shift_flat",
    "+%layer_normalization: float32[2?, 3, 8] = "
    "onnx.LayerNormalization(%MatMul_0, %gain, %shift_flat, axis=-1, epsilon=1.52587890625e-05)",
    "+%MatMul_1: float32[2?, 3, 8] = onnx.MatMul(%layer_normalization, %last)",
]


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("root", ROOTS)
def test_layer_normalisation(square: str, root: str) -> None:
    done = inside(f"{CENTRED} {spelled(square, root, 'd')} o = Mul(gain, n) b = Add(o, shift)", gain=(8,), shift=(8,))
    assert calls(done.after) == ["MatMul", "LayerNormalization", "MatMul"]
    sound(done)


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("root", ROOTS)
def test_root_mean_square_normalisation(square: str, root: str) -> None:
    done = inside(f"{spelled(square, root, 'a')} b = Mul(n, gain)", raise_opset=True, gain=(1, 1, 8))
    assert calls(done.after) == ["MatMul", "RMSNormalization", "MatMul"]
    assert facts_of(done.after).opset == 23
    sound(done)


def test_without_weights_they_are_one() -> None:
    done = inside(f"{CENTRED} {spelled('product', 'quotient', 'd')} b = Relu(n)")
    assert calls(done.after) == ["MatMul", "LayerNormalization", "Relu", "MatMul"]
    sound(done)


def test_a_weight_for_rows_is_not_the_normalisations() -> None:
    done = inside(f"{CENTRED} {spelled('product', 'quotient', 'd')} b = Mul(n, gain)", gain=(3, 8))
    assert calls(done.after) == ["MatMul", "LayerNormalization", "Mul", "MatMul"]
    sound(done)


def test_over_two_dimensions() -> None:
    done = inside(
        f"{CENTRED} {spelled('product', 'quotient', 'd')} o = Mul(n, gain) b = Add(o, shift)",
        k=[-1, 1],
        gain=(3, 8),
        shift=(1, 3, 8),
    )
    assert calls(done.after) == ["MatMul", "LayerNormalization", "MatMul"]
    sound(done)


def test_an_older_version_divides() -> None:
    done = inside(f"{spelled('power', 'reciprocal', 'a')} b = Mul(gain, n)", gain=(8,))
    assert calls(done.after) == ["MatMul", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "MatMul"]
    assert done.difference() < 1e-12
    assert done.notices_damage()
    again = done.again()
    assert again.unchanged
    assert [site.reason for site in again.skipped] == ["RMSNormalization is there from opset 23 on (raise_opset)"]


def test_an_inner_value_that_others_read_stays() -> None:
    done = inside(f"{CENTRED} {spelled('product', 'quotient', 'd')} b = Add(n, m)")
    assert done.unchanged
    assert [site.reason for site in done.skipped] == ["others read ReduceMean_0"]


def test_another_value_is_not_normalised() -> None:
    done = inside(f"{CENTRED} {spelled('product', 'quotient', 'a').replace('Div(a', 'Div(d')} b = Relu(n)")
    assert done.unchanged


def test_other_graphs_are_left_alone() -> None:
    assert try_pass(FuseNormalizations(), nn.Linear(2, 2), torch.randn(2, 2)).unchanged


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(SQUARES)), st.sampled_from(sorted(ROOTS)), st.booleans(), st.integers(0, 2)),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_preserves(norms: list[tuple[str, str, bool, int]], raise_opset: bool) -> None:
    parts = []
    for i, (square, root, centred, affine) in enumerate(norms):
        text = (CENTRED if centred else "") + spelled(square, root, "d" if centred else "a")
        text += (
            " o = Mul(n, gain) b = Add(o, shift)" if affine == 2 else " b = Mul(gain, n)" if affine else " b = Relu(n)"
        )
        text = re.sub(r"\b([amdsqvrinob])\b", rf"\g<1>{i}", text)
        parts.append(text + f" a{i + 1} = MatMul(b{i}, last)")
    done = trial(
        FuseNormalizations(raise_opset),
        HEAD,
        f"a0 = MatMul(x, first) {' '.join(parts)} y = Relu(a{len(norms)})",
        {"first": (8, 8), "last": (8, 8), "gain": (8,), "shift": (8,), **NUMBERS},
    )
    assert done.difference() < 1e-9
    assert done.again().unchanged
    assert len(calls(done.after)) <= len(calls(done.before))
