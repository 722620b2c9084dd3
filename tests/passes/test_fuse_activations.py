"""Check that activation functions are recognised: text, meaning, refusals, properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.dialects.onnx.facts import facts_of
from graphopt.passes import FuseActivations
from graphopt.testing import Trial, try_pass
from tests.onnx_models import calls, trial

HEAD = "(float[N,8] x) => (float[N,8] y)"


def number(value: float) -> Any:
    return np.float32(value)


def inside(body: str, opset: int = 20, raise_opset: bool = False, swish: bool = False, **constants: Any) -> Trial:
    """Run the pass on what turns ``a`` into ``b``, between two products."""
    weights = {"first": (8, 8), "last": (8, 8), **constants}
    text = f"a = MatMul(x, first) {body} y = MatMul(b, last)"
    return trial(FuseActivations(raise_opset, swish), HEAD, text, weights, opset=opset)


def sound(done: Trial, least: float = 1e-6) -> None:
    assert done.difference() < least  # single precision holds the numbers of the function to 6e-8
    assert done.notices_damage(1e-3)
    assert done.again().unchanged


TANH = (
    "c = Pow(a, three) d = Mul(c, k) e = Add(a, d) f = Mul(e, r) g = Tanh(f) h = Add(g, one) i = Mul(a, half) "
    "b = Mul(i, h)"
)
NUMBERS = {
    "three": number(3),
    "k": number(0.044715),
    "r": number(0.7978845608),
    "one": number(1),
    "half": number(0.5),
}


def test_text() -> None:
    done = trial(
        FuseActivations(swish=True),
        "(float[N,8] x) => (float[N,8] y, float[N,8] z)",
        f"a = MatMul(x, first) {TANH} s = Sigmoid(b) y = Mul(b, s) z = MatMul(b, last)",
        {"first": (8, 8), "last": (8, 8), **NUMBERS},
    )
    assert done.text().splitlines() == TEXT
    assert [(site.name, site.reason) for site in done.applied] == [("Mul_3", "8 calls make Gelu")]
    assert [(site.name, site.reason) for site in done.skipped] == [
        ("Mul_4", "2 calls make Swish, which is there from opset 24 on (raise_opset)")
    ]
    refused = try_pass(FuseActivations(), done.after).skipped
    assert [(site.name, site.reason) for site in refused] == [("Mul_4", "2 calls make Swish, which is slower (swish)")]
    sound(done)


TEXT = [
    "-%three: float32[] = @three",
    "-%k: float32[] = @k",
    "-%r: float32[] = @r",
    "-%one: float32[] = @one",
    "-%half_: float32[] = @half_",
    "-%Pow_0: float32[2?, 8] = onnx.Pow(%MatMul_0, %three)",
    "-%Mul_0: float32[2?, 8] = onnx.Mul(%Pow_0, %k)",
    "-%Add_0: float32[2?, 8] = onnx.Add(%MatMul_0, %Mul_0)",
    "-%Mul_1: float32[2?, 8] = onnx.Mul(%Add_0, %r)",
    "-%Tanh_0: float32[2?, 8] = onnx.Tanh(%Mul_1)",
    "-%Add_1: float32[2?, 8] = onnx.Add(%Tanh_0, %one)",
    "-%Mul_2: float32[2?, 8] = onnx.Mul(%MatMul_0, %half_)",
    "-%Mul_3: float32[2?, 8] = onnx.Mul(%Mul_2, %Add_1)",
    "-%Sigmoid_0: float32[2?, 8] = onnx.Sigmoid(%Mul_3)",
    "-%Mul_4: float32[2?, 8] = onnx.Mul(%Mul_3, %Sigmoid_0)",
    "-%MatMul_1: float32[2?, 8] = onnx.MatMul(%Mul_3, %last)",
    "+%gelu: float32[2?, 8] = onnx.Gelu(%MatMul_0, approximate=tanh)",
    "+%Sigmoid_0: float32[2?, 8] = onnx.Sigmoid(%gelu)",
    "+%Mul_4: float32[2?, 8] = onnx.Mul(%gelu, %Sigmoid_0)",
    "+%MatMul_1: float32[2?, 8] = onnx.MatMul(%gelu, %last)",
]

FORMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "erf, halved first": (
        "c = Div(a, r) d = Erf(c) e = Add(d, o) f = Mul(a, h) b = Mul(f, e)",
        {"r": number(2**0.5), "o": number(1), "h": number(0.5)},
        "Gelu",
    ),
    "erf, halved last": (
        "c = Mul(r, a) d = Erf(c) e = Add(o, d) f = Mul(e, a) b = Mul(f, h)",
        {"r": number(0.5**0.5), "o": number(1), "h": np.array([0.5], np.float32)},
        "Gelu",
    ),
    "erf, halved as a quotient": (
        "c = Mul(r, a) d = Erf(c) e = Add(o, d) f = Div(e, t) b = Mul(a, f)",
        {"r": number(0.5**0.5), "o": number(1), "t": number(2)},
        "Gelu",
    ),
    "tanh": (TANH, NUMBERS, "Gelu"),
    "tanh, by products": (
        "c = Mul(a, a) d = Mul(c, a) e = Mul(d, k) f = Add(e, a) g = Mul(f, r) h = Tanh(g) i = Add(h, o) j = Mul(a, i) "
        "b = Mul(j, t)",
        {"k": number(0.044715), "r": number(0.7978845608), "o": number(1), "t": number(0.5)},
        "Gelu",
    ),
    "hard swish": ("c = HardSigmoid<alpha = 0.16666667, beta = 0.5>(a) b = Mul(a, c)", {}, "HardSwish"),
    "hard swish by a clip": (
        "c = Add(a, k) d = Clip(c, z, s) e = Mul(a, d) b = Div(e, s)",
        {"k": number(3), "z": number(0), "s": number(6)},
        "HardSwish",
    ),
    "mish": ("c = Softplus(a) d = Tanh(c) b = Mul(a, d)", {}, "Mish"),
    "mish, spelled out": (
        "c = Exp(a) d = Add(c, o) e = Log(d) f = Tanh(e) b = Mul(a, f)",
        {"o": number(1)},
        "Mish",
    ),
    "softplus": ("c = Exp(a) d = Add(c, o) b = Log(d)", {"o": number(1)}, "Softplus"),
    "sigmoid": ("c = Neg(a) d = Exp(c) e = Add(o, d) b = Reciprocal(e)", {"o": number(1)}, "Sigmoid"),
}


@pytest.mark.parametrize("name", FORMS)
def test_recognises(name: str) -> None:
    body, constants, expected = FORMS[name]
    done = inside(body, **constants)
    assert calls(done.after) == ["MatMul", expected, "MatMul"]
    sound(done)


def test_a_bound_on_the_result_stays() -> None:
    done = inside("c = Exp(a) d = Add(c, o) e = Log(d) b = Clip(e, , l)", o=number(1), l=number(40))
    assert calls(done.after) == ["MatMul", "Softplus", "Clip", "MatMul"]
    sound(done)


def test_a_newer_operator_is_taken_where_that_is_asked_for() -> None:
    done = inside("c = Sigmoid(a) b = Mul(a, c)", opset=13, raise_opset=True, swish=True)
    assert calls(done.after) == ["MatMul", "Swish", "MatMul"]
    assert (facts_of(done.after).opset, facts_of(done.before).opset) == (24, 13)
    sound(done)


STAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "another number": (
        "c = Div(a, r) d = Erf(c) e = Add(d, o) f = Mul(a, h) b = Mul(f, e)",
        {"r": number(1.4), "o": number(1), "h": number(0.5)},
    ),
    "an inner value that others read": (
        "c = HardSigmoid<alpha = 0.16666667, beta = 0.5>(a) d = Mul(a, c) b = Add(d, c)",
        {},
    ),
    "a number for each channel": (
        "c = Exp(a) d = Add(c, o) b = Log(d)",
        {"o": (8,)},
    ),
    "two values": ("c = Neg(a) d = HardSigmoid<alpha = 0.16666667, beta = 0.5>(c) b = Mul(a, d)", {}),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    body, constants = STAYS[name]
    before = inside(body, **constants)
    kept = {"Erf", "Clip", "HardSigmoid", "Exp"} & set(calls(before.before))
    assert kept <= set(calls(before.after))


def test_other_graphs_are_left_alone() -> None:
    assert try_pass(FuseActivations(), nn.Linear(2, 2), torch.randn(2, 2)).unchanged


STEPS = [
    "{b} = Sigmoid({a})",
    "{b} = Mul({a}, {c})",
    "{b} = Add({a}, o)",
    "{b} = Mul({a}, h)",
    "{b} = Tanh({a})",
    "{b} = Exp({a})",
    "{b} = Softplus({a})",
    "{b} = Clip({a}, z, s)",
    "{b} = Erf({a})",
    "{b} = HardSigmoid<alpha = 0.16666667, beta = 0.5>({a})",
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 8)), min_size=1, max_size=8))
def test_preserves(steps: list[tuple[str, int]]) -> None:
    body = "v0 = MatMul(x, w) " + " ".join(
        step.format(a=f"v{i}", b=f"v{i + 1}", c=f"v{min(other, i)}") for i, (step, other) in enumerate(steps)
    )
    done = trial(
        FuseActivations(raise_opset=True, swish=True),
        HEAD,
        f"{body} y = Tanh(v{len(steps)})",
        {"w": (8, 8), "o": number(1), "h": number(0.5), "z": number(0), "s": number(6)},
    )
    assert not done.difference() > 1e-6
    assert done.again().unchanged
    assert len(calls(done.after)) <= len(calls(done.before))
