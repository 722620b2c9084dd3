"""Operators that multiply and sum: matrix products, convolutions, einsum, recurrences."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.axes.algebra import ONE, Axis
from graphopt.axes.infer import NO_ATOMS, NO_FACES, Atoms, Axes, Operator, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import broadcast, convolution, matmul
from graphopt.dialects.common import einsum_of, faces_of_matmul, frozen, mark_attention, optional
from graphopt.dialects.onnx.common import microsoft, rank_of, table, vector
from graphopt.graph import Call

FIXING_ZERO = frozenset({"Relu", "Tanh", "LeakyRelu", "HardSwish", "Elu", "Gelu", "Softsign", ""})
"""Functions that ONNX Runtime fuses into an operator and that are zero at zero."""


def _keeps_zero(call: Call) -> bool:
    return (call["activation"] or "") in FIXING_ZERO if call.has("activation") else True


# -- matrix products ------------------------------------------------------------------------------------------------


def _matmul(t: Typer, call: Call) -> Value:
    first, second = call["A"], call["B"]
    out, inner = matmul(t, t[first], t[second])
    t.contract(inner, first, second)
    mark_attention(t, first, second, out, inner)
    return out


def _zeros_of_matmul(z: Zeros, call: Call) -> Atoms:
    return z.where(call.node, faces_of_matmul(z, call.node, call["A"], call["B"]))


def _gemm(t: Typer, call: Call) -> Value:
    a, b = _sides(call, t[call["A"]], t[call["B"]])
    out, inner = matmul(t, a, b)
    t.contract(inner, call["A"], call["B"])
    c = optional(t, call["C"])
    return out if c is None else broadcast(t, out, c)


def _sides(call: Call, a: Axes, b: Axes) -> tuple[Axes, Axes]:
    """Return the axes of both factors of a Gemm as they are multiplied."""
    return a[::-1] if call["transA"] else a, b[::-1] if call["transB"] else b


def _zeros_of_gemm(z: Zeros, call: Call) -> Atoms:
    rows = (None, 0) if call["transA"] else (0, None)
    columns = (1, None) if call["transB"] else (None, 1)
    found = z.at(call.node, call["A"], rows) | z.at(call.node, call["B"], columns)
    if not _keeps_zero(call):
        return NO_ATOMS
    return z.where(call.node, found if call["C"] is None else found & z.at(call.node, call["C"]))


def _order(call: Call, side: str) -> list[int]:
    """Return where each dimension of a factor of a FusedMatMul comes from."""
    order = list(range(rank_of(call[side])))
    if call.has(f"transBatch{side}") and call[f"transBatch{side}"]:
        order.insert(len(order) - 2, order.pop(0))
    if call[f"trans{side}"] and len(order) > 1:
        order[-2:] = order[:-3:-1]
    return order


def _fused_matmul(t: Typer, call: Call) -> Value:
    """``alpha A B`` with matrices transposed, and the first dimension brought before the last but one."""
    sides = [tuple(t[call[side]][d] for d in _order(call, side)) for side in "AB"]
    out, inner = matmul(t, *sides)
    t.contract(inner, call["A"], call["B"])
    mark_attention(t, call["A"], call["B"], out, inner)
    if call.has("activation") and call["activation"] == "Softmax":
        t.freeze(out[call["activation_axis"] % len(out)], "softmax over it")
    return out


def _zeros_of_fused_matmul(z: Zeros, call: Call) -> Atoms:
    if not _keeps_zero(call):
        return NO_ATOMS
    rank, found = len(z.axes(call.node)), NO_FACES
    for side in "AB":
        own = rank_of(call[side])
        order = _order(call, side)
        place: list[int | None] = [None] * own
        for position, dim in enumerate(order):
            place[dim] = rank - own + position
        place[order[-1] if side == "A" else order[-2]] = None
        found |= z.at(call.node, call[side], place)
    return z.where(call.node, found)


# -- convolutions ---------------------------------------------------------------------------------------------------


def convolve(t: Typer, call: Call, x: Axes, weight: Axes, bias: Axes | None, shape: tuple[int, ...]) -> Axes:
    """Type a convolution of any domain and type of numbers, channels second; its operands are its first two inputs."""
    found = convolution(
        t,
        x,
        weight,
        bias,
        shape,
        groups=call["group"],
        transposed=call.name == "onnx.ConvTranspose",
        moves=_moves(call),
    )
    t.facts[call.node] = found.groups
    return _summed(t, call, found.out, found.summed)


def _summed(t: Typer, call: Call, out: Axes, summed: Axis) -> Axes:
    x, weight = (call[name] for name in (("X", "W") if call.has("X") else ("x", "w")))
    t.contract(summed, x, weight)
    return out


def _moves(call: Call) -> bool:
    """Say whether a convolution steps or pads, so that even a kernel of extent one moves its places."""
    stepping = any(s != 1 for s in call["strides"] or ())
    padding = any(p != 0 for p in call["pads"] or ()) or call["auto_pad"] not in ("NOTSET", "VALID", "")
    given = call.has("output_padding") and (any(call["output_padding"] or ()) or call["output_shape"] is not None)
    return stepping or padding or bool(given)


def _conv(t: Typer, call: Call) -> Value:
    out = convolve(t, call, t[call["X"]], t[call["W"]], optional(t, call["B"]), t.shape())
    added = optional(t, call["Z"]) if call.has("Z") else None
    return out if added is None else broadcast(t, out, added)


def _nhwc_conv(t: Typer, call: Call) -> Value:
    """Convolve ``x (n, …, c)`` with ``weight (o, …, c/groups)``."""
    x, weight, shape = t[call["X"]], t[call["W"]], t.shape()
    out = convolve(
        t,
        call,
        (x[0], x[-1], *x[1:-1]),
        (weight[0], weight[-1], *weight[1:-1]),
        optional(t, call["B"]),
        (shape[0], shape[-1], *shape[1:-1]),
    )
    return (out[0], *out[2:], out[1])


def _zeros_of_conv(z: Zeros, call: Call) -> Atoms:
    node, rank = call.node, len(z.axes(call.node))
    extents = [None] * (rank - 2)
    # The rows of a transposed weight are its groups, which stay, and channels, which are summed over.
    transposed = call.name == "onnx.ConvTranspose"
    rows = (1 if call["group"] > 1 else None, 1) if transposed else (1, None)
    found = z.at(node, call["W"], (*rows, *extents))
    found |= z.at(node, call["X"], [None if d == 1 else d for d in range(rank)])
    for name, dims in (("B", (1,)), ("Z", None)):
        if call.has(name) and call[name] is not None:
            found &= z.at(node, call[name], dims)
    return z.where(node, found) if _keeps_zero(call) else NO_ATOMS


def resize_groups(r: Resizer, call: Call) -> None:
    """Let the number of a convolution's groups follow."""
    if r.fact is not ONE and r.changed(r.fact):
        call["group"] = r.size(r.fact)


