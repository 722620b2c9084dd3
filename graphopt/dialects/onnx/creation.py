"""Operators that make tensors from sizes: constants, ranges, random values."""

from __future__ import annotations

from typing import Any

from graphopt.axes.infer import NO_ATOMS, Atoms, Operator, Resizer, Typer, Value, Zeros
from graphopt.dialects.common import freeze_operands, frozen, opaque, resize_shape, uniform
from graphopt.dialects.onnx.common import BY_DATA, is_given, table
from graphopt.graph import Call


def _filled(t: Typer, call: Call) -> Value:
    if not is_given(call["input"]):
        freeze_operands(t, call, BY_DATA)
        return opaque(t, call, BY_DATA)
    return uniform(t, call)


def _resize_filled(r: Resizer, call: Call) -> None:
    if is_given(call["input"]):
        call["input"] = r.entries(call, call["input"], r.axes(call.node))


def _zeros_of_filled(z: Zeros, call: Call) -> Atoms:
    """Find it zero everywhere where zero is the value, as it is when none is given."""
    return z.atoms(call.node) if _is_null(call["value"]) else NO_ATOMS


def _is_null(value: Any) -> bool:
    if value is None:
        return True
    from graphopt.dialects.onnx.semantics.common import as_tensor

    return not bool(as_tensor(value).any())


ENTRIES: dict[str, Operator] = {
    "ConstantOfShape": Operator(_filled, _zeros_of_filled, _resize_filled),
    **table(Operator(uniform, None, resize_shape("shape")), "RandomNormal", "RandomUniform"),
    **table(
        frozen("its entries are numbered"),
        *("Constant", "Range", "EyeLike", "HannWindow", "HammingWindow", "BlackmanWindow"),
    ),
}
