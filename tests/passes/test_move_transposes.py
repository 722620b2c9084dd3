"""Check that transposes are moved to where they vanish: text, meaning, refusals, properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.passes import MoveTransposes
from graphopt.passes.canonicalize.orders import composed, inverse, is_plain
from graphopt.testing import Trial, try_pass
from tests.onnx_models import calls, trial

HEAD = "(float[N,3,4,5] x) => (float[N,3,4,5] y)"
THERE = "a = Transpose<perm = [0, 2, 3, 1]>(x)"
BACK = "y = Transpose<perm = [0, 3, 1, 2]>(b)"


def inside(body: str, **weights: Any) -> Trial:
    """Run the pass on what turns ``a`` into ``b``, with the channels last."""
    return trial(MoveTransposes(), HEAD, f"{THERE} {body} {BACK}", weights)


def sound(done: Trial) -> None:
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged


# -- text -----------------------------------------------------------------------------------------------------------


def test_text() -> None:
    done = inside(
        "c = Mul(a, scale) d = Softmax<axis = 1>(c) e = Concat<axis = 3>(c, d) f, g = Split<axis = -1>(e, parts) "
        "h = ReduceMean<keepdims = 1>(f, axes) b = Sub(g, h)",
        scale=(3,),
        parts=[3, 3],
        axes=[-1],
    )
    assert done.text().splitlines() == TEXT
    assert [(site.name, site.reason) for site in done.applied] == [("Transpose_0", "2 transposes -> 0")]
    assert [(site.name, site.reason) for site in done.skipped] == []
    sound(done)


TEXT = [
    "-%scale: float32[3] = @scale",
    "-%Transpose_0: float32[2?, 4, 5, 3] = onnx.Transpose(%x, perm=[0, 2, 3, 1])",
    "-%Mul_0: float32[2?, 4, 5, 3] = onnx.Mul(%Transpose_0, %scale)",
    "-%Softmax_0: float32[2?, 4, 5, 3] = onnx.Softmax(%Mul_0, axis=1)",
    "-%Concat_0: float32[2?, 4, 5, 6] = onnx.Concat([%Mul_0, %Softmax_0], axis=3)",
    "-%Split_0: (float32[2?, 4, 5, 3], float32[2?, 4, 5, 3]) = onnx.Split(%Concat_0, [3, 3], axis=-1, num_outputs=2)",
    "-%getitem_1: float32[2?, 4, 5, 3] = getitem(%Split_0, 1)",
    "-%getitem: float32[2?, 4, 5, 3] = getitem(%Split_0, 0)",
    "-%ReduceMean_0: float32[2?, 4, 5, 1] = onnx.ReduceMean(%getitem, [-1], keepdims=1)",
    "-%Sub_0: float32[2?, 4, 5, 3] = onnx.Sub(%getitem_1, %ReduceMean_0)",
    "-%Transpose_1: float32[2?, 3, 4, 5] = onnx.Transpose(%Sub_0, perm=[0, 3, 1, 2])",
    "-return [%Transpose_1]",
    "+%scale_moved: float32[1, 3, 1, 1] = @scale_moved",
    "+%mul: float32[2?, 3, 4, 5] = onnx.Mul(%x, %scale_moved)",
    "+%softmax: float32[2?, 3, 4, 5] = onnx.Softmax(%mul, axis=2)",
    "+%concat: float32[2?, 6, 4, 5] = onnx.Concat([%mul, %softmax], axis=1)",
    "+%split: (float32[2?, 3, 4, 5], float32[2?, 3, 4, 5]) = onnx.Split(%concat, [3, 3], axis=1, num_outputs=2)",
    "+%getitem_2: float32[2?, 3, 4, 5] = getitem(%split, 1)",
    "+%getitem_3: float32[2?, 3, 4, 5] = getitem(%split, 0)",
    "+%reduce_mean: float32[2?, 1, 4, 5] = onnx.ReduceMean(%getitem_3, [1], keepdims=1)",
    "+%sub: float32[2?, 3, 4, 5] = onnx.Sub(%getitem_2, %reduce_mean)",
    "+return [%sub]",
]


def test_a_region_that_would_need_as_many_stays() -> None:
    done = trial(
        MoveTransposes(),
        "(float[N,3,4] x) => (float[N,4,3] y)",
        "a = Transpose<perm = [0, 2, 1]>(x) c = Mul(a, scale) y = LayerNormalization(c, gain)",
        {"scale": (3,), "gain": (3,)},
    )
    assert done.unchanged
    assert [(site.name, site.reason) for site in done.skipped] == [
        ("Transpose_0", "with Mul_0 in the order before it 1 of 1 would be left")
    ]


def test_a_reader_outside_is_counted() -> None:
    done = trial(
        MoveTransposes(),
        "(float[N,3,4] x) => (float[N,4,3] y, float[N,3,4] z)",
        "a = Transpose<perm = [0, 2, 1]>(x) c = Mul(a, scale) y = LayerNormalization(a, gain) "
        "d = LayerNormalization(c, gain) e = Add(c, d) z = Transpose<perm = [0, 2, 1]>(e)",
        {"scale": (3,), "gain": (3,)},
    )
    assert done.unchanged
    assert [(site.name, site.reason) for site in done.skipped] == [
        ("Transpose_0", "with Mul_0, Add_0 in the order before it 3 of 2 would be left"),
    ]
    assert done.difference() == 0


# -- what is moved ----------------------------------------------------------------------------------------------------

MOVES: dict[str, tuple[str, dict[str, Any]]] = {
    "unary": ("c = Relu(a) b = Clip(c, l)", {"l": np.float32(-0.1)}),
    "a number": ("b = Add(a, s)", {"s": np.ones((1, 1), np.float32)}),
    "a vector": ("b = Add(v, a)", {"v": (3,)}),
    "a whole tensor": ("b = Where(m, a, v)", {"m": np.arange(60).reshape(4, 5, 3) % 2 == 0, "v": (1, 4, 5, 3)}),
    "two of one order": (
        "c = Transpose<perm = [0, 2, 3, 1]>(x) d = Relu(c) e = Mul(a, a) b = Add(d, e)",
        {},
    ),
    "softmax": ("b = Softmax<axis = 2>(a)", {}),
    "reduced and kept": ("c = ReduceMax<keepdims = 1>(a, k) b = Sub(a, c)", {"k": [1, 2]}),
    "reduced": ("c = ReduceMean<keepdims = 0>(a, k) d = Unsqueeze(c, k) b = Sub(a, d)", {"k": [1, 2]}),
    "sliced": (
        "c = Slice(a, s, e, k) d = Slice(a, e, f, k) b = Concat<axis = 2>(d, c)",
        {"s": [0], "e": [2], "f": [5], "k": [2]},
    ),
    "padded and cut": (
        "c = Pad(a, p) b = Slice(c, s, e, k)",
        {"p": [0, 1, 0, 0, 0, 1, 0, 2], "s": [1, 0], "e": [5, 3], "k": [1, 3]},
    ),
    "split": ("c, d = Split<axis = 3>(a, s) b = Concat<axis = 3>(d, c)", {"s": [1, 2]}),
    "looked up": (
        "c = Gather<axis = 3>(a, i) d = Unsqueeze(c, k) b = Mul(a, d)",
        {"i": np.int64(1), "k": [3]},
    ),
    "reordered": ("b = Gather<axis = 3>(a, i)", {"i": [2, 0, 1]}),
    "another operand": ("b = Add(a, v)", {"v": (4, 1, 3)}),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    body, weights = MOVES[name]
    done = inside(body, **weights)
    assert "Transpose" not in calls(done.after), done.after.text()
    sound(done)


def test_a_product_keeps_rows_apart() -> None:
    done = trial(
        MoveTransposes(),
        "(float[N,3,4,5] x) => (float[N,3,4,6] y)",
        "a = Transpose<perm = [0, 2, 1, 3]>(x) n = LayerNormalization(a, gain) m = MatMul(n, w) c = Add(m, v) "
        "y = Transpose<perm = [0, 2, 1, 3]>(c)",
        {"gain": (5,), "w": (5, 6), "v": (6,)},
    )
    assert calls(done.after) == ["LayerNormalization", "MatMul", "Add"]
    sound(done)


def test_a_pooled_value_needs_no_order() -> None:
    done = trial(
        MoveTransposes(),
        "(float[N,3,4,5] x) => (float[N,2] y)",
        f"{THERE} b = ReduceMean<keepdims = 0>(a, k) y = MatMul(b, w)",
        {"k": [1, 2], "w": (3, 2)},
    )
    assert calls(done.after) == ["ReduceMean", "MatMul"]
    sound(done)


def test_joined_dimensions_move_one_by_one() -> None:
    done = trial(
        MoveTransposes(),
        "(float[N,3,4,5] x) => (float[N,3,5,2] y)",
        "a = Reshape(x, s) b = Transpose<perm = [0, 2, 1]>(a) c = Reshape(b, t) y = MatMul(c, w)",
        {"s": [-1, 4, 5], "t": [-1, 3, 5, 4], "w": (4, 2)},
    )
    assert done.text().splitlines() == [
        "-%Reshape_0: float32[6?, 4, 5] = onnx.Reshape(%x, [-1, 4, 5])",
        "-%Transpose_0: float32[6?, 5, 4] = onnx.Transpose(%Reshape_0, perm=[0, 2, 1])",
        "-%Reshape_1: float32[2?, 3, 5, 4] = onnx.Reshape(%Transpose_0, [-1, 3, 5, 4])",
        "-%MatMul_0: float32[2?, 3, 5, 2] = onnx.MatMul(%Reshape_1, %w)",
        "+%transpose: float32[2?, 3, 5, 4] = onnx.Transpose(%x, perm=[0, 1, 3, 2])",
        "+%MatMul_0: float32[2?, 3, 5, 2] = onnx.MatMul(%transpose, %w)",
    ]
    sound(done)


def test_joined_dimensions_that_are_split_elsewhere() -> None:
    done = trial(
        MoveTransposes(),
        "(float[N,3,4,5] x) => (float[N,5,2,2] y)",
        "a = Reshape(x, s) b = Transpose<perm = [0, 2, 1]>(a) c = Reshape(b, t) y = MatMul(c, w)",
        {"s": [0, 12, 5], "t": [0, 5, 2, 6], "w": (6, 2)},
    )
    assert calls(done.after) == ["Transpose", "Reshape", "MatMul"]
    sound(done)


# -- what stays -------------------------------------------------------------------------------------------------------

STAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax along memory": ("b = Softmax<axis = 3>(a)", {}),
    "normalised over": ("b = LayerNormalization(a, g)", {"g": (3,)}),
    "a product over channels": ("b = MatMul(a, w)", {"w": (3, 3)}),
    "another shape": ("c = Reshape(a, s) b = Relu(c)", {"s": [0, 5, 4, 3]}),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    body, weights = STAYS[name]
    head = HEAD if name != "another shape" else HEAD.replace("3,4,5] y", "3,5,4] y")
    done = trial(MoveTransposes(), head, f"{THERE} {body} {BACK}", weights)
    assert done.unchanged


def test_other_graphs_are_left_alone() -> None:
    done = try_pass(MoveTransposes(), nn.Sequential(nn.Linear(2, 2), nn.Flatten(0, 1)), torch.randn(2, 3, 2))
    assert done.unchanged


# -- properties -------------------------------------------------------------------------------------------------------


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_orders_compose(first: list[int], second: list[int]) -> None:
    x = torch.randn(2, 3, 4, 5)
    joined = composed(tuple(first), tuple(second))
    assert torch.equal(x.permute(first).permute(second), x.permute(joined))
    assert is_plain(composed(tuple(first), inverse(tuple(first))))


STEPS = [
    "{b} = Relu({a})",
    "{b} = Transpose<perm = [0, 2, 1, 3]>({a})",
    "{b} = Transpose<perm = [0, 1, 3, 2]>({a})",
    "{b} = Transpose<perm = [3, 2, 1, 0]>({a})",
    "{b} = Mul({a}, v)",
    "{b} = Add(v, {a})",
    "{b} = Add({a}, v0)",
    "{b} = Softmax<axis = 1>({a})",
    "{b}0 = ReduceSum<keepdims = 0>({a}, k) {b}1 = Unsqueeze({b}0, k) {b} = Sub({a}, {b}1)",
    "{b}0, {b}1 = Split<axis = 2>({a}, h) {b} = Concat<axis = 2>({b}1, {b}0)",
    "{b} = Pad({a}, p) ",
    "{b} = MatMul({a}, w)",
    "{b}0 = Reshape({a}, s) {b}1 = Transpose<perm = [0, 2, 1]>({b}0) {b} = Reshape({b}1, t)",
]
VALUES = {
    "w": (4, 4),
    "v": (4, 1),
    "k": [2],
    "h": [1, 3],
    "p": [0, 0, 1, -1, 0, 0, -1, 1],
    "s": [-1, 4, 4],
    "t": [4] * 4,
}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(STEPS), min_size=2, max_size=8))
def test_preserves(steps: list[str]) -> None:
    body = "v0 = MatMul(x, w) " + " ".join(step.format(a=f"v{i}", b=f"v{i + 1}") for i, step in enumerate(steps))
    done = trial(
        MoveTransposes(),
        "(float[4,4,4,4] x) => (float[4,4,4,4] y)",
        f"{body} y = MatMul(v{len(steps)}, w)",
        VALUES,
    )
    assert done.difference() < 1e-12
    assert calls(done.after).count("Transpose") <= calls(done.before).count("Transpose")
    assert done.again().unchanged
