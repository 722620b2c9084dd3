"""Operators that read an image at computed places: grids, regions of interest, deformed convolutions, boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, Sizes, ints, number
from graphopt.dialects.onnx.semantics.windows import Windows

__all__ = ["TABLE"]


def _affine_grid(theta: Tensor, size: Sizes, *, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, ints(size) or [], align_corners=bool(align_corners))


def _grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    names = {"linear": "bilinear", "cubic": "bicubic"}
    return F.grid_sample(
        x, grid, mode=names.get(mode, mode), padding_mode=padding_mode, align_corners=bool(align_corners)
    )


def _roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Pool regions (x1, y1, x2, y2) of an image to one size, from samples that are interpolated between pixels.

    With a ``sampling_ratio`` of zero there are as many samples in a bin as it is pixels long, region by region.
    """
    offset = 0.5 if coordinate_transformation_mode == "half_pixel" else 0.0
    if sampling_ratio > 0:
        return _regions(
            x,
            rois,
            batch_indices,
            offset,
            mode,
            (output_height, output_width),
            (sampling_ratio, sampling_ratio),
            spatial_scale,
        )
    if rois.is_meta:
        return x.new_empty(rois.shape[0], x.shape[1], output_height, output_width)
    pooled = []
    for i in range(rois.shape[0]):
        height, width = ((rois[i, 2:] - rois[i, :2]) * spatial_scale).flip(0).tolist()
        if not offset:
            height, width = max(height, 1.0), max(width, 1.0)
        counts = (max(math.ceil(height / output_height), 1), max(math.ceil(width / output_width), 1))
        one = slice(i, i + 1)
        pooled.append(
            _regions(
                x, rois[one], batch_indices[one], offset, mode, (output_height, output_width), counts, spatial_scale
            )
        )
    return torch.cat(pooled) if pooled else x.new_empty(0, x.shape[1], output_height, output_width)


def _regions(
    x: Tensor,
    rois: Tensor,
    batch: Tensor,
    offset: float,
    mode: str,
    size: tuple[int, int],
    counts: tuple[int, int],
    spatial_scale: float,
) -> Tensor:
    """Pool regions with the same number of samples in each of their bins."""
    places = []
    for dim, (bins, count) in enumerate(zip(size, counts, strict=True)):
        start = rois[:, 1 - dim] * spatial_scale - offset
        length = rois[:, 3 - dim] * spatial_scale - offset - start
        length = length if offset else length.clamp(min=1)
        samples = (torch.arange(bins * count, device=x.device).to(x.dtype) + 0.5) / count
        places.append(start.unsqueeze(-1) + samples * (length / bins).unsqueeze(-1))
    images = x[batch.to(torch.int64)]
    (top, down, low), (left, across, right) = (_neighbours(at, n) for at, n in zip(places, x.shape[2:], strict=True))
    found = []
    for rows, row_weight in ((top, 1 - down), (top + 1, down)):
        for columns, column_weight in ((left, 1 - across), (left + 1, across)):
            weight = row_weight.unsqueeze(-1) * column_weight.unsqueeze(-2)
            inside = (low.unsqueeze(-1) & right.unsqueeze(-2)).to(x.dtype)
            found.append(_pixels(images, rows, columns) * (weight * inside).unsqueeze(1))
    shape = (*images.shape[:2], size[0], counts[0], size[1], counts[1])
    if mode == "max":
        # Of the four weighted neighbours of all samples the largest counts, not the largest sample.
        return torch.stack(found).amax(0).reshape(shape).amax((3, 5))
    return torch.stack(found).sum(0).reshape(shape).mean((3, 5))


