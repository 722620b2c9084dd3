"""Operators that act on space and pass channels through: pooling, resampling, sampling by coordinates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphopt.axes.infer import Operator, Resizer, Typer, Value
from graphopt.dialects.common import (
    are_used,
    dims_of,
    freeze_operands,
    frozen,
    opaque,
    operands,
    over_space,
    zeros_of_first,
)
from graphopt.dialects.onnx.common import BY_DATA, is_given, table
from graphopt.graph import Call


def _pool(t: Typer, call: Call) -> Value:
    """Pass batch and channels; positions in the whole tensor, where they are used, keep it whole."""
    x = t[call["X"]]
    if are_used(call, 1):
        for axis in x:
            t.freeze(axis, "its entries are numbered")
    return over_space(t, call, x, len(x) - 2)


def _resample(t: Typer, call: Call) -> Value:
    """Pass the dimensions that are not scaled; the others are places."""
    given = [name for name in ("roi", "scales", "sizes") if call.has(name)]
    if not all(is_given(call[name]) for name in given):
        freeze_operands(t, call, BY_DATA)
        return opaque(t, call, BY_DATA)
    x, shape = t[call["X"]], t.shape()
    scaled = _scaled_dims(call, shape)
    for d in scaled:
        t.freeze(x[d], "a spatial dimension")
    return tuple(t.fixed(shape[d], "a spatial dimension") if d in scaled else a for d, a in enumerate(x))


def _scaled_dims(call: Call, shape: Sequence[int]) -> list[int]:
    """Return the dimensions whose positions move: where a part is cropped, all that are named."""
    rank = len(shape)
    dims = dims_of(call["axes"], rank) if call.has("axes") else list(range(rank))
    cropping = call.has("coordinate_transformation_mode") and "crop" in call["coordinate_transformation_mode"]
    fitting = call.has("keep_aspect_ratio_policy") and call["keep_aspect_ratio_policy"] != "stretch"
    if cropping or fitting:
        return dims
    if call["scales"]:
        return [d for d, scale in zip(dims, call["scales"], strict=True) if isinstance(scale, fx.Node) or scale != 1]
    before = call.spec("X").shape
    return [d for d in dims if before[d] != shape[d]]


def _resize_resample(r: Resizer, call: Call) -> None:
    if call.has("sizes") and call["sizes"] and is_given(call["sizes"]):
        axes = r.axes(call.node)
        call["sizes"] = r.entries(call, call["sizes"], [axes[d] for d in dims_of(call["axes"], len(axes))])


def _sample(t: Typer, call: Call) -> Value:
    """Sample ``x (n, c, …)`` at coordinates ``grid (n, …, d)``."""
    x, grid = t[call["X"]], t[call["grid"]]
    for axis in (*x[2:], *grid[1:]):
        t.freeze(axis, "sampled by coordinates")
    t.unify(x[0], grid[0])
    return (*x[:2], *t.opaque(t.shape()[2:], "a spatial dimension"))


def _regions(t: Typer, call: Call) -> Value:
    """Sample regions of images: ``x (n, c, h, w)`` and ``k`` regions give ``(k, c, …)``."""
    x = t[call["X"]]
    for node in operands(call)[1:]:
        for axis in t[node]:
            t.freeze(axis, "sampled by coordinates")
    for axis in (x[0], *x[2:]):
        t.freeze(axis, "sampled by coordinates")
    shape = t.shape()
    return (t.fixed(shape[0], "regions"), x[1], *t.opaque(shape[2:], "a spatial dimension"))


_POOL = Operator(_pool, zeros_of_first)
_RESAMPLE = Operator(_resample, zeros_of_first, _resize_resample)
_REGIONS = Operator(_regions, zeros_of_first)

ENTRIES: dict[str, Operator] = {
    **table(_POOL, "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
    **table(_RESAMPLE, "Resize", "Upsample"),
    "GridSample": Operator(_sample, zeros_of_first),
    **table(_REGIONS, "RoiAlign", "MaxRoiPool"),
    **table(frozen("its entries are put by number"), "MaxUnpool"),
    **table(frozen("a grid of coordinates"), "AffineGrid"),
    **table(frozen("a transform over it"), "DFT", "STFT", "MelWeightMatrix"),
    **table(frozen("a determinant of it"), "Det"),
}
