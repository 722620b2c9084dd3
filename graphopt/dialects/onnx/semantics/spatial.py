"""Operators on the spatial dimensions of images and signals: pooling, and what undoes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, Sizes, ints, results
from graphopt.dialects.onnx.semantics.shape import pad
from graphopt.dialects.onnx.semantics.windows import Windows

__all__ = ["TABLE", "average_pool"]


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


def average_pool(
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
    norm: Tensor = torch.linalg.vector_norm(x, ord=p, dim=_spatial_dims(x), keepdim=True)
    return norm


def _nhwc_max_pool(x: Tensor, **attributes: Any) -> Tensor:
    """Pool a tensor whose channels are last."""
    found: Tensor = _max_pool(x.movedim(-1, 1), **attributes)
    return found.movedim(1, -1)


def _col2im(
    x: Tensor,
    image_shape: Sizes,
    block_shape: Sizes,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Add up patches (n, c · patch, positions) where they lie in the image."""
    image, block = ints(image_shape) or [], ints(block_shape) or []
    rank = len(image)
    channels = x.shape[1] // math.prod(block)
    windows = Windows.of(x.new_empty(1, 1, *image, device="meta"), block, strides, dilations, pads, "NOTSET")
    # Where each value goes: in each dimension by the position of its window and of itself in it.
    flat = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
    lengths = [n + b + e for n, b, e in zip(image, windows.begins, windows.ends, strict=True)]
    for k, gap, count, step, length in zip(
        block, windows.dilations, windows.counts(ceil=False), windows.strides, lengths, strict=True
    ):
        inner = torch.arange(k, device=x.device) * gap
        outer = torch.arange(count, device=x.device) * step
        at = inner.unsqueeze(-1) + outer
        flat = (flat[:, None, :, None] * length + at[None, :, None, :]).flatten(2).flatten(0, 1)
    values = x.reshape(x.shape[0], channels, -1)
    into = x.new_zeros(x.shape[0], channels, math.prod(lengths))
    summed = into.scatter_add(2, flat.reshape(1, 1, -1).expand_as(values), values).reshape(*into.shape[:2], *lengths)
    for dim in range(rank):
        summed = summed.narrow(2 + dim, windows.begins[dim], image[dim])
    return summed


def _max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Sizes | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Put values back to where MaxPool found them, in a tensor of zeros."""
    rank = len(kernel_shape)
    steps, edges = list(strides or [1] * rank), list(pads or [0] * 2 * rank)
    natural = [
        (n - 1) * step + k - edges[i] - edges[rank + i]
        for i, (n, step, k) in enumerate(zip(x.shape[2:], steps, kernel_shape, strict=True))
    ]
    inner = [*x.shape[:2], *natural]
    flat = x.new_zeros(math.prod(inner)).scatter(0, indices.reshape(-1), x.reshape(-1))
    wanted = ints(output_shape)
    unpooled = flat.reshape(inner)
    if wanted is None or wanted == inner:
        return unpooled
    return pad(unpooled, [0] * x.dim(), [w - n for w, n in zip(wanted, inner, strict=True)])


TABLE: Final[dict[str, Function]] = {
    "AveragePool": average_pool,
    "Col2Im": _col2im,
    "GlobalAveragePool": _global_average_pool,
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": _global_max_pool,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
    "MaxUnpool": _max_unpool,
    "com.microsoft.NhwcMaxPool": _nhwc_max_pool,
}
