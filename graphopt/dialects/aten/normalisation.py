"""Normalisations and softmax: operators whose result at one index depends on the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.axes.algebra import Axis, product
from graphopt.axes.infer import Atoms, Axes, Faces, Operator, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import broadcast, drop
from graphopt.dialects.aten.common import CHOOSING, table
from graphopt.dialects.common import atoms_inside, dims_of, faces_outside, is_routed, optional
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
    node, x = call.node, call["input"]
    dims = _measured_dims(call, len(z.axes(x)))
    centred = faces_outside(z, node, x, dims)
    if call["running_mean"] is not None:
        centred &= z.at(node, call["running_mean"], (1,))
    return z.where(node, _scaled(z, call, centred, (1,)))


def _scaled(z: Zeros, call: Call, faces: Faces, dims: Sequence[int] | None) -> Faces:
    """Return where the result is zero, when scaled by a weight and shifted by a bias of these dimensions."""
    found = faces | z.at(call.node, call["weight"], dims)
    bias = call["bias"] if call.has("bias") else None
    return found if bias is None else found & z.at(call.node, bias, dims)


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
    rank = len(z.axes(call["input"]))
    found = faces_outside(z, call.node, call["input"], range(rank - len(call["normalized_shape"]), rank))
    return z.where(call.node, _scaled(z, call, found, None))


def _resize_layer_norm(r: Resizer, call: Call) -> None:
    shape = call["normalized_shape"]
    call["normalized_shape"] = r.entries(call, shape, r.axes(call["input"])[-len(shape) :])


def _group_norm(t: Typer, call: Call) -> Value:
    """Normalise over space inside each group: whole groups go exactly, channels inside all groups renormalise."""
    x = t[call["input"]]
    _normalised_groups(t, call, x, call["num_groups"])
    return x


def _normalised_groups(t: Typer, call: Call, x: Axes, count: int) -> Axis:
    groups, inner = t.split(x[1], count)
    for name in ("weight", "bias"):
        affine = optional(t, call[name])
        if affine is not None:
            t.unify(affine[0], x[1])
    for axis in (inner, *x[2:]):
        t.normalise(axis)
    t.mark(groups, "norm groups")
    t.facts[call.node] = (groups, inner)
    return groups


def _zeros_of_group_norm(z: Zeros, call: Call) -> Atoms:
    axes = z.axes(call["input"])
    inside = atoms_inside(axes[1], call["num_groups"])
    outside = faces_outside(z, call.node, call["input"], range(2, len(axes)))
    found = frozenset(face for face in outside if face[0] not in inside)
    return z.where(call.node, _scaled(z, call, found, (1,)))


def _resize_group_norm(r: Resizer, call: Call) -> None:
    groups, _ = r.fact
    if r.changed(groups):
        call["num_groups"] = r.size(groups)


# -- as decompositions leave them: a result with its statistics --


def _native_batch_norm(t: Typer, call: Call) -> Value:
    """Tie channels with the vectors, as in evaluation; the statistics it returns are empty."""
    x = t[call["input"]]
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = optional(t, call[name])
        if vector is not None:
            t.unify(x[1], vector[0])
    return [x, t.opaque((0,), "empty"), t.opaque((0,), "empty")]


def _native_layer_norm(t: Typer, call: Call) -> Value:
    x = t[call["input"]]
    measured = range(len(x) - len(call["normalized_shape"]), len(x))
    kept = drop(x, measured, keepdim=True)
    return [_layer_norm(t, call), kept, kept]


def _native_group_norm(t: Typer, call: Call) -> Value:
    x = t[call["input"]]
    groups = _normalised_groups(t, call, x, call["group"])
    return [x, (x[0], groups), (x[0], groups)]


def _resize_native_group_norm(r: Resizer, call: Call) -> None:
    x = r.axes(call["input"])
    for name, axis in (("N", x[0]), ("C", x[1]), ("HxW", product(x[2:])), ("group", r.fact[0])):
        call[name] = r.entry(call, call[name], axis)


def _chosen(node: fx.Node) -> int | None:
    return Call(node)["dim"] if node.target in CHOOSING else None


def _softmax(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    for d in dims_of(call["dim"], len(x)):
        if is_routed(call.node, d, _chosen):
            t.normalise(x[d])
        else:
            t.freeze(x[d], "softmax over it")
    return x


OPERATORS: dict[Any, Operator] = {
    aten.batch_norm.default: Operator(_batch_norm, _zeros_of_batch_norm),
    aten.instance_norm.default: Operator(_batch_norm, _zeros_of_batch_norm),
    aten.layer_norm.default: Operator(_layer_norm, _zeros_of_layer_norm, _resize_layer_norm),
    aten.rms_norm.default: Operator(_layer_norm, _zeros_of_layer_norm, _resize_layer_norm),
    aten.group_norm.default: Operator(_group_norm, _zeros_of_group_norm, _resize_group_norm),
    aten._native_batch_norm_legit_no_training.default: Operator(_native_batch_norm),
    aten.native_layer_norm.default: Operator(_native_layer_norm, None, _resize_layer_norm),
    aten.native_group_norm.default: Operator(_native_group_norm, None, _resize_native_group_norm),
    **table(Operator(_softmax), "softmax.int", "log_softmax.int", "_softmax.default", "_log_softmax.default"),
}
