"""Normalisations and softmax: operators whose result at one index depends on the others."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.axes.algebra import Axis, leaves
from graphopt.axes.infer import Atoms, Operator, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import broadcast
from graphopt.dialects.aten.common import dims_of, optional, table
from graphopt.graph import Call

aten = torch.ops.aten


def _batch_norm(t: Typer, call: Call) -> Value:
    """Tie the channel axis with all five vectors; batch statistics also normalise over every other axis."""
    x = t[call["input"]]
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = optional(t, call[name])
        if vector is not None:
            t.unify(x[1], vector[0])
    for d in _measured_dims(call, len(x)):
        t.normalise(x[d])
    return x


def _measured_dims(call: Call, rank: int) -> list[int]:
    """Return the dimensions over which a batch or instance norm takes its own statistics, which may be none."""
    if call.has("use_input_stats"):
        return list(range(2, rank)) if call["use_input_stats"] else []
    measured = bool(call["training"]) or call["running_mean"] is None
    return [d for d in range(rank) if d != 1] if measured else []


def _zeros_of_batch_norm(z: Zeros, call: Call) -> Atoms:
    centred = z.outside(call["input"], _measured_dims(call, len(z.axes(call["input"]))))
    if call["running_mean"] is not None:
        centred = z.every(centred, call["running_mean"])
    scaled = z.some(centred, call["weight"])
    return z.every(scaled, call["bias"])


def _layer_norm(t: Typer, call: Call) -> Value:
    """Normalise over the last dimensions, which weight and bias share."""
    x = t[call["input"]]
    rank = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        affine = optional(t, call[name]) if call.has(name) else None
        if affine is not None:
            broadcast(t, affine, x[-rank:])
    for axis in x[-rank:]:
        t.normalise(axis)
    return x


def _zeros_of_layer_norm(z: Zeros, call: Call) -> Atoms:
    rank = len(call["normalized_shape"])
    dims = [-d for d in range(1, rank + 1)]
    scaled = z.some(z.outside(call["input"], dims), call["weight"])
    return z.every(scaled, call["bias"] if call.has("bias") else None)


def _resize_layer_norm(r: Resizer, call: Call) -> None:
    shape = call["normalized_shape"]
    call["normalized_shape"] = r.entries(call, shape, r.axes(call["input"])[-len(shape) :])


def _group_norm(t: Typer, call: Call) -> Value:
    """Normalise over space inside each group: whole groups go exactly, channels inside all groups renormalise."""
    x = t[call["input"]]
    groups, inner = t.split(x[1], call["num_groups"])
    for name in ("weight", "bias"):
        affine = optional(t, call[name])
        if affine is not None:
            t.unify(affine[0], x[1])
    for axis in (inner, *x[2:]):
        t.normalise(axis)
    t.mark(groups, "norm groups")
    t.facts[call.node] = (groups, inner)
    return x


def _zeros_of_group_norm(z: Zeros, call: Call) -> Atoms:
    channels: Axis = z.axes(call["input"])[1]
    inside = _inner_atoms(channels, call["num_groups"])
    scaled = z.some(z.outside(call["input"], range(2, len(z.axes(call["input"])))) - inside, call["weight"])
    return z.every(scaled, call["bias"])


def _inner_atoms(channels: Axis, groups: int) -> Atoms:
    """Return the atoms that one group normalises over: those inside the outermost ``groups`` rows."""
    if groups == channels.size:
        return frozenset()
    outer = 1
    factors = getattr(channels, "factors", None)
    if groups == 1 or factors is None:
        return frozenset(leaves(channels))
    inside: set[Any] = set()
    for factor in factors:
        if outer >= groups:
            inside.update(leaves(factor))
        outer *= factor.size
    return frozenset(inside)


def _resize_group_norm(r: Resizer, call: Call) -> None:
    groups, _ = r.fact
    if r.changed(groups):
        call["num_groups"] = r.size(groups)


def _softmax(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    for d in dims_of(call["dim"], len(x)):
        t.freeze(x[d], "softmax over it")
    return x


OPERATORS: dict[Any, Operator] = {
    aten.batch_norm.default: Operator(_batch_norm, _zeros_of_batch_norm),
    aten.instance_norm.default: Operator(_batch_norm, _zeros_of_batch_norm),
    aten.layer_norm.default: Operator(_layer_norm, _zeros_of_layer_norm, _resize_layer_norm),
    aten.rms_norm.default: Operator(_layer_norm, _zeros_of_layer_norm, _resize_layer_norm),
    aten.group_norm.default: Operator(_group_norm, _zeros_of_group_norm, _resize_group_norm),
    **table(Operator(_softmax), "softmax.int", "log_softmax.int", "_softmax.default", "_log_softmax.default"),
}
