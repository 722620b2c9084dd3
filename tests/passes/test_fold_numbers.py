"""Check that products with numbers go into weights and tables: text, meaning, refusals, properties."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.passes import FoldNumbers
from graphopt.testing import Trial, try_pass
from tests.onnx_models import calls, trial

HEAD = "(float[N,3,8] x) => (float[N,3,8] y)"


def sound(done: Trial) -> None:
    assert done.difference() < 1e-6  # new tensors are rounded to single precision
    assert done.notices_damage(1e-3)
    assert done.again().unchanged


PACKED = (
    "p = MatMul(x, w) q = Add(bias, p) r = Reshape(q, s) t = Transpose<perm = [2, 0, 3, 1, 4]>(r) "
    "a = Gather<axis = 0>(t, zero) b = Gather<axis = 0>(t, one) v = Gather<axis = 0>(t, two) "
    "c = Mul(a, f) k = Transpose<perm = [0, 1, 3, 2]>(b) d = Mul(k, f) e = MatMul(c, d) g = Softmax(e) "
    "h = MatMul(g, v) i = Transpose<perm = [0, 2, 1, 3]>(h) j = Reshape(i, z) y = Mul(j, f)"
)


def test_text() -> None:
    done = trial(
        FoldNumbers(),
        HEAD,
        PACKED,
        {
            "w": (8, 24),
            "bias": (24,),
            "s": [-1, 3, 3, 2, 4],
            "z": [-1, 3, 8],
            "zero": np.int64(0),
            "one": np.int64(1),
            "two": np.int64(2),
            "f": np.array([0.7], np.float32),
        },
    )
    assert done.text().splitlines() == TEXT
    assert [(site.name, site.reason) for site in done.applied] == [
        ("Mul_0", "0.7 into bias, w"),
        ("Mul_1", "0.7 into bias, w"),
    ]
    assert [(site.name, site.reason) for site in done.skipped] == [("Mul_2", "MatMul_2 is a product of two values")]
    sound(done)


TEXT = [
    "-%Mul_0: float32[2?, 2, 3, 4] = onnx.Mul(%Gather_0, %f)",
    "-%Mul_1: float32[2?, 2, 4, 3] = onnx.Mul(%Transpose_1, %f)",
    "-%MatMul_1: float32[2?, 2, 3, 3] = onnx.MatMul(%Mul_0, %Mul_1)",
    "+%MatMul_1: float32[2?, 2, 3, 3] = onnx.MatMul(%Gather_0, %Transpose_1)",
]

DOES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "a layer with a bias": ("a = MatMul(x, w) b = Add(a, v) y = Mul(f, b)", {"v": (8,)}, ["MatMul", "Add"]),
    "a quotient": ("a = MatMul(x, w) y = Div(a, f)", {}, ["MatMul"]),
    "a table": (
        "a = Relu(x) b = Neg(a) c = Mul(b, cos) d = Mul(sin, a) e = Add(c, d) k = Mul(e, f) g = MatMul(k, w) "
        "y = Relu(g)",
        {"cos": (3, 8), "sin": (3, 8)},
        ["Relu", "Neg", "Mul", "Mul", "Add", "MatMul", "Relu"],
    ),
    "both factors of a product": (
        "a = Relu(x) b = Sigmoid(x) c = Transpose<perm = [0, 2, 1]>(b) d = Mul(a, f) e = Mul(c, f) g = MatMul(d, e) "
        "y = MatMul(g, u)",
        {"u": (3, 8)},
        ["Relu", "Sigmoid", "Transpose", "Mul", "MatMul", "MatMul"],
    ),
    "parts of a Split": (
        "a = MatMul(x, u) b, c = Split<axis = -1, num_outputs = 2>(a) d = Mul(b, f) e = Softmax(d) y = Add(e, c)",
        {"u": (8, 16)},
        ["MatMul", "Split", "Softmax", "Add"],
    ),
    "layers ahead": (
        "a = Relu(x) b = Mul(a, f) c = Transpose<perm = [0, 2, 1]>(b) d = MatMul(c, t) "
        "e = Transpose<perm = [0, 2, 1]>(d) g = MatMul(b, w) h = Add(g, v) y = Sub(h, e)",
        {"t": (3, 3), "v": (8,)},
        ["Relu", "Transpose", "MatMul", "Transpose", "MatMul", "Add", "Sub"],
    ),
    "a concatenation": (
        "a = MatMul(x, w) b = MatMul(x, u) c = Concat<axis = -1>(a, b) d = Mul(c, f) y = MatMul(d, v)",
        {"u": (8, 4), "v": (12, 8)},
        ["MatMul", "MatMul", "Concat", "MatMul"],
    ),
}


@pytest.mark.parametrize("name", DOES)
def test_folds(name: str) -> None:
    body, weights, expected = DOES[name]
    used = {"w": (8, 8)} if "w)" in body else {}
    done = trial(FoldNumbers(), HEAD, body, {**used, **weights, "f": np.float32(0.3)})
    assert calls(done.after) == expected
    assert any(site.applied for site in done.context.sites)
    assert done.difference() < 1e-6
    assert done.notices_damage(1e-3)
    assert done.again().text() == ""


def test_a_convolution() -> None:
    done = trial(
        FoldNumbers(),
        "(float[N,2,5,5] x) => (float[N,3,5,5] y)",
        "a = Conv<pads = [1, 1, 1, 1]>(x, w, v) y = Mul(a, f)",
        {"w": (3, 2, 3, 3), "v": (3,), "f": np.float32(-2)},
    )
    assert calls(done.after) == ["Conv"]
    sound(done)


ROTARY = (
    "a, b = Split<axis = -1, num_outputs = 2>({x}) c = Neg(b) d = Concat<axis = -1>(c, a) e = Mul(d, sin) "
    "g = Mul({x}, cos) h = Add(g, e)"
)


def test_signs_of_rotary_embeddings() -> None:
    second = re.sub(r"\b([a-eg-h])\b", r"\g<1>2", ROTARY.format(x="x"))
    done = trial(
        FoldNumbers(),
        HEAD,
        f"{ROTARY.format(x='x')} {second} i = MatMul(h, w) j = MatMul(h2, u) y = Sub(i, j)",
        {"sin": (3, 8), "cos": (3, 8), "w": (8, 8), "u": (8, 8)},
    )
    assert "Neg" not in calls(done.after)
    assert [site.reason for site in done.applied] == ["the sign into sin"] * 2
    assert [name for name in done.after.tensors() if name.startswith("sin")] == ["sin_signed"]
    sound(done)


def test_a_scaled_table_is_made_once() -> None:
    done = trial(
        FoldNumbers(),
        HEAD,
        "a = Relu(x) b = Sigmoid(x) c = Mul(a, t) d = Mul(b, t) e = Mul(c, f) g = Mul(d, f) y = Sub(e, g)",
        {"t": (3, 8), "f": np.float32(0.5)},
    )
    assert calls(done.after) == ["Relu", "Sigmoid", "Mul", "Mul", "Sub"]
    assert list(done.after.tensors()) == ["t_scaled"]
    sound(done)


def test_a_sign_stays_where_the_table_does_not_reach() -> None:
    done = trial(
        FoldNumbers(), HEAD, f"{ROTARY.format(x='x')} y = MatMul(h, w)", {"sin": (3, 1), "cos": (3, 8), "w": (8, 8)}
    )
    assert done.unchanged


STAYS: dict[str, tuple[str, str]] = {
    "others read it": ("a = MatMul(x, w) b = Mul(a, f) c = Softmax(b) y = Add(a, c)", "others read MatMul_0, unscaled"),
    "no scale goes through": (
        "a = MatMul(x, w) b = Relu(a) y = Mul(b, f)",
        "Relu_0 (onnx.Relu) does not scale with what it reads",
    ),
    "a shared weight": (
        "a = MatMul(x, w) b = Mul(a, f) y = MatMul(b, w)",
        "w is shared, or computed",
    ),
    "not only layers ahead": (
        "a = Relu(x) b = Mul(a, f) c = MatMul(b, w) y = Add(b, c)",
        "Relu_0 (onnx.Relu) does not scale with what it reads",
    ),
    "a factor that is computed ahead": (
        "a = Relu(x) b = Mul(a, f) c = Transpose<perm = [0, 2, 1]>(b) d = MatMul(b, c) e = MatMul(d, x) "
        "y = MatMul(e, w)",
        "Relu_0 (onnx.Relu) does not scale with what it reads",
    ),
    "columns that others read, too": (
        "a = MatMul(x, w) b = Slice(a, s, e, k) c = Mul(b, f) d = Softmax(c) g = Slice(a, t, h, k) "
        "y = Concat<axis = 2>(d, g)",
        "others read MatMul_0, unscaled",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    body, reason = STAYS[name]
    weights: dict[str, Any] = {"w": (8, 8), "f": np.float32(0.5)}
    if "Slice" in body:
        weights |= {"s": [0], "e": [5], "t": [4], "h": [7], "k": [2]}
    done = trial(FoldNumbers(), HEAD, body, weights)
    assert done.unchanged
    assert [site.reason for site in done.skipped] == [reason]


def test_other_graphs_are_left_alone() -> None:
    assert try_pass(FoldNumbers(), nn.Linear(2, 2), torch.randn(2, 2)).unchanged


STEPS = [
    "{b} = Mul({a}, f)",
    "{b} = Neg({a})",
    "{b} = Relu({a})",
    "{b} = Add({a}, v)",
    "{b} = Add({a}, {c})",
    "{b} = Mul(v, {a})",
    "{b}w = MatMul({a}, w) {b} = Add({b}w, v)",
    "{b}t = Transpose<perm = [0, 2, 1]>({a}) {b} = Transpose<perm = [0, 2, 1]>({b}t)",
    "{b}s, {b}t = Split<axis = 2, num_outputs = 2>({a}) {b}u = Mul({b}t, f) {b} = Concat<axis = 2>({b}s, {b}u)",
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 8)), min_size=2, max_size=8))
def test_preserves(steps: list[tuple[str, int]]) -> None:
    body = "v0 = MatMul(x, first) " + " ".join(
        step.format(a=f"v{i}", b=f"v{i + 1}", c=f"v{min(other, i)}") for i, (step, other) in enumerate(steps)
    )
    weights = {"first": (8, 8), "w": (8, 8), "v": (8,), "f": np.float32(0.5)}
    done = trial(FoldNumbers(), HEAD, f"{body} y = Softmax(v{len(steps)})", weights)
    assert done.difference() < 1e-6
    assert len(calls(done.after)) <= len(calls(done.before))