def _neighbours(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixel before each place, how far behind it the place is, and whether it is in the image at all."""
    inside = (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    first = at.floor().clamp(max=max(size - 2, 0))
    return first.to(torch.int64), at - first, inside


def _pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the values at all pairs of a row and a column, (n, c, rows, columns)."""
    rows, columns = rows.clamp(max=images.shape[2] - 1), columns.clamp(max=images.shape[3] - 1)
    flat = (rows.unsqueeze(-1) * images.shape[3] + columns.unsqueeze(-2)).flatten(1).unsqueeze(1)
    found = images.flatten(2).gather(2, flat.expand(-1, images.shape[1], -1))
    return found.reshape(*images.shape[:2], rows.shape[1], columns.shape[1])


def _max_roi_pool(x: Tensor, rois: Tensor, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0) -> Tensor:
    """Return the largest value in each bin of regions (batch, x1, y1, x2, y2), whose borders are whole pixels."""
    height, width = pooled_shape
    if rois.is_meta:
        return x.new_empty(rois.shape[0], x.shape[1], height, width)
    pooled = []
    for batch, *corners in rois.tolist():
        x1, y1, x2, y2 = (math.floor(c * spatial_scale + 0.5) for c in corners)
        rows, columns = (
            [
                (
                    min(max(start + math.floor(i * length / bins), 0), n),
                    min(max(start + math.ceil((i + 1) * length / bins), 0), n),
                )
                for i in range(bins)
            ]
            for start, length, bins, n in (
                (y1, max(y2 - y1 + 1, 1), height, x.shape[2]),
                (x1, max(x2 - x1 + 1, 1), width, x.shape[3]),
            )
        )
        cells = [
            x[int(batch), :, top:low, left:right].amax((1, 2))
            if low > top and right > left
            else x.new_zeros(x.shape[1])
            for top, low in rows
            for left, right in columns
        ]
        pooled.append(torch.stack(cells, 1).reshape(x.shape[1], height, width))
    return torch.stack(pooled) if pooled else x.new_empty(0, x.shape[1], height, width)


def _largest(x: Tensor) -> Tensor:
    """Return the largest value of each channel; of none it is zero."""
    return x.amax((1, 2)) if x.shape[1] and x.shape[2] else x.new_zeros(x.shape[0])


def _deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolve with taps that are moved by offsets, interpolating between pixels; outside the image all is zero."""
    if x.dim() != 4:
        raise NotImplementedError("DeformConv over other than two spatial dimensions")
    windows = Windows.of(x, weight.shape[2:], strides, dilations, pads, "NOTSET")
    rows, columns = windows.counts(ceil=False)
    taps = math.prod(windows.kernel)
    n, c = x.shape[:2]
    moved = offset.reshape(n, offset_group, taps, 2, rows, columns)
    tap_rows, tap_columns = torch.meshgrid(
        *(torch.arange(k, device=x.device) * d for k, d in zip(windows.kernel, windows.dilations, strict=True)),
        indexing="ij",
    )
    places = []
    for dim, (count, tap) in enumerate(((rows, tap_rows), (columns, tap_columns))):
        base = torch.arange(count, device=x.device) * windows.strides[dim] - windows.begins[dim]
        base = base.reshape((-1, 1) if dim == 0 else (1, -1)) + tap.reshape(-1, 1, 1)
        # grid_sample counts from -1 to 1, from the outer border of the first pixel to that of the last.
        places.append(((base + moved[:, :, :, dim]) * 2 + 1) / x.shape[2 + dim] - 1)
    grid = torch.stack([places[1], places[0]], -1).reshape(n * offset_group, taps * rows, columns, 2)
    found = F.grid_sample(
        x.reshape(n * offset_group, c // offset_group, *x.shape[2:]), grid, padding_mode="zeros", align_corners=False
    ).reshape(n, offset_group, c // offset_group, taps, rows, columns)
    if mask is not None:
        found = found * mask.reshape(n, offset_group, 1, taps, rows, columns)
    patches = found.reshape(n, group, c // group * taps, rows * columns)
    kernel = weight.reshape(group, weight.shape[0] // group, -1)
    y = torch.einsum("gok,ngkp->ngop", kernel, patches).reshape(n, weight.shape[0], rows, columns)
    return y if bias is None else y + bias.reshape(-1, 1, 1)


def _non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Any = None,
    iou_threshold: Any = None,
    score_threshold: Any = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Return (batch, class, box) of the best boxes that overlap no better one by more than a threshold."""
    most = 0 if max_output_boxes_per_class is None else int(number(max_output_boxes_per_class))
    overlap = 0.0 if iou_threshold is None else float(number(iou_threshold))
    least = None if score_threshold is None else float(number(score_threshold))
    corners = boxes
    if center_point_box:
        centre, half = boxes[..., :2], boxes[..., 2:] / 2
        corners = torch.cat([centre - half, centre + half], -1)
    low = torch.minimum(corners[..., :2], corners[..., 2:])
    high = torch.maximum(corners[..., :2], corners[..., 2:])
    if boxes.is_meta:
        raise NotImplementedError("the boxes decide how many are chosen")
    chosen = [
        [batch, kind, box]
        for batch in range(scores.shape[0])
        for kind in range(scores.shape[1])
        for box in _suppressed(low[batch], high[batch], scores[batch, kind], most, overlap, least)
    ]
    return torch.tensor(chosen, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _suppressed(low: Tensor, high: Tensor, scores: Tensor, most: int, overlap: float, least: float | None) -> list[int]:
    order = torch.sort(scores, descending=True, stable=True).indices
    if least is not None:
        order = order[scores[order] > least]
    common = torch.minimum(high.unsqueeze(0), high.unsqueeze(1)) - torch.maximum(low.unsqueeze(0), low.unsqueeze(1))
    common = common.clamp(min=0).prod(-1)
    area = (high - low).prod(-1)
    union = area.unsqueeze(0) + area.unsqueeze(1) - common
    over = (torch.where(union > 0, common / union, 0) > overlap).tolist()
    kept: list[int] = []
    for box in order.tolist():
        if len(kept) >= most:
            break
        if not any(over[box][other] for other in kept):
            kept.append(box)
    return kept


TABLE: Final[dict[str, Function]] = {
    "AffineGrid": _affine_grid,
    "DeformConv": _deform_conv,
    "GridSample": _grid_sample,
    "MaxRoiPool": _max_roi_pool,
    "NonMaxSuppression": _non_max_suppression,
    "RoiAlign": _roi_align,
}
