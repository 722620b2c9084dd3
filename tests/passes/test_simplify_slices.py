"""Check that slices become a Split or lookups: text, meaning, refusals, properties."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.passes import SimplifySlices
from graphopt.testing import Trial, try_pass
from tests.onnx_models import calls, trial

HEAD = "(float[N,4,6] x) => (float[N,4,6] y)"


def inside(body: str, **constants: Any) -> Trial:
    """Run the pass on what turns ``a`` into ``b``, between two products."""
    weights = {"first": (6, 6), "last": (6, 6), **constants}
    return trial(SimplifySlices(), HEAD, f"a = MatMul(x, first) {body} y = MatMul(b, last)", weights)


def sound(done: Trial) -> None:
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged


PACKED = (
    "q = Slice(t, zero, one, zero) r = Squeeze(q, zero) k = Slice(t, one, two, zero) l = Squeeze(k, zero) "
    "g = Slice(l, zero, two, two) h = Slice(l, two, end, two) n = Neg(h) c = Concat<axis = 2>(n, g) "
    "u = Slice(r, zero, two, two) v = Slice(r, one, end, two) w = Concat<axis = 2>(u, v) z = Slice(w, zero, six, two)"
)
NUMBERS = {"zero": [0], "one": [1], "two": [2], "six": [6], "end": [2**63 - 1]}


def test_text() -> None:
    done = trial(
        SimplifySlices(),
        "(float[2,N,4,6] x) => (float[N,4,6] y)",
        f"t = MatMul(x, m) {PACKED} y = Add(c, z)",
        {"m": (6, 6), **NUMBERS},
    )
    assert done.text().splitlines() == TEXT
    assert [(site.name, site.reason) for site in done.applied] == [
        ("Squeeze_0", "looks up entry 0 of MatMul_0"),
        ("Squeeze_1", "looks up entry 1 of MatMul_0"),
        ("Slice_2", "takes gather_1 apart with 1 more"),
    ]
    assert [(site.name, site.reason) for site in done.skipped] == [
        ("Slice_4", "0:2, 1:6 of 6 do not take gather apart"),
    ]
    sound(done)


TEXT = [
    "-%Slice_0: float32[1, 16?, 4, 6] = onnx.Slice(%MatMul_0, [0], [1], [0])",
    "-%Squeeze_0: float32[16?, 4, 6] = onnx.Squeeze(%Slice_0, [0])",
    "-%Slice_1: float32[1, 16?, 4, 6] = onnx.Slice(%MatMul_0, [1], [2], [0])",
    "-%Squeeze_1: float32[16?, 4, 6] = onnx.Squeeze(%Slice_1, [0])",
    "-%Slice_2: float32[16?, 4, 2] = onnx.Slice(%Squeeze_1, [0], [2], [2])",
    "-%Slice_3: float32[16?, 4, 4] = onnx.Slice(%Squeeze_1, [2], [9223372036854775807], [2])",
    "-%Neg_0: float32[16?, 4, 4] = onnx.Neg(%Slice_3)",
    "-%Concat_0: float32[16?, 4, 6] = onnx.Concat([%Neg_0, %Slice_2], axis=2)",
    "-%Slice_4: float32[16?, 4, 2] = onnx.Slice(%Squeeze_0, [0], [2], [2])",
    "-%Slice_5: float32[16?, 4, 5] = onnx.Slice(%Squeeze_0, [1], [9223372036854775807], [2])",
    "+%index_0: int64[] = @index_0",
    "+%gather: float32[16?, 4, 6] = onnx.Gather(%MatMul_0, %index_0, axis=0)",
    "+%index_1: int64[] = @index_1",
    "+%gather_1: float32[16?, 4, 6] = onnx.Gather(%MatMul_0, %index_1, axis=0)",
    "+%split: (float32[16?, 4, 2], float32[16?, 4, 4]) = onnx.Split(%gather_1, [2, 4], axis=2)",
    "+%getitem: float32[16?, 4, 2] = getitem(%split, 0)",
    "+%getitem_1: float32[16?, 4, 4] = getitem(%split, 1)",
    "+%Neg_0: float32[16?, 4, 4] = onnx.Neg(%getitem_1)",
    "+%Concat_0: float32[16?, 4, 6] = onnx.Concat([%Neg_0, %getitem], axis=2)",
    "+%Slice_4: float32[16?, 4, 2] = onnx.Slice(%gather, [0], [2], [2])",
    "+%Slice_5: float32[16?, 4, 5] = onnx.Slice(%gather, [1], [9223372036854775807], [2])",
]

DOES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "parts in any order": (
        "c = Slice(a, s, e, k) d = Slice(a, z, s, k) b = Concat<axis = 2>(c, d)",
        {"s": [2], "e": [6], "z": [0], "k": [2]},
        ["Split", "Concat"],
    ),
    "ends counted from the end": (
        "c = Slice(a, z, s, k) d = Slice(a, s, e, k) b = Concat<axis = 2>(d, c)",
        {"s": [-2], "e": [99], "z": [0], "k": [-1]},
        ["Split", "Concat"],
    ),
    "all parts of a split": (
        "c, d, e, f = Split<axis = 1, num_outputs = 4>(a) g = Squeeze(c, k) h = Squeeze(d, k) i = Squeeze(e, k) "
        "j = Squeeze(f, k) l = Add(g, h) m = Mul(i, j) n = Sub(l, m) o = Unsqueeze(n, k) b = Add(a, o)",
        {"k": [1]},
        ["Gather", "Gather", "Gather", "Gather", "Add", "Mul", "Sub", "Unsqueeze", "Add"],
    ),
    "a reshape that drops a dimension": (
        "c = Slice(a, s, e, k) d = Reshape(c, t) f = Unsqueeze(d, k) b = Add(a, f)",
        {"s": [2], "e": [3], "k": [1], "t": [-1, 6]},
        ["Gather", "Unsqueeze", "Add"],
    ),
}


@pytest.mark.parametrize("name", DOES)
def test_simplifies(name: str) -> None:
    body, constants, expected = DOES[name]
    done = inside(body, **constants)
    assert calls(done.after)[1:-1] == expected
    sound(done)


STAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "two entries": (
        "c = Slice(a, s, e, k) d = ReduceSum<keepdims = 1>(c, k) b = Add(a, d)",
        {"s": [1], "e": [3], "k": [1]},
    ),
    "steps": (
        "c = Slice(a, s, e, k, t) d = Slice(a, u, e, k, t) b = Concat<axis = 2>(c, d)",
        {"s": [0], "u": [1], "e": [6], "k": [2], "t": [2]},
    ),
    "two axes": (
        "c = Slice(a, s, e, k) f = Reshape(c, t) b = Add(a, f)",
        {"s": [0, 0], "e": [1, 1], "k": [1, 2], "t": [-1, 1, 1]},
    ),
    "an entry that others read": (
        "c = Slice(a, s, e, k) d = Squeeze(c, k) f = Unsqueeze(d, k) g = Mul(f, c) b = Add(a, g)",
        {"s": [2], "e": [3], "k": [1]},
    ),
    "a split of which a part is whole": (
        "c, d = Split<axis = 1>(a, s) e = Squeeze(c, k) f = Unsqueeze(e, k) g = Add(d, f) b = Concat<axis = 1>(g, f)",
        {"s": [1, 3], "k": [1]},
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    body, constants = STAYS[name]
    done = inside(body, **constants)
    assert done.unchanged


def test_other_graphs_are_left_alone() -> None:
    assert try_pass(SimplifySlices(), nn.Linear(2, 2), torch.randn(2, 2)).unchanged


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-7, 7), min_size=1, max_size=4), st.integers(1, 2))
def test_preserves(bounds: list[int], axis: int) -> None:
    edges = [0, *bounds, 6]
    parts = list(pairwise(edges))
    body = " ".join(f"c{i} = Slice(a, s{i}, e{i}, k)" for i in range(len(parts)))
    joined = ", ".join(f"c{i}" for i in range(len(parts)))
    constants = {"k": [axis]} | {
        f"{n}{i}": [v] for i, part in enumerate(parts) for n, v in zip("se", part, strict=True)
    }
    done = trial(
        SimplifySlices(),
        "(float[3,6,6] x) => (float[A,B,C] y)",
        f"a = MatMul(x, w) {body} d = Concat<axis = {axis}>({joined}, a) y = Relu(d)",
        {"w": (6, 6), **constants},
    )
    assert done.difference() == 0
    assert len(calls(done.after)) <= len(calls(done.before))
    assert done.again().unchanged
