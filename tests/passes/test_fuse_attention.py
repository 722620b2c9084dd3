"""Check that attention is recognised: text, meaning, refusals, properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.dialects.onnx.facts import facts_of
from graphopt.passes import FuseAttention
from graphopt.testing import Trial, try_pass
from tests.onnx_models import calls, trial

HEAD = "(float[N,3,8] x) => (float[N,3,8] y)"
PARTS = " ".join(
    f"{n}m = MatMul(x, w{n}) {n}r = Reshape({n}m, s) {n} = Transpose<perm = [0, 2, {o}]>({n}r)"
    for n, o in (("q", "1, 3"), ("k", "3, 1"), ("v", "1, 3"))
)
WEIGHTS: dict[str, Any] = {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "s": [-1, 3, 2, 4]}


def inside(body: str, raise_opset: bool = True, opset: int = 20, **weights: Any) -> Trial:
    """Run the pass on what makes ``b`` of queries q, transposed keys k and values v."""
    text = f"{PARTS} {body} y = Reshape(b, z)"
    return trial(FuseAttention(raise_opset), HEAD, text, {**WEIGHTS, "z": [-1, 3, 8], **weights}, opset=opset)


def sound(done: Trial) -> None:
    assert done.difference() < 1e-9
    assert done.notices_damage()
    assert done.again().unchanged


def test_text() -> None:
    done = inside(
        "e = MatMul(q, k) f = Mul(e, c) g = Add(f, mask) p = Softmax(g) h = MatMul(p, v) "
        "l = MatMul(h, k) m = Softmax(l) o = MatMul(m, v) d = ReduceSum<keepdims = 1>(m, last) b = Add(o, d)",
        c=np.float32(0.5),
        mask=(3, 3),
        last=[-1],
    )
    assert done.text().splitlines() == TEXT
    assert [(site.name, site.reason) for site in done.applied] == [
        ("MatMul_4", "attention of Transpose_0 to Transpose_1")
    ]
    assert [(site.name, site.reason) for site in done.skipped] == [("MatMul_6", "others read Softmax_1")]
    assert (facts_of(done.before).opset, facts_of(done.after).opset) == (20, 23)
    sound(done)


TEXT = [
    "-%c: float32[] = @c",
    "-%MatMul_3: float32[2?, 2, 3, 3] = onnx.MatMul(%Transpose_0, %Transpose_1)",
    "-%Mul_0: float32[2?, 2, 3, 3] = onnx.Mul(%MatMul_3, %c)",
    "-%Add_0: float32[2?, 2, 3, 3] = onnx.Add(%Mul_0, %mask)",
    "-%Softmax_0: float32[2?, 2, 3, 3] = onnx.Softmax(%Add_0)",
    "-%MatMul_4: float32[2?, 2, 3, 4] = onnx.MatMul(%Softmax_0, %Transpose_2)",
    "-%MatMul_5: float32[2?, 2, 3, 3] = onnx.MatMul(%MatMul_4, %Transpose_1)",
    "+%transpose: float32[2?, 2, 3, 4] = onnx.Transpose(%Reshape_1, perm=[0, 2, 1, 3])",
    "+%attention: float32[2?, 2, 3, 4] = onnx.Attention(%Transpose_0, %transpose, %Transpose_2, %mask, scale=0.5)",
    "+%MatMul_5: float32[2?, 2, 3, 3] = onnx.MatMul(%attention, %Transpose_1)",
]

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("e = MatMul(q, k) p = Softmax<axis = 3>(e) b = MatMul(p, v)", {}),
    "a quotient": ("e = MatMul(q, k) f = Div(e, c) p = Softmax(f) b = MatMul(p, v)", {"c": np.float32(2)}),
    "a mask first": ("e = MatMul(q, k) f = Add(mask, e) p = Softmax(f) b = MatMul(p, v)", {"mask": (1, 2, 1, 3)}),
    "keys in no order": (
        "j = Relu(k) e = MatMul(q, j) p = Softmax(e) b = MatMul(p, v)",
        {},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_recognises(name: str) -> None:
    body, weights = FORMS[name]
    done = inside(body, **weights)
    assert "Attention" in calls(done.after)
    assert "Softmax" not in calls(done.after)
    sound(done)


STAYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "over other dimensions": (
        "e = MatMul(q, k) p = Softmax<axis = 2>(e) b = MatMul(p, v)",
        {},
        "Softmax_0 is not over the last of four dimensions",
    ),
    "a mask for queries": (
        "e = MatMul(q, k) f = Add(e, mask) p = Softmax(f) b = MatMul(p, v)",
        {"mask": (3, 1)},
        "mask does not reach over all keys",
    ),
    "a negative scale": (
        "e = MatMul(q, k) f = Mul(e, c) p = Softmax(f) b = MatMul(p, v)",
        {"c": np.float32(-2)},
        "a scale of -2 has no root",
    ),
    "values of all heads": (
        "e = MatMul(q, k) p = Softmax(e) u = ReduceSum<keepdims = 1>(v, i) b = MatMul(p, u)",
        {"i": [1]},
        "batches or heads of Transpose_0, Transpose_1 and ReduceSum_0 differ",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    body, weights, reason = STAYS[name]
    done = inside(body, **weights)
    assert done.unchanged
    assert [site.reason for site in done.skipped] == [reason]


def test_an_older_version_has_none() -> None:
    done = inside("e = MatMul(q, k) p = Softmax(e) b = MatMul(p, v)", raise_opset=False)
    assert done.unchanged
    assert [site.reason for site in done.skipped] == ["Attention is there from opset 23 on (raise_opset)"]


def test_other_graphs_are_left_alone() -> None:
    assert try_pass(FuseAttention(), nn.Linear(2, 2), torch.randn(2, 2)).unchanged


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["", "f0 = Mul(e, c)", "f0 = Mul(c, e)", "f0 = Div(e, c)"]),
    st.sampled_from([None, (3,), (3, 3), (1, 3, 3), (2, 2, 1, 3), (2, 1, 3, 1)]),
    st.booleans(),
    st.sampled_from([-1, 1, 2, 3]),
)
def test_preserves(scale: str, mask: tuple[int, ...] | None, first: bool, axis: int) -> None:
    value = "f0" if scale else "e"
    total = ("g = Add(mask, {})" if first else "g = Add({}, mask)").format(value) if mask is not None else ""
    body = f"e = MatMul(q, k) {scale} {total} p = Softmax<axis = {axis}>({'g' if total else value}) b = MatMul(p, v)"
    weights: dict[str, Any] = ({"c": np.float32(0.7)} if scale else {}) | ({"mask": mask} if mask is not None else {})
    done = inside(body, **weights)
    assert done.difference() < 1e-9
    assert done.again().unchanged
