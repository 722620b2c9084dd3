"""Normalisations and softmax: operators whose result at one index depends on the others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphopt.axes.algebra import Axis, leaves
from graphopt.axes.infer import NO_ATOMS, Atoms, Axes, Faces, Operator, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import broadcast, drop
from graphopt.dialects.common import (
    atoms_inside,
    dims_of,
    elementwise,
    faces_outside,
    is_routed,
    optional,
    zeros_of_first,
)
from graphopt.dialects.onnx.common import microsoft, results, table
from graphopt.dialects.onnx.operators import Op
from graphopt.graph import Call


def _batch_norm(t: Typer, call: Call) -> Value:
    """Tie the channel axis with all four vectors; batch statistics also normalise over every other axis."""
    x = t[call["X"]]
    for name in ("scale", "B", "input_mean", "input_var"):
        t.unify(x[1] if len(x) > 1 else x[0], t[call[name]][0])
    if call["training_mode"]:
        for d in range(len(x)):
            if d != 1:
                t.normalise(x[d])
    return results(call, x, t[call["input_mean"]], t[call["input_var"]])


def _zeros_of_batch_norm(z: Zeros, call: Call) -> Atoms:
    if call["training_mode"]:
        return NO_ATOMS
    node = call.node
    centred = z.at(node, call["X"]) & z.at(node, call["input_mean"], (1,))
    return z.where(node, (centred | z.at(node, call["scale"], (1,))) & z.at(node, call["B"], (1,)))


def _instance_norm(t: Typer, call: Call) -> Value:
    x = t[call["input"]]
    for name in ("scale", "B"):
        t.unify(x[1], t[call[name]][0])
    for axis in x[2:]:
        t.normalise(axis)
    return x


def _zeros_of_instance_norm(z: Zeros, call: Call) -> Atoms:
    x = call["input"]
    found = faces_outside(z, call.node, x, range(2, len(z.axes(x))))
    found |= z.at(call.node, call["scale"], (1,))
    return z.where(call.node, found & z.at(call.node, call["B"], (1,)))


# -- over the last dimensions ----------------------------------------------------------------------------------------


def _layer_norm(t: Typer, call: Call) -> Value:
    """Normalise over all dimensions from ``axis`` on; scale and bias broadcast with them."""
    x = t[call["X"]]
    first = call["axis"] % len(x)
    out = _affine(t, call, x, *(name for name in ("Scale", "scale", "B") if call.has(name)))
    for axis in x[first:]:
        t.normalise(axis)
    kept = drop(x, range(first, len(x)), keepdim=True)
    return results(call, out, kept, kept)


def _affine(t: Typer, call: Call, x: Axes, *names: str) -> Axes:
    given = [t[call[name]] for name in names if call[name] is not None]
    return broadcast(t, x, *given)


def _zeros_of_layer_norm(z: Zeros, call: Call) -> Atoms:
    if isinstance(call.node.meta["spec"], tuple):
        return NO_ATOMS
    rank = len(z.axes(call["X"]))
    found = faces_outside(z, call.node, call["X"], range(call["axis"] % rank, rank))
    found |= z.at(call.node, call["Scale" if call.has("Scale") else "scale"])
    bias = call["B"] if call.has("B") else None
    return z.where(call.node, found if bias is None else found & z.at(call.node, bias))


def _skip_norm(t: Typer, call: Call) -> Value:
    """Add a skip and a bias and normalise over the last dimension; the fourth result is that sum."""
    x = _affine(t, call, t[call["input"]], "skip", "bias")
    out = _affine(t, call, x, *(name for name in ("gamma", "beta") if call.has(name)))
    t.normalise(x[-1])
    kept = (*x[:-1], *drop(x[-1:], [0], keepdim=True))
    return results(call, out, kept, kept, x)


def _zeros_of_skip_norm(z: Zeros, call: Call) -> Atoms:
    node = call.node
    if isinstance(node.meta["spec"], tuple):
        return NO_ATOMS
    inside = leaves(z.axes(call["input"])[-1])
    present = [call[name] for name in ("input", "skip", "bias") if call[name] is not None]
    summed = frozenset.intersection(*(z.at(node, operand) for operand in present))
    found: Faces = frozenset(face for face in summed if face[0] not in inside) | z.at(node, call["gamma"])
    beta = call["beta"] if call.has("beta") else None
    return z.where(node, found if beta is None else found & z.at(node, beta))


# -- over groups of channels -----------------------------------------------------------------------------------------


def _group_norm(t: Typer, call: Call) -> Value:
    """Normalise over space inside each group: whole groups go exactly, channels inside all groups renormalise.

    Scale and bias hold one entry a channel, or, before version 21, one a group.
    """
    x = t[call["X"]]
    groups, _ = _grouped(t, call, x[1], x[2:], call["num_groups"])
    for name in ("scale", "bias"):
        vector = t[call[name]][0]
        t.unify(vector, x[1] if vector.size == x[1].size else groups)
    return x


def _grouped(t: Typer, call: Call, channels: Axis, space: Sequence[Axis], count: int) -> tuple[Axis, Axis]:
    groups, inner = t.split(channels, count)
    for axis in (inner, *space):
        t.normalise(axis)
    t.mark(groups, "norm groups")
    t.facts[call.node] = (groups, inner)
    return groups, inner


def _zeros_of_group_norm(z: Zeros, call: Call) -> Atoms:
    node, axes = call.node, z.axes(call["X"])
    inside = atoms_inside(axes[1], call["num_groups"])
    found = faces_outside(z, node, call["X"], range(2, len(axes)))
    found = frozenset(face for face in found if face[0] not in inside) | _along(z, call, "scale")
    return z.where(node, found & _along(z, call, "bias"))


def _along(z: Zeros, call: Call, name: str) -> Faces:
    """Return where a factor of each channel, or of each group, is zero."""
    vector = z.axes(call[name])[0]
    if vector.size == z.axes(call.node)[1].size:
        return z.at(call.node, call[name], (1,))
    return frozenset((leaf, 1) for leaf in leaves(vector) if leaf in z[call[name]])


def _resize_group_norm(r: Resizer, call: Call) -> None:
    groups, _ = r.fact
    if r.changed(groups):
        call["num_groups" if call.has("num_groups") else "groups"] = r.size(groups)


def _runtime_group_norm(t: Typer, call: Call) -> Value:
    """Normalise groups of the channels, which are last or second; with a skip and a bias that are added before."""
    x = t[call["X"]]
    dim = len(x) - 1 if call["channels_last"] else 1
    for name in ("skip", "bias"):
        added = optional(t, call[name]) if call.has(name) else None
        if added is None:
            continue
        if len(added) == len(x):
            x = broadcast(t, x, added)
        else:
            t.unify(x[dim], added[-1])
            for axis, other in zip(added[:-1], x, strict=False):
                t.unify(axis, other)
    for name in ("gamma", "beta"):
        t.unify(x[dim], t[call[name]][0])
    _grouped(t, call, x[dim], [a for d, a in enumerate(x) if d not in (0, dim)], call["groups"])
    return results(call, x, x)


# -- without parameters ----------------------------------------------------------------------------------------------


def _local_response(t: Typer, call: Call) -> Value:
    """Divide by the neighbouring channels' squares: which ones those are changes with the channels that are there."""
    x = t[call["X"]]
    t.normalise(x[1])
    return x


