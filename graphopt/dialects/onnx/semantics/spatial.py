"""Operators on the spatial dimensions of images and signals: pooling, resizing, patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, results
from graphopt.dialects.onnx.semantics.windows import Windows

__all__ = ["TABLE"]


def _max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    outputs: int = 1,
) -> Any:
    """Return the largest value of each window, and where it is in the whole tensor taken as one vector."""
    windows = Windows.of(x, kernel_shape, strides, dilations, pads, auto_pad)
    exact = x if x.is_floating_point() else x.double()
    pool: Function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel_shape)]
    padded = windows.padded(exact, -math.inf, ceil=bool(ceil_mode))
    if outputs == 1:
        y = pool(padded, windows.kernel, windows.strides, 0, windows.dilations)
        return y.to(x.dtype)
    y, at = pool(padded, windows.kernel, windows.strides, 0, windows.dilations, return_indices=True)
    return results(outputs, y.to(x.dtype), _unpadded(at, x, padded, windows.begins, by_column=bool(storage_order)))


def _unpadded(at: Tensor, x: Tensor, padded: Tensor, begins: Sequence[int], *, by_column: bool) -> Tensor:
    """Turn indices into the spatial dimensions of the padded input into indices into all of the input."""
    strides = [math.prod(x.shape[d + 1 :]) for d in range(2, x.dim())]
    if by_column:
        strides = [math.prod(x.shape[2:d]) for d in range(2, x.dim())]
    found = torch.zeros_like(at)
    rest = at
    for size, begin, stride in reversed(list(zip(padded.shape[2:], begins, strides, strict=True))):
        found = found + (rest % size - begin) * stride
        rest = rest // size
    planes = torch.arange(math.prod(x.shape[:2]), device=x.device) * math.prod(x.shape[2:])
    return found + planes.reshape(*x.shape[:2], *[1] * (x.dim() - 2))


def _average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the mean of each window: over the input's values in it, and the pads' zeros if those count."""
    windows = Windows.of(x, kernel_shape, strides, dilations, pads, auto_pad)
    ceil = bool(ceil_mode)
    padded = windows.padded(x, ceil=ceil)
    if padded.shape == x.shape or (count_include_pad and windows.counts(ceil=True) == windows.counts(ceil=False)):
        return _sums(padded, windows) / math.prod(windows.kernel)
    ones = torch.ones_like(x[:1, :1])
    counted = _sums(windows.padded(ones, ceil=ceil, pads=1 if count_include_pad else None), windows)
    return _sums(padded, windows) / counted


def _sums(padded: Tensor, windows: Windows) -> Tensor:
    """Return the sum over each window of an input that is padded already."""
    if all(d == 1 for d in windows.dilations) and len(windows.kernel) <= 3:
        pool: Function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(windows.kernel)]
        mean: Tensor = pool(padded, windows.kernel, windows.strides)
        return mean * math.prod(windows.kernel)
    for dim, (k, step, gap) in enumerate(zip(windows.kernel, windows.strides, windows.dilations, strict=True), 2):
        padded = padded.unfold(dim, gap * (k - 1) + 1, step)[..., ::gap].sum(-1)
    return padded


def _lp_pool(x: Tensor, *, kernel_shape: Sequence[int], p: int = 2, ceil_mode: int = 0, **attributes: Any) -> Tensor:
    windows = Windows.of(
        x,
        kernel_shape,
        attributes.get("strides"),
        attributes.get("dilations"),
        attributes.get("pads"),
        attributes.get("auto_pad", "NOTSET"),
    )
    return torch.pow(_sums(windows.padded(x.abs() ** p, ceil=bool(ceil_mode)), windows), 1 / p)


def _spatial_dims(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def _global_average_pool(x: Tensor) -> Tensor:
    return x.mean(_spatial_dims(x), keepdim=True) if x.dim() > 2 else x


def _global_max_pool(x: Tensor) -> Tensor:
    return x.amax(_spatial_dims(x), keepdim=True) if x.dim() > 2 else x


def _global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    return torch.linalg.vector_norm(x, ord=p, dim=_spatial_dims(x), keepdim=True)


TABLE: Final[dict[str, Function]] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": _global_max_pool,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
}
