"""Operators that move, repeat or cut values and compute nothing from them: reshapes, transposes, slices, pads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, Sizes, axis_of, ints, number, results

__all__ = ["TABLE", "pad"]


def _identity(x: Any) -> Any:
    return x


def _reshape(data: Tensor, shape: Sizes, *, allowzero: int = 0) -> Tensor:
    wanted = ints(shape) or []
    if not allowzero:
        wanted = [data.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    if -1 in wanted and 0 in wanted:
        wanted = [0 if n == -1 else n for n in wanted]  # of no values, torch cannot tell the missing size
    return data.reshape(wanted)


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis_of(axis, x.dim())
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(data: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return data.permute(list(perm) if perm is not None else list(range(data.dim()))[::-1])


def _squeeze(data: Tensor, axes: Sizes | None = None) -> Tensor:
    wanted = ints(axes)
    return data.squeeze() if wanted is None else data.squeeze(tuple(wanted))


def _unsqueeze(data: Tensor, axes: Sizes) -> Tensor:
    wanted = ints(axes) or []
    rank = data.dim() + len(wanted)
    for axis in sorted(axis_of(a, rank) for a in wanted):
        data = data.unsqueeze(axis)
    return data


def _concat(inputs: list[Tensor], *, axis: int) -> Tensor:
    # torch skips an empty vector whatever its rank, ONNX has none of another rank.
    return torch.cat(inputs, axis)


def _split(
    x: Tensor,
    split: Sizes | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    outputs: int | None = None,
) -> list[Tensor]:
    """Cut into parts of the given lengths, or into equal ones of which the last may be shorter."""
    lengths = ints(split)
    if lengths is None:
        count, size = num_outputs or outputs or 1, x.shape[axis]
        step = -(-size // count)
        lengths = [max(0, min(step, size - i * step)) for i in range(count)]
    return list(torch.split(x, lengths, axis))


def _slice(data: Tensor, starts: Sizes, ends: Sizes, axes: Sizes | None = None, steps: Sizes | None = None) -> Tensor:
    first, last = ints(starts) or [], ints(ends) or []
    where = ints(axes)
    by = ints(steps) or [1] * len(first)
    rank = data.dim()
    # Every axis is cut once, so that one index does them all.
    index = [slice(None)] * rank
    backward = []
    for axis, start, end, step in zip(range(rank) if where is None else where, first, last, by, strict=False):
        if step > 0:
            index[axis] = slice(start, end, step)
            continue
        at = range(*slice(start, end, step).indices(data.shape[axis]))[::-1]
        backward.append(axis_of(axis, rank))
        index[axis] = slice(at.start, at.stop, at.step) if len(at) else slice(0, 0)
    data = data[tuple(index)]
    return data.flip(backward) if backward else data


def _expand(x: Tensor, shape: Sizes) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(ints(shape) or ())))


def _tile(x: Tensor, repeats: Sizes) -> Tensor:
    return x.repeat(ints(repeats) or [])


def _pad(
    data: Tensor, pads: Sizes, constant_value: Any = None, axes: Sizes | None = None, *, mode: str = "constant"
) -> Tensor:
    amounts, where = ints(pads) or [], ints(axes)
    where = list(range(data.dim())) if where is None else [axis_of(a, data.dim()) for a in where]
    begins, ends = [0] * data.dim(), [0] * data.dim()
    for i, axis in enumerate(where):
        begins[axis], ends[axis] = amounts[i], amounts[len(where) + i]
    return pad(data, begins, ends, constant_value, mode)


def pad(data: Tensor, begins: Sequence[int], ends: Sequence[int], value: Any = 0, mode: str = "constant") -> Tensor:
    """Lengthen each axis at its begin and its end, or shorten it where the amount is negative.

    What is added holds ``value``, or repeats the tensor: its mirror image without the border (``reflect``), its border
    (``edge``), or the whole anew (``wrap``).
    """
    if mode == "constant":
        amounts = [n for axis in reversed(range(data.dim())) for n in (begins[axis], ends[axis])]
        if not isinstance(value, Tensor):
            filling = bool(value) if data.dtype == torch.bool else value or 0
            return F.pad(data, amounts, value=filling) if any(amounts) else data
        inside = F.pad(torch.ones_like(data, dtype=torch.bool), amounts, value=False)
        return torch.where(inside, F.pad(data, amounts), value.to(data.dtype))
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin or end:
            size = data.shape[axis]
            at = [_source(i, size, mode) for i in range(-begin, size + end)]
            data = data.index_select(axis, torch.tensor(at, dtype=torch.int64, device=data.device))
    return data


def _source(position: int, size: int, mode: str) -> int:
    """Return which position an added one repeats."""
    if mode == "edge":
        return min(max(position, 0), size - 1)
    if mode == "wrap":
        return position % size
    if mode != "reflect":
        raise NotImplementedError(f"Pad: unknown mode {mode!r}")
    period = max(2 * (size - 1), 1)
    position %= period
    return min(position, period - position) if size > 1 else 0


def _center_crop_pad(x: Tensor, shape: Sizes, *, axes: Sequence[int] | None = None) -> Tensor:
    """Bring axes to the given lengths, cutting off or adding zeros evenly on both sides."""
    begins, ends = [0] * x.dim(), [0] * x.dim()
    for axis, length in zip(range(x.dim()) if axes is None else axes, ints(shape) or [], strict=True):
        missing = length - x.shape[axis]
        # Of an odd number the larger half is added behind, and cut off behind.
        begins[axis] = missing // 2 if missing >= 0 else -(-missing // 2)
        ends[axis] = missing - begins[axis]
    return pad(x, begins, ends)


def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    depth = c // blocksize**2
    if mode == "DCR":
        return (
            x.reshape(n, blocksize, blocksize, depth, h, w)
            .permute(0, 3, 4, 1, 5, 2)
            .reshape(n, depth, h * blocksize, w * blocksize)
        )
    return F.pixel_shuffle(x, blocksize)


def _space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    cut = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return cut.permute(order).reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


def _dropout(
    data: Tensor, ratio: Any = 0.5, training_mode: Any = False, *, seed: int | None = None, outputs: int = 1
) -> Any:
    """Return the data; in training set a random part of it to zero and scale the rest up."""
    ratio = 0.5 if ratio is None else float(number(ratio))
    if not training_mode or not ratio:
        return results(outputs, data, torch.ones_like(data, dtype=torch.bool))
    kept = torch.rand_like(data, dtype=torch.float32) >= ratio
    return results(outputs, torch.where(kept, data, 0) / (1 - ratio), kept)


TABLE: Final[dict[str, Function]] = {
    "CenterCropPad": _center_crop_pad,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Identity": _identity,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