def _lp_norm(t: Typer, call: Call) -> Value:
    """Divide by a norm along ``axis``: exact under removal where the removed entries are zero."""
    x = t[call["input"]]
    t.contract(x[call["axis"] % len(x)], call["input"])
    return x


def _mean_variance(t: Typer, call: Call) -> Value:
    x = t[call["X"]]
    for d in dims_of(call["axes"], len(x)):
        t.normalise(x[d])
    return x


def _zeros_of_mean_variance(z: Zeros, call: Call) -> Atoms:
    dims = dims_of(call["axes"], len(z.axes(call["X"])))
    return z.where(call.node, faces_outside(z, call.node, call["X"], dims))


def _softmax(t: Typer, call: Call) -> Value:
    x = t[call["input"]]
    _over(t, call.node, x, call["axis"] % len(x))
    return x


def _over(t: Typer, node: fx.Node, x: Axes, dim: int) -> None:
    if is_routed(node, dim, _chosen):
        t.normalise(x[dim])
    else:
        t.freeze(x[dim], "softmax over it")


def _chosen(node: fx.Node) -> int | None:
    """Return along which dimension an operator takes the largest entries."""
    choosing = isinstance(node.target, Op) and node.target.key in ("TopK", "ArgMax")
    return Call(node)["axis"] if choosing else None


def _hardmax(t: Typer, call: Call) -> Value:
    x = t[call["input"]]
    t.freeze(x[call["axis"] % len(x)], "its largest entry is found")
    return x


def _bias_softmax(t: Typer, call: Call) -> Value:
    x = elementwise(t, call)
    assert isinstance(x, tuple)
    for axis in x[call["axis"] % len(x) :]:
        t.freeze(axis, "softmax over it")
    return x


_NORM = Operator(_layer_norm, _zeros_of_layer_norm)

ENTRIES: dict[str, Operator] = {
    "BatchNormalization": Operator(_batch_norm, _zeros_of_batch_norm),
    "InstanceNormalization": Operator(_instance_norm, _zeros_of_instance_norm),
    "GroupNormalization": Operator(_group_norm, _zeros_of_group_norm, _resize_group_norm),
    **table(_NORM, "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
    **microsoft(_NORM, "SimplifiedLayerNormalization"),
    **microsoft(
        Operator(_skip_norm, _zeros_of_skip_norm), "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"
    ),
    **microsoft(Operator(_runtime_group_norm, None, _resize_group_norm), "GroupNorm", "SkipGroupNorm"),
    "LRN": Operator(_local_response, zeros_of_first),
    "LpNormalization": Operator(_lp_norm, zeros_of_first),
    "MeanVarianceNormalization": Operator(_mean_variance, _zeros_of_mean_variance),
    **table(Operator(_softmax), "Softmax", "LogSoftmax"),
    "Hardmax": Operator(_hardmax),
    **microsoft(Operator(_bias_softmax), "BiasSoftmax"),
}
