"""Check that calls of ONNX operators that compute nothing are taken out: text, meaning, refusals, properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes import RemoveIdentities
from graphopt.passes.canonicalize.onnx_identities import ONNX_RULES
from graphopt.passes.extents import SYM_SIZE
from graphopt.testing import Trial
from tests.onnx_models import calls, trial

HEAD = "(float[N,3,8] x) => (float[N,3,8] y)"


def inside(body: str, head: str = HEAD, opset: int = 20, **constants: Any) -> Trial:
    """Run the pass on what turns ``a`` into ``b``, between two products."""
    weights = {"first": (8, 8), "last": (8, 8), **constants}
    return trial(RemoveIdentities(), head, f"a = MatMul(x, first) {body} y = MatMul(b, last)", weights, opset=opset)


def left(done: Trial) -> list[str]:
    """Return the operators between the two products."""
    found = calls(done.after)
    assert found[0] == found[-1] == "MatMul"
    return found[1:-1]


def sound(done: Trial) -> None:
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged


# -- text -----------------------------------------------------------------------------------------------------------


def test_text() -> None:
    done = inside(
        """c = Identity(a)
        d = Reshape(c, s)
        e = Transpose<perm = [0, 2, 1]>(d)
        f = Transpose<perm = [0, 2, 1]>(e)
        m = MatMul(f, middle)
        r = Add(m, x)
        p = Softmax(r)
        nan = IsNaN(p)
        g = Where(nan, zero, p)
        h = Mul(g, one)
        i = Cast<to = 11>(h)
        j = Cast<to = 1>(i)
        b = Expand(j, sizes)""",
        middle=(8, 8),
        s=[0, -1, 8],
        zero=np.float32(0),
        one=np.float32(1),
        sizes=[1, 3, 1],
    )
    assert done.text().splitlines() == TEXT
    assert [(site.name, site.reason) for site in done.applied] == [
        ("Identity_0", "another name of the same value"),
        ("Reshape_0", "keeps the shape"),
        ("Transpose_1", "undoes Transpose_0"),
        ("Mul_0", "multiplies by 1"),
        ("Cast_1", "casts to float64 on the way, which loses nothing"),
        ("Expand_0", "expands to the shape it has"),
    ]
    assert [(site.name, site.reason) for site in done.skipped] == [
        ("Where_0", "a row that x masks entirely is not a number after Softmax_0")
    ]
    sound(done)


TEXT = [
    "-%one: float32[] = @one",
    "-%Identity_0: float32[2?, 3, 8] = onnx.Identity(%MatMul_0)",
    "-%Reshape_0: float32[2?, 3, 8] = onnx.Reshape(%Identity_0, [0, -1, 8])",
    "-%Transpose_0: float32[2?, 8, 3] = onnx.Transpose(%Reshape_0, perm=[0, 2, 1])",
    "-%Transpose_1: float32[2?, 3, 8] = onnx.Transpose(%Transpose_0, perm=[0, 2, 1])",
    "-%MatMul_1: float32[2?, 3, 8] = onnx.MatMul(%Transpose_1, %middle)",
    "+%MatMul_1: float32[2?, 3, 8] = onnx.MatMul(%MatMul_0, %middle)",
    "-%Mul_0: float32[2?, 3, 8] = onnx.Mul(%Where_0, %one)",
    "-%Cast_0: float64[2?, 3, 8] = onnx.Cast(%Mul_0, to=11)",
    "-%Cast_1: float32[2?, 3, 8] = onnx.Cast(%Cast_0, to=1)",
    "-%Expand_0: float32[2?, 3, 8] = onnx.Expand(%Cast_1, [1, 3, 1])",
    "-%MatMul_2: float32[2?, 3, 8] = onnx.MatMul(%Expand_0, %last)",
    "+%MatMul_2: float32[2?, 3, 8] = onnx.MatMul(%Where_0, %last)",
]


# -- what is taken out ------------------------------------------------------------------------------------------------

NOTHING: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout": ("b = Dropout(a)", {}),
    "dropout with a mask nobody reads": ("b, mask = Dropout(a)", {}),
    "add zero": ("b = Add(a, z)", {"z": np.zeros(8, np.float32)}),
    "zero and": ("b = Add(z, a)", {"z": np.zeros((1, 1, 1), np.float32)}),
    "minus zero": ("b = Sub(a, z)", {"z": np.zeros(1, np.float32)}),
    "divided by one": ("b = Div(a, o)", {"o": np.float32(1)}),
    "first power": ("b = Pow(a, o)", {"o": np.float32(1)}),
    "no bounds": ("b = Clip(a)", {}),
    "negated twice": ("c = Neg(a) b = Neg(c)", {}),
    "inverted twice": ("c = Reciprocal(a) b = Reciprocal(c)", {}),
    "one of one": ("b = Max(a)", {}),
    "the sum of one": ("b = Sum(a)", {}),
    "slice of everything": ("b = Slice(a, s, e)", {"s": [0, 0, 0], "e": [2**62, 5, 8]}),
    "padded by nothing": ("b = Pad(a, p)", {"p": [0] * 6}),
    "joined from one": ("b = Concat<axis = 1>(a)", {}),
    "taken apart and joined": ("c, d = Split<axis = 2>(a, s) b = Concat<axis = -1>(c, d)", {"s": [3, 5]}),
    "split into one": ("b = Split<axis = 1, num_outputs = 1>(a)", {}),
    "repeated once": ("b = Tile(a, r)", {"r": [1, 1, 1]}),
    "the same size": ("b = Resize(a, , s)", {"s": np.ones(3, np.float32)}),
    "chosen by truth": ("b = Where(c, a, z)", {"c": np.ones((1, 1), bool), "z": np.zeros(8, np.float32)}),
    "chosen from the same": ("c = Less(a, z) b = Where(c, a, a)", {"z": np.zeros(8, np.float32)}),
    "there and back": (
        "c = Unsqueeze(a, k) d = Reshape(c, s) e = Squeeze(d, k) b = Reshape(e, t)",
        {"k": [0], "s": [1, -1, 24], "t": [-1, 3, 8]},
    ),
    "expanded by its own size": (
        "c = Shape(x) d = Gather(c, i) e = Concat<axis = 0>(d, f) b = Expand(a, e)",
        {"i": [0], "f": [3, 8]},
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_takes_out(name: str) -> None:
    body, constants = NOTHING[name]
    done = inside(body, **constants)
    assert left(done) == []
    sound(done)


SHORTER: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "casts": ("c = Cast<to = 11>(a) d = Cast<to = 7>(c) b = Cast<to = 1>(d)", {}, ["Cast", "Cast"]),
    "clips": (
        "c = Clip(a, l, h) b = Clip(c, m, k)",
        {"l": np.float32(-1), "h": np.float32(0.5), "m": np.float32(-0.2), "k": np.float32(0.7)},
        ["Clip"],
    ),
    "relu and clip": ("c = Relu(a) b = Clip(c, , h)", {"h": np.float32(0.1)}, ["Clip"]),
    "relu of what is positive": ("c = Sigmoid(a) b = Relu(c)", {}, ["Sigmoid"]),
    "twice relu": ("c = Relu(a) b = Relu(c)", {}, ["Relu"]),
    "twice abs": ("c = Abs(a) b = Abs(c)", {}, ["Abs"]),
    "slices": (
        "c = Slice(a, s, e, k) d = Slice(c, s, f, k) b = Concat<axis = 2>(d, d)",
        {"s": [1], "e": [7], "f": [5], "k": [2]},
        ["Slice", "Concat"],
    ),
    "concats": (
        "c, d = Split<axis = 2>(a, s) e = Concat<axis = 2>(d, c) f = Slice(e, t, u, k) b = Concat<axis = 2>(d, f)",
        {"s": [3, 5], "t": [0], "u": [3], "k": [2]},
        ["Split", "Concat", "Slice", "Concat"],
    ),
    "nested concats": (
        "c, d, g = Split<axis = 2>(a, s) e = Concat<axis = -1>(d, c) b = Concat<axis = 2>(g, e)",
        {"s": [3, 4, 1]},
        ["Split", "Concat"],
    ),
    "reshapes": (
        "c = Flatten<axis = 2>(a) d = Unsqueeze(c, k) e = Reshape(d, s) f = Relu(e) b = Reshape(f, t)",
        {"k": [0], "s": [2, -1, 12], "t": [-1, 3, 8]},
        ["Reshape", "Relu", "Reshape"],
    ),
}


@pytest.mark.parametrize("name", SHORTER)
def test_shortens(name: str) -> None:
    body, constants, expected = SHORTER[name]
    done = inside(body, **constants)
    assert left(done) == expected
    sound(done)


def test_an_order_that_moves_no_entries_is_a_reshape() -> None:
    done = trial(
        RemoveIdentities(),
        "(float[N,3,1,8] x) => (float[N,1,3,2] y)",
        "a = Transpose<perm = [0, 2, 1, 3]>(x) b = Transpose<perm = [1, 0, 2, 3]>(a) "
        "c = Transpose<perm = [1, 0, 2, 3]>(b) y = MatMul(c, w)",
        {"w": (8, 2)},
    )
    assert calls(done.after) == ["Reshape", "MatMul"]
    sound(done)


MASKED = "s = Where(c, z, v) m = Add(a, s) p = Softmax(m) n = IsNaN(p) b = Where(n, z, p)"


@pytest.mark.parametrize("value", [-3.4e38, -np.inf])
def test_a_softmax_of_finite_numbers_is_a_number(value: float) -> None:
    done = trial(
        RemoveIdentities(),
        "(float[N,3,8] x, bool[N,1,8] c) => (float[N,3,8] y)",
        f"a = MatMul(x, first) {MASKED} y = MatMul(b, last)",
        {"first": (8, 8), "last": (8, 8), "z": np.float32(0), "v": np.float32(value)},
    )
    if np.isfinite(value):
        assert calls(done.after) == ["MatMul", "Where", "Add", "Softmax", "MatMul"]
        sound(done)
    else:
        assert done.unchanged
        assert [site.reason for site in done.skipped] == ["a row that v masks entirely is not a number after Softmax_0"]


def test_operands_need_not_be_as_large_as_the_result() -> None:
    done = inside(
        "n = ReduceL2<keepdims = 1>(a, k) s = Shape(a) e = Expand(n, s) d = Div(a, e) f = Expand(v, t) b = Add(d, f)",
        k=[-1],
        v=(1, 1, 8),
        t=[1, 3, 8],
    )
    assert left(done) == ["ReduceL2", "Div", "Add"]
    sound(done)


def test_an_operand_that_makes_the_result_large_stays() -> None:
    done = trial(
        RemoveIdentities(),
        "(float[N,1,8] x) => (float[N,3,8] y)",
        "e = Expand(v, t) y = Add(x, e)",
        {"v": (1, 1, 8), "t": [1, 3, 1]},
    )
    assert calls(done.after) == ["Expand", "Add"]
    assert done.unchanged


def test_a_size_that_varies_is_inferred() -> None:
    done = inside(
        "c = Shape(x) d = Gather(c, i) e = Concat<axis = 0>(d, f) g = Reshape(a, e) h = Relu(g) b = Reshape(h, t)",
        i=[0],
        f=[12, 2],
        t=[-1, 3, 8],
    )
    assert left(done) == ["Reshape", "Relu", "Reshape"]
    sound(done)


# -- what stays -------------------------------------------------------------------------------------------------------

STAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "cast that rounds": ("c = Cast<to = 6>(a) b = Cast<to = 1>(c)", {}),
    "add of nearly zero": ("b = Add(a, z)", {"z": np.array([0, 0, 0, 0, 0, 0, 0, 1e-3], np.float32)}),
    "zero minus": ("b = Sub(z, a)", {"z": np.zeros(8, np.float32)}),
    "one divided by": ("b = Div(o, a)", {"o": np.ones(8, np.float32)}),
    "two to the": ("b = Pow(o, a)", {"o": np.ones(8, np.float32) * 2}),
    "a bound": ("b = Clip(a, l)", {"l": np.float32(0)}),
    "slice from the end": ("c = Slice(a, s, e, k) b = Concat<axis = 2>(c, c)", {"s": [-4], "e": [2**62], "k": [2]}),
    "slice backwards": ("b = Slice(a, s, e, k, t)", {"s": [-1], "e": [-(2**62)], "k": [2], "t": [-1]}),
    "parts in another order": ("c, d = Split<axis = 2>(a, s) b = Concat<axis = 2>(d, c)", {"s": [4, 4]}),
    "parts on another axis": (
        "c, d = Split<axis = 2>(a, s) e = Concat<axis = 1>(c, d) b = Reshape(e, t)",
        {"s": [4, 4], "t": [0, 3, 8]},
    ),
    "chosen by entries": ("b = Where(c, a, z)", {"c": np.arange(8) > 3, "z": np.zeros(8, np.float32)}),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    body, constants = STAYS[name]
    done = inside(body, **constants)
    assert done.unchanged
    assert done.difference() == 0


def test_zeros_that_make_a_value_larger_stay() -> None:
    done = trial(
        RemoveIdentities(), "(float[N,1,8] x) => (float[N,3,8] y)", "y = Add(x, z)", {"z": np.zeros((3, 1), np.float32)}
    )
    assert calls(done.after) == ["Add"]


def test_several_transposes_become_one() -> None:
    done = trial(
        RemoveIdentities(),
        "(float[2,3,4,5] x) => (float[4,2,3,6] y)",
        "a = Transpose<perm = [2, 0, 1, 3]>(x) b = Transpose<perm = [1, 0, 2, 3]>(a) "
        "c = Transpose<perm = [1, 0, 2, 3]>(b) y = MatMul(c, w)",
        {"w": (5, 6)},
    )
    assert calls(done.after) == ["Transpose", "MatMul"]
    sound(done)


def test_two_sizes_that_vary_are_not_confused() -> None:
    done = trial(
        RemoveIdentities(),
        "(float[N,M] x) => (float[N,M] y)",
        "c = Shape(x) d = Gather(c, i) e = Reshape(x, d) y = Relu(e)",
        {"i": [1, 0]},
    )
    assert calls(done.after).count("Reshape") == 1


def test_every_rule_is_an_operator() -> None:
    from graphopt.dialects.onnx.operators import known

    assert all(known(key) for key in ONNX_RULES)


# -- properties -------------------------------------------------------------------------------------------------------

STEPS = [
    "{b} = Relu({a})",
    "{b} = Neg({a})",
    "{b} = Transpose<perm = [0, 2, 1, 3]>({a})",
    "{b} = Transpose<perm = [0, 1, 3, 2]>({a})",
    "{b} = Reshape({a}, s)",
    "{b} = Reshape({a}, t)",
    "{b}0 = Unsqueeze({a}, k) {b} = Squeeze({b}0, k)",
    "{b}0 = Flatten<axis = 2>({a}) {b} = Reshape({b}0, s)",
    "{b}0, {b}1 = Split<axis = 1>({a}, h) {b} = Concat<axis = 1>({b}0, {b}1)",
    "{b}0, {b}1 = Split<axis = 1>({a}, h) {b} = Concat<axis = 1>({b}1, {b}0)",
    "{b} = Clip({a}, l)",
    "{b} = Clip({a}, , u)",
    "{b}0 = Cast<to = 11>({a}) {b} = Cast<to = 1>({b}0)",
    "{b} = Mul({a}, o)",
    "{b} = Add({a}, {a})",
]
VALUES = {
    "w": (4, 4),
    "s": [-1, 4, 4, 4],
    "t": [0, 0, 4, 4],
    "k": [1],
    "h": [1, 3],
    "l": np.float32(-0.3),
    "u": np.float32(0.4),
    "o": np.float32(1),
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=8))
def test_preserves(steps: list[str]) -> None:
    body = "v0 = MatMul(x, w) " + " ".join(step.format(a=f"v{i}", b=f"v{i + 1}") for i, step in enumerate(steps))
    used = {name: value for name, value in VALUES.items() if name == "w" or f" {name})" in body or f" {name}," in body}
    done = trial(
        RemoveIdentities(),
        "(float[N,4,4,4] x) => (float[N,4,4,4] y)",
        f"{body} y = MatMul(v{len(steps)}, w)",
        used,
    )
    assert done.difference() < 1e-12
    assert done.again().unchanged
    assert len(done.after.nodes) <= len(done.before.nodes)


def test_sizes_pass_through_operators() -> None:
    done = trial(
        RemoveIdentities(),
        "(float[N,3,6,6] x) => (float[N,27] y)",
        "a = Conv(x, w) b = InstanceNormalization(a, g, h) c = MaxPool<kernel_shape = [2, 2]>(b) "
        "d = BatchNormalization(c, g, h, h, g) e = Shape(d) f = Gather(e, i) j = Concat<axis = 0>(f, k) "
        "y = Reshape(d, j)",
        {"w": (3, 3, 3, 3), "g": (3,), "h": (3,), "i": [0], "k": [27]},
    )
    assert not any(node.target is SYM_SIZE for node in done.after.nodes)
    assert done.again().unchanged
