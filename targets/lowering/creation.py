"""Translate operators that make tensors from sizes and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt.dialects.aten.common import overloads
from graphopt.graph import Call
from graphopt.targets.lowering.elementwise import Translation
from graphopt.targets.lowering.emitter import Emitter, Value, out_spec

aten = torch.ops.aten


def _filled(value: Callable[[Call], Any]) -> Translation:
    """Translate a tensor of one value, of a given size or of the size of the first argument."""

    def translate(e: Emitter, call: Call) -> Value:
        result = out_spec(call.node)
        content = e.operand(value(call), result.dtype)
        if call.has("size"):
            sizes: list[Any] = [
                entry if dynamic else size
                for entry, size, dynamic in zip(call["size"], result.shape, result.dynamic, strict=True)
            ]
        else:
            sizes = e.shape(e[call["self"]], call.spec("self")) if any(result.dynamic) else list(result.shape)
        return e.expand(content, sizes) if sizes else content

    return translate


def _arange(e: Emitter, call: Call) -> Value:
    """Translate a range; ONNX wants its bounds without dimensions, and all of one type."""
    dtype = out_spec(call.node).dtype
    start = call["start"] if call.has("start") else 0
    step = call["step"] if call.has("step") else 1
    inner = dtype if dtype in (torch.float32, torch.float64, torch.int16, torch.int32, torch.int64) else torch.float32
    found = e("Range", *(e.operand(value, inner) for value in (start, call["end"], step)))
    return e.cast(found, inner, dtype)


def _linspace(e: Emitter, call: Call) -> Value:
    """Translate ``steps`` numbers from start to end, counted from the nearer end, as torch does."""
    dtype = out_spec(call.node).dtype
    start, end = e.operand(call["start"], dtype), e.operand(call["end"], dtype)
    steps = e.squeeze(e.size(call["steps"]), 0)
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    counted = e.cast(e("Range", zero, steps, one), torch.int64, dtype)
    last = e.cast(e("Sub", steps, one), torch.int64, dtype)
    width = e("Div", e("Sub", end, start), e("Max", last, e.constant(1, dtype)))
    rising = e("Add", start, e("Mul", width, counted))
    falling = e("Sub", end, e("Mul", width, e("Sub", last, counted)))
    return e("Where", e("Less", e("Add", counted, counted), e("Add", last, e.constant(1, dtype))), rising, falling)


def _scalar(e: Emitter, call: Call) -> Value:
    return e.operand(call["s"], out_spec(call.node).dtype)


def _eye(e: Emitter, call: Call) -> Value:
    dtype = out_spec(call.node).dtype
    rows = call["n"]
    columns = call["m"] if call.has("m") else rows
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    first, second = (e("Range", zero, e.squeeze(e.size(n), 0), one) for n in (rows, columns))
    return e.cast(e("Equal", e.unsqueeze(first, 1), second), torch.bool, dtype)


def _table(translation: Translation, *names: str) -> dict[Any, Translation]:
    return dict.fromkeys(overloads(*names), translation)


TRANSLATIONS: dict[Any, Translation] = {
    **_table(_filled(lambda call: 0), "zeros.default", "zeros_like.default", "new_zeros.default"),
    **_table(_filled(lambda call: 0), "empty.memory_format", "empty_like.default", "new_empty.default"),
    **_table(_filled(lambda call: 1), "ones.default", "ones_like.default", "new_ones.default"),
    **_table(_filled(lambda call: call["fill_value"]), "full.default", "full_like.default", "new_full.default"),
    **_table(_arange, "arange.default", "arange.start", "arange.start_step"),
    **_table(_linspace, "linspace.default"),
    **_table(_scalar, "scalar_tensor.default"),
    **_table(_eye, "eye.default", "eye.m"),
}
