"""Resize and Upsample: every output position is a weighted sum of some input positions, axis by axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, Sizes, axis_of, ints, numbers

__all__ = ["TABLE"]

Floats = npt.NDArray[Any]
"""Numbers in one of two precisions."""
Ints = npt.NDArray[np.int64]


def _resize(
    x: Tensor,
    roi: Sequence[float] | Tensor | None = None,
    scales: Sequence[float] | Tensor | None = None,
    sizes: Sizes | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resize axes to sizes or by scales, taking the nearest value or interpolating."""
    where = [axis_of(a, x.dim()) for a in axes] if axes is not None else list(range(x.dim()))
    before = [x.shape[a] for a in where]
    wanted, factors, region = ints(sizes), numbers(scales), numbers(roi)
    if wanted:
        factors = [w / n for w, n in zip(wanted, before, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            common = (min if keep_aspect_ratio_policy == "not_larger" else max)(factors)
            factors = [common] * len(factors)
            wanted = [math.floor(common * n + 0.5) for n in before]
    elif factors:
        # In the precision that a file has its scales in: 3 times the third of 5 is 5.
        wanted = [int(np.floor(np.float32(n) * np.float32(f))) for n, f in zip(before, factors, strict=True)]
    else:
        return x
    outside = torch.zeros((), dtype=torch.bool, device=x.device)
    result = x
    for i, axis in enumerate(where):
        start, end = (region[i], region[len(where) + i]) if region else (0.0, 1.0)
        if wanted[i] == before[i] and factors[i] == 1 and (coordinate_transformation_mode != "tf_crop_and_resize"):
            continue
        dtype = np.float32 if mode == "nearest" else np.float64
        at = _coordinates(before[i], wanted[i], factors[i], start, end, coordinate_transformation_mode, dtype)
        if mode == "nearest":
            nearest = np.clip(_nearest(at, nearest_mode), 0, before[i] - 1)
            result = result.index_select(axis, torch.from_numpy(nearest).to(x.device))
        else:
            shrunk = min(factors[i], 1.0) if antialias else 1.0
            indices, weights = _taps(at, before[i], shrunk, mode, cubic_coeff_a, exclude=bool(exclude_outside))
            result = _weighted(result, axis, indices, weights)
        if coordinate_transformation_mode == "tf_crop_and_resize":
            beyond = torch.from_numpy((at < 0) | (at > before[i] - 1)).to(x.device)
            outside = outside | beyond.reshape(-1, *[1] * (x.dim() - 1 - axis))
    if coordinate_transformation_mode == "tf_crop_and_resize":
        result = torch.where(outside, torch.full_like(result, extrapolation_value), result)
    return result


def _coordinates(before: int, after: int, scale: float, start: float, end: float, mode: str, dtype: Any) -> Floats:
    """Return where each output position lies among the input's."""
    return np.asarray(_position(np.arange(after, dtype=dtype), before, after, scale, start, end, mode, dtype))


def _position(x: Any, before: int, after: int, scale: float, start: float, end: float, mode: str, dtype: Any) -> Any:
    ratio = dtype(scale)
    half = dtype(0.5)
    if mode == "half_pixel":
        return (x + half) / ratio - half
    if mode == "half_pixel_symmetric":
        # The output has whole positions only: it is centred over what the scale asks for.
        offset = dtype(before / 2 * (1 - after / (scale * before)))
        return offset + (x + half) / ratio - half
    if mode == "pytorch_half_pixel":
        return (x + half) / ratio - half if after > 1 else np.zeros(after, dtype)
    if mode == "align_corners":
        return x * dtype(before - 1) / dtype(after - 1) if after > 1 else np.zeros(after, dtype)
    if mode == "asymmetric":
        return x / ratio
    if mode == "tf_half_pixel_for_nn":
        return (x + half) / ratio
    if mode == "tf_crop_and_resize":
        if after > 1:
            return dtype(start * (before - 1)) + x * dtype((end - start) * (before - 1)) / dtype(after - 1)
        return np.full(after, 0.5 * (start + end) * (before - 1), dtype)
    raise NotImplementedError(f"Resize: unknown coordinate_transformation_mode {mode!r}")


def _nearest(at: Floats, mode: str) -> Ints:
    rounding: dict[str, Function] = {
        "round_prefer_floor": lambda a: np.ceil(a - 0.5),
        "round_prefer_ceil": lambda a: np.floor(a + 0.5),
        "floor": np.floor,
        "ceil": np.ceil,
    }
    return np.asarray(rounding[mode](at), dtype=np.int64)


def _taps(at: Floats, size: int, shrunk: float, mode: str, a: float, *, exclude: bool) -> tuple[Ints, Floats]:
    """Return which input positions an output position is made of, and their weights: (taps, positions) both.

    With ``shrunk`` below one the filter is as much wider. Positions beyond the border repeat it, or count nothing.
    """
    reach = 1 if mode == "linear" else 2
    first = math.floor(-reach / shrunk) + 1
    steps = np.arange(first, 2 - first, dtype=np.int64).reshape(-1, 1)
    # The pixel at or left of the position; one that is hit counts as the right neighbour of the one before.
    base = np.ceil(at).astype(np.int64) - 1
    distance = np.abs((steps - (at - base)) * shrunk)
    weights = np.clip(1 - distance, 0, 1) if mode == "linear" else _cubic(distance, a)
    indices = base + steps
    if shrunk < 1:
        weights = weights / weights.sum(0)
    if exclude:
        weights = np.where((indices < 0) | (indices >= size), 0, weights)
        weights = weights / weights.sum(0)
    return np.clip(indices, 0, size - 1), weights


def _cubic(x: Floats, a: float) -> Floats:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    found: Floats = np.where(x <= 1, near, np.where(x < 2, far, 0))
    return found


def _weighted(x: Tensor, axis: int, indices: Ints, weights: Floats) -> Tensor:
    """Return the sum over taps of weights times the values at the indices along an axis."""
    exact = x if x.is_floating_point() else x.float()
    shape = [-1, *[1] * (x.dim() - 1 - axis)]
    total = None
    for at, weight in zip(indices, weights, strict=True):
        if not weight.any():
            continue
        factor = torch.from_numpy(weight).to(exact.device, exact.dtype).reshape(shape)
        term = exact.index_select(axis, torch.from_numpy(at).to(x.device)) * factor
        total = term if total is None else total + term
    assert total is not None
    return total if x.is_floating_point() else total.round().to(x.dtype)


def _upsample(x: Tensor, scales: Sequence[float] | Tensor, *, mode: str = "nearest") -> Tensor:
    return _resize(x, None, scales, None, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


TABLE: Final[dict[str, Function]] = {
    "Resize": _resize,
    "Upsample": _upsample,
}
