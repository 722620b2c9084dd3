"""Operators that take axes together: sums, means, extrema and where they are, softmax, running sums."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, Sizes, axis_of, ints, number, unsigned_as_signed

__all__ = ["TABLE"]


def _reduction(function: Function) -> Function:
    """Return an operator of a function that reduces some dimensions and keeps them, of size one."""

    def reduced(data: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        wanted = ints(axes)
        if not wanted and noop_with_empty_axes:
            # One term each: what the function does to a term, such as squaring it, still happens.
            wanted, data, keepdims = [-1], data.unsqueeze(-1), 0
        dims = tuple(axis_of(a, data.dim()) for a in wanted) if wanted else tuple(range(data.dim()))
        if not dims:
            dims, data, keepdims = (0,), data.reshape(1), 0
        found: Tensor = function(data, dims)
        return found if keepdims else found.squeeze(dims)

    return unsigned_as_signed(reduced)


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims, keepdim=True, dtype=x.dtype)


def _mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    if x.is_floating_point():
        return x.mean(dims, keepdim=True)
    count = math.prod(x.shape[d] for d in dims)
    return torch.div(_sum(x, dims), count, rounding_mode="trunc").to(x.dtype)


def _product(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in dims:
        x = x.prod(dim, keepdim=True, dtype=x.dtype)
    return x


def _extremum(x: Tensor, dims: tuple[int, ...], *, largest: bool) -> Tensor:
    if x.dtype == torch.bool:
        return x.any(dims, keepdim=True) if largest else x.all(dims, keepdim=True)
    if any(x.shape[d] == 0 for d in dims):
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
        return torch.full(shape, _neutral(x.dtype, largest=largest), dtype=x.dtype, device=x.device)
    return x.amax(dims, keepdim=True) if largest else x.amin(dims, keepdim=True)


def _neutral(dtype: torch.dtype, *, largest: bool) -> float | int:
    """Return the extremum of no numbers at all."""
    if dtype.is_floating_point:
        return -math.inf if largest else math.inf
    return torch.iinfo(dtype).min if largest else torch.iinfo(dtype).max


def _max(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _extremum(x, dims, largest=True)


def _min(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _extremum(x, dims, largest=False)


def _l1(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _sum(x.abs(), dims)


def _l2(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    if x.is_floating_point():
        norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        return norm
    return _sum(x * x, dims).double().sqrt().to(x.dtype)


def _sum_of_squares(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _sum(x * x, dims)


def _log_of_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _sum(x, dims).log().to(x.dtype)


def _log_of_sum_of_exp(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    exact = x if x.is_floating_point() else x.double()
    return torch.logsumexp(exact, dims, keepdim=True).to(x.dtype)


def _argument(data: Tensor, axis: int, keepdims: int, last: int, *, largest: bool) -> Tensor:
    find: Function = torch.argmax if largest else torch.argmin
    found: Tensor = find(data.flip(axis) if last else data, axis, keepdim=bool(keepdims))
    return data.shape[axis] - 1 - found if last else found


def _argmax(data: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _argument(data, axis, keepdims, select_last_index, largest=True)


def _argmin(data: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _argument(data, axis, keepdims, select_last_index, largest=False)


def _softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return F.softmax(x, axis)


def _log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return F.log_softmax(x, axis)


def _hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Return one at the first largest value along the axis, zero elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def _bias_softmax(data: Tensor, bias: Tensor, *, axis: int = 1, is_inner_broadcast: int = 0) -> Tensor:
    """Add a bias and take the softmax over all dimensions from ``axis`` on, as one."""
    axis, x = axis_of(axis, data.dim()), data + bias
    return F.softmax(x.flatten(axis), -1).reshape(x.shape)


def _cumulative(function: Function, neutral: float) -> Function:
    def computed(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
        dim = int(number(axis))
        if reverse:
            x = x.flip(dim)
        if exclusive:
            first = torch.full_like(x.narrow(dim, 0, 1), neutral)
            x = torch.cat([first, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
        found: Tensor = function(x, dim, dtype=x.dtype)
        return found.flip(dim) if reverse else found

    return computed


TABLE: Final[dict[str, Function]] = {
    "ArgMax": _argmax,
    "ArgMin": _argmin,
    "CumProd": _cumulative(torch.cumprod, 1),
    "CumSum": _cumulative(torch.cumsum, 0),
    "Hardmax": _hardmax,
    "LogSoftmax": _log_softmax,
    "ReduceL1": _reduction(_l1),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(_log_of_sum),
    "ReduceLogSumExp": _reduction(_log_of_sum_of_exp),
    "ReduceMax": _reduction(_max),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_min),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum_of_squares),
    "Softmax": _softmax,
    "com.microsoft.BiasSoftmax": _bias_softmax,
}
