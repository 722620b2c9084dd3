"""Operators that pick values by index or condition, or put them there: gathers, scatters, sorting."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import UNSIGNED, Function, axis_of, number, results, unsigned_as_signed

__all__ = ["TABLE"]


def _from_front(indices: Tensor, size: int) -> Tensor:
    """Return indices counted from the front; negative ones count from the back."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def _gather(data: Tensor, indices: Any, *, axis: int = 0) -> Tensor:
    axis = axis_of(axis, data.dim())
    if isinstance(indices, int):
        return data.select(axis, indices)
    at = _from_front(torch.as_tensor(indices, device=data.device), data.shape[axis])
    found = data.index_select(axis, at.reshape(-1))
    return found.reshape((*data.shape[:axis], *at.shape, *data.shape[axis + 1 :]))


def _gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(data, axis, _from_front(indices, data.shape[axis]))


def _flat_indices(indices: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return one index for each tuple of them, into the dimensions of these sizes taken as one."""
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for i, size in enumerate(sizes):
        flat = flat * size + _from_front(indices[..., i], size)
    return flat


def _gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    batch, depth = tuple(data.shape[:batch_dims]), indices.shape[-1]
    indexed, rest = tuple(data.shape[batch_dims : batch_dims + depth]), data.shape[batch_dims + depth :]
    flat = _flat_indices(indices, indexed)
    if batch_dims:
        blocks = torch.arange(math.prod(batch), device=data.device).reshape(*batch, *[1] * (flat.dim() - batch_dims))
        flat = flat + blocks * math.prod(indexed)
    return data.reshape(-1, *rest)[flat]


_REDUCTIONS: Final = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    at = _from_front(indices, data.shape[axis])
    if reduction == "none":
        return data.scatter(axis, at, updates)
    return data.scatter_reduce(axis, at, updates, _REDUCTIONS[reduction], include_self=True)


def _scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    depth = indices.shape[-1]
    flat = _flat_indices(indices, tuple(data.shape[:depth])).reshape(-1)
    rows = data.reshape(-1, *data.shape[depth:]) if depth else data.unsqueeze(0)
    values = updates.reshape(-1, *data.shape[depth:])
    if reduction == "none":
        done = rows.index_put((flat,), values)
    elif reduction == "add":
        done = rows.index_put((flat,), values, accumulate=True)
    else:
        at = flat.reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
        done = rows.scatter_reduce(0, at, values, _REDUCTIONS[reduction], include_self=True)
    return done.reshape(data.shape)


def _top_k(x: Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1, outputs: int = 1) -> Any:
    """Return the largest or smallest values and their indices; of equal values the first comes first."""
    signed = x.to(torch.int64) if x.dtype in UNSIGNED else x
    values, indices = torch.sort(signed, dim=axis, descending=bool(largest), stable=True)
    return results(outputs, *(t.narrow(axis, 0, int(number(k))) for t in (values.to(x.dtype), indices)))


def _one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int = -1) -> Tensor:
    size = int(number(depth))
    axis = axis_of(axis, indices.dim() + 1)
    positions = torch.arange(size, device=indices.device).reshape(-1, *[1] * (indices.dim() - axis))
    hit = _from_front(indices, size).unsqueeze(axis) == positions
    return torch.where(hit, values[1], values[0])


def _non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).t().contiguous()


def _compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition.bool()).reshape(-1))


def _trilu(x: Tensor, k: Any = None, *, upper: int = 1) -> Tensor:
    offset = 0 if k is None else int(number(k))
    return torch.triu(x, offset) if upper else torch.tril(x, offset)


def _unique(x: Tensor, *, axis: int | None = None, sorted: int = 1, outputs: int = 1) -> Any:
    """Return the distinct values, where each is first, which of them each value is, and how often each occurs."""
    values, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    inverse = inverse.reshape(-1)
    places = torch.arange(inverse.numel(), device=x.device)
    first = torch.full_like(counts, inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not sorted:
        order = torch.argsort(first)
        rank = torch.argsort(order)
        values = values.index_select(0 if axis is None else axis, order)
        first, counts, inverse = first[order], counts[order], rank[inverse]
    return results(outputs, values, first, inverse, counts)


def _reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Reverse the first positions of each row, as many as its length says."""
    shape = [1] * x.dim()
    shape[time_axis] = -1
    time = torch.arange(x.shape[time_axis], device=x.device).reshape(shape)
    shape[time_axis], shape[batch_axis] = 1, -1
    ends = lengths.reshape(shape)
    at = torch.where(time < ends, ends - 1 - time, time)
    return torch.gather(x, time_axis, at.expand_as(x))


_BY_INDEX: Final[dict[str, Function]] = {
    "Compress": _compress,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "ReverseSequence": _reverse_sequence,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Trilu": _trilu,
    "Unique": _unique,
    "com.microsoft.Trilu": _trilu,
}

TABLE: Final[dict[str, Function]] = {
    "OneHot": _one_hot,
    "Scatter": _scatter_elements,
    "TopK": _top_k,
    **{name: unsigned_as_signed(function) for name, function in _BY_INDEX.items()},
}
