"""Operators that act on space and pass channels through: pooling, resampling, sampling by coordinates."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.axes.infer import Operator, Typer, Value
from graphopt.dialects.aten.common import table
from graphopt.dialects.common import over_space, zeros_of_first
from graphopt.graph import Call

aten = torch.ops.aten


def _over_space(rank: int) -> Operator:
    """Keep all but the last ``rank`` dimensions, which are new and frozen."""

    def type_(t: Typer, call: Call) -> Value:
        return over_space(t, call, t[call.node.args[0]], rank)

    return Operator(type_, zeros_of_first)


def _grid_sample(t: Typer, call: Call) -> Value:
    x, grid = t[call["input"]], t[call["grid"]]
    for axis in (*x[2:], *grid[1:]):
        t.freeze(axis, "sampled by coordinates")
    t.unify(x[0], grid[0])
    return (*x[:2], *t.opaque(t.shape()[2:], "a spatial dimension"))


OPERATORS: dict[Any, Operator] = {
    **table(
        _over_space(1),
        *("max_pool1d.default", "max_pool1d_with_indices.default", "avg_pool1d.default", "adaptive_avg_pool1d.default"),
        *("adaptive_max_pool1d.default", "upsample_nearest1d", "upsample_linear1d"),
    ),
    **table(
        _over_space(2),
        *("max_pool2d.default", "max_pool2d_with_indices.default", "avg_pool2d.default", "adaptive_avg_pool2d.default"),
        *("adaptive_max_pool2d.default", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
        *("_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad2d.default"),
        *("replication_pad2d.default", "_adaptive_avg_pool2d.default"),
    ),
    **table(
        _over_space(3),
        *("max_pool3d.default", "max_pool3d_with_indices.default", "avg_pool3d.default", "adaptive_avg_pool3d.default"),
        *("adaptive_max_pool3d.default", "upsample_nearest3d", "upsample_trilinear3d"),
    ),
    **table(
        Operator(_grid_sample, zeros_of_first),
        "grid_sampler.default",
        "grid_sampler_2d.default",
        "grid_sampler_3d.default",
    ),
}