def _deform(t: Typer, call: Call) -> Value:
    """Convolve at places that an offset says; several sets of offsets belong to equal shares of the channels."""
    for name in ("offset", "mask"):
        places = optional(t, call[name])
        if places is not None:
            t.unify(places[0], t[call["X"]][0])
            for axis in places[1:]:
                t.freeze(axis, "sampled by coordinates")
    if call["offset_group"] != 1:
        t.freeze(t[call["X"]][1], "its shares have offsets of their own")
    x = t[call["X"]]
    for axis in x[2:]:
        t.freeze(axis, "sampled by coordinates")
    found = convolution(
        t, x, t[call["W"]], optional(t, call["B"]), t.shape(), groups=call["group"], transposed=False, moves=True
    )
    t.facts[call.node] = found.groups
    return _summed(t, call, found.out, found.summed)


# -- whole numbers --------------------------------------------------------------------------------------------------


def _conv_integer(t: Typer, call: Call) -> Value:
    out = convolve(t, call, t[call["x"]], t[call["w"]], None, t.shape())
    vector(t, call["w_zero_point"], t[call["w"]][0])
    return out


def _qlinear_conv(t: Typer, call: Call) -> Value:
    out = convolve(t, call, t[call["x"]], t[call["w"]], optional(t, call["B"]), t.shape())
    for name in ("w_scale", "w_zero_point"):
        vector(t, call[name], t[call["w"]][0])
    return out


def _matmul_integer(t: Typer, call: Call) -> Value:
    return _integers(t, call, "A", "B", {"a_zero_point": "A", "b_zero_point": "B"})


def _qlinear_matmul(t: Typer, call: Call) -> Value:
    return _integers(t, call, "a", "b", {"a_scale": "a", "a_zero_point": "a", "b_scale": "b", "b_zero_point": "b"}, "y")


def _integers(t: Typer, call: Call, a: str, b: str, numbers: dict[str, str], result: str = "") -> Value:
    """Multiply whole numbers; scales and zero points of A stand one a row, those of B and of the result one a column.

    Such a number for more than a row or column each freezes what it belongs to.
    """
    out, inner = matmul(t, t[call[a]], t[call[b]])
    t.contract(inner, call[a], call[b])
    for name, side in numbers.items():
        axes = t[call[side]]
        _scale(t, call[name], axes[-2] if side == a and len(axes) > 1 else axes[-1], axes)
    for name in (f"{result}_scale", f"{result}_zero_point") if result else ():
        _scale(t, call[name], out[-1] if out else ONE, out)
    return out


def _scale(t: Typer, value: Any, axis: Axis, axes: Axes) -> None:
    if not isinstance(value, fx.Node) or all(a.size == 1 for a in t[value]):
        return
    if len(t[value]) == 1:
        vector(t, value, axis)
    else:
        for each in (*t[value], *axes):
            t.freeze(each, "numbers of whole matrices")


# -- recurrences ----------------------------------------------------------------------------------------------------


_CONV = Operator(_conv, _zeros_of_conv, resize_groups)
_PRODUCT = Operator(_fused_matmul, _zeros_of_fused_matmul)
_RECURRENT = frozen("a recurrent layer packs gates, directions and layers into one width")

ENTRIES: dict[str, Operator] = {
    "MatMul": Operator(_matmul, _zeros_of_matmul),
    "Gemm": Operator(_gemm, _zeros_of_gemm),
    "Einsum": einsum_of("Inputs"),
    **microsoft(Operator(_gemm, _zeros_of_gemm), "FusedGemm"),
    **microsoft(_PRODUCT, "FusedMatMul", "TransposeMatMul", "FusedMatMulActivation"),
    **table(_CONV, "Conv", "ConvTranspose"),
    **microsoft(_CONV, "FusedConv"),
    **microsoft(Operator(_nhwc_conv, None, resize_groups), "NhwcConv"),
    "DeformConv": Operator(_deform, None, resize_groups),
    "ConvInteger": Operator(_conv_integer, None, resize_groups),
    "QLinearConv": Operator(_qlinear_conv, None, resize_groups),
    "MatMulInteger": Operator(_matmul_integer),
    "QLinearMatMul": Operator(_qlinear_matmul),
    **table(_RECURRENT, "LSTM", "GRU", "RNN"),
    "CausalConvWithState": frozen("its last positions are carried over"),
    "LinearAttention": frozen("a state of matrices is carried over"),
    **microsoft(frozen("its weights are packed, several in a byte"), "MatMulNBits"),
}
