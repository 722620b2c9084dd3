"""Sequences and optional values: Python lists of tensors, and None."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, ints, number

__all__ = ["TABLE"]


def _construct(inputs: list[Tensor]) -> list[Tensor]:
    return list(inputs)


def _empty(*, dtype: int | None = None) -> list[Tensor]:
    return []


def _at(sequence: list[Tensor], position: Any) -> Tensor:
    return sequence[int(number(position))]


def _length(sequence: list[Tensor]) -> Tensor:
    return torch.tensor(len(sequence), dtype=torch.int64)


def _insert(sequence: list[Tensor], tensor: Tensor, position: Any = None) -> list[Tensor]:
    at = len(sequence) if position is None else int(number(position))
    at += len(sequence) if at < 0 else 0
    return [*sequence[:at], tensor, *sequence[at:]]


def _erase(sequence: list[Tensor], position: Any = None) -> list[Tensor]:
    at = -1 if position is None else int(number(position))
    at += len(sequence) if at < 0 else 0
    return [*sequence[:at], *sequence[at + 1 :]]


def _concat(sequence: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


def _split(x: Tensor, split: Any = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    """Cut into parts of the given lengths or of one length; without either, into single positions."""
    if split is None:
        return list(x.split(1, axis) if keepdims else x.unbind(axis))
    if isinstance(split, Tensor) and split.dim() == 0:
        return list(x.split(int(number(split)), axis))
    return list(x.split(split if isinstance(split, int) else ints(split), axis))


def _optional(value: Any = None, *, type: Any = None) -> Any:
    return value


def _has_element(value: Any = None) -> Tensor:
    return torch.tensor(value is not None)


def _get_element(value: Any) -> Any:
    return value


TABLE: Final[dict[str, Function]] = {
    "ConcatFromSequence": _concat,
    "Optional": _optional,
    "OptionalGetElement": _get_element,
    "OptionalHasElement": _has_element,
    "SequenceAt": _at,
    "SequenceConstruct": _construct,
    "SequenceEmpty": _empty,
    "SequenceErase": _erase,
    "SequenceInsert": _insert,
    "SequenceLength": _length,
    "SplitToSequence": _split,
}
