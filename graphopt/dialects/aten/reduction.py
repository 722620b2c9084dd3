"""Reductions: sums and means, norms, extrema, cumulative operators, sorting."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.axes.infer import Axes, Operator, Positions, Typer, Value
from graphopt.axes.rules import drop
from graphopt.dialects.aten.common import table
from graphopt.dialects.common import are_used, dims_of, no_positions, same_positions, specs_of, zeros_of_first
from graphopt.graph import Call, spec_of

aten = torch.ops.aten


def _reduced(t: Typer, call: Call) -> tuple[Axes, list[int], Axes]:
    x = t[call.node.args[0]]
    dims = dims_of(call["dim"] if call.has("dim") else None, len(x))
    keepdim = bool(call["keepdim"]) if call.has("keepdim") else False
    return x, dims, drop(x, dims, keepdim=keepdim)


def _sum(t: Typer, call: Call) -> Value:
    """Exact under removal where the removed entries are zero."""
    x, dims, out = _reduced(t, call)
    for d in dims:
        t.contract(x[d], call.node.args[0])
    return out


def _norm(t: Typer, call: Call) -> Value:
    """Type a norm: one of a positive order sums; one of a negative order finds the smallest entries."""
    order = next((call[name] for name in ("ord", "p") if call.has(name)), None)
    return _extremum(t, call) if isinstance(order, int | float) and order < 0 else _sum(t, call)


def _mean(t: Typer, call: Call) -> Value:
    """Type a mean, which divides by the count: it renormalises over the kept indices."""
    x, dims, out = _reduced(t, call)
    for d in dims:
        t.normalise(x[d])
    return out


def _mean_and_variance(t: Typer, call: Call) -> Value:
    out = _mean(t, call)
    assert isinstance(out, tuple)
    return [out, out]


def _extremum(t: Typer, call: Call) -> Value:
    """Type an extremum, a product or an order: each depends on which entries are there."""
    x, dims, out = _reduced(t, call)
    for d in dims:
        t.freeze(x[d], f"{call.name.split('.')[1]} over it")
    spec = spec_of(call.node)
    return [out for _ in spec] if isinstance(spec, tuple) else out


def _ordered(t: Typer, call: Call) -> Value:
    """Type an operator that keeps the shape and fixes the order along ``dim``."""
    x = t[call.node.args[0]]
    for d in dims_of(call["dim"], len(x)):
        t.freeze(x[d], f"{call.name.split('.')[1]} along it")
    spec = spec_of(call.node)
    return [x for _ in spec] if isinstance(spec, tuple) else x


def _top(t: Typer, call: Call) -> Value:
    """Type the k largest entries along ``dim`` and their positions; k of them must stay."""
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    k = specs_of(call)[0].shape[dim]
    if are_used(call, 1) and isinstance(call["k"], int):
        t.choose(x[dim], k)
    else:
        t.freeze(x[dim], "its largest entries are taken")
    out = (*x[:dim], t.fixed(k, "its largest entries are taken"), *x[dim + 1 :])
    return [out, out]


def _positions_of_top(t: Typer, call: Call) -> Positions:
    x = t[call["self"]]
    return [None, x[call["dim"] % len(x)]]


def _largest(t: Typer, call: Call) -> Value:
    """Type the largest entry along ``dim`` with its position, or the position alone."""
    x, (dim, *_), out = _reduced(t, call)
    several = isinstance(spec_of(call.node), tuple)
    if call["dim"] is not None and (not several or are_used(call, 1)):
        t.choose(x[dim], 1)
        return [out, out] if several else out
    return _extremum(t, call)


def _position_of_largest(t: Typer, call: Call) -> Positions:
    if call["dim"] is None:
        return None
    x = t[call.node.args[0]]
    axis = x[call["dim"] % len(x)]
    return [None, axis] if isinstance(spec_of(call.node), tuple) else axis


def _sort(t: Typer, call: Call) -> Value:
    """Type sorted entries and where they were; positions of a pruned axis keep their order among themselves."""
    out = _ordered(t, call)
    assert isinstance(out, list)
    return out


def _positions_of_sort(t: Typer, call: Call) -> Positions:
    return [same_positions(t, call), None]


def _cumulate(t: Typer, call: Call) -> Value:
    """Type running sums: over experts that no row chose, nothing is added, so those that stay read the same."""
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    if not t.is_chosen(x[dim]):
        return _ordered(t, call)
    t.contract(x[dim], call["self"])
    return x


def _difference(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    t.freeze(x[dim], "neighbours are subtracted along it")
    return (*x[:dim], t.fixed(t.shape()[dim], "differences"), *x[dim + 1 :])


_EXTREMUM = Operator(_extremum)

OPERATORS: dict[Any, Operator] = {
    **table(Operator(_sum, zeros_of_first), "sum.default", "sum.dim_IntList", "nansum.default"),
    **table(
        Operator(_norm, zeros_of_first),
        "linalg_vector_norm.default",
        "norm.ScalarOpt_dim",
        "norm.Scalar",
        "frobenius_norm.dim",
    ),
    **table(Operator(_mean, zeros_of_first), "mean.default", "mean.dim"),
    **table(
        Operator(_mean, zeros_of_first),
        "var.correction",
        "var.dim",
        "std.correction",
        "std.dim",
        "var.default",
        "std.default",
    ),
    **table(Operator(_mean_and_variance, zeros_of_first), "var_mean.correction", "var_mean.dim", "std_mean.correction"),
    **table(
        _EXTREMUM,
        *("amax.default", "amin.default", "min.dim", "max.default", "min.default"),
        *("argmin.default", "prod.dim_int", "prod.default", "any.dim", "any.default", "all.dim", "all.default"),
        *("logsumexp.default", "median.dim", "mode.default", "aminmax.default"),
    ),
    **table(
        Operator(_ordered),
        *("cumprod.default", "cummax.default", "logcumsumexp.default"),
    ),
    **table(Operator(_ordered, positions=no_positions), "argsort.default", "argsort.stable"),
    **table(Operator(_sort, positions=_positions_of_sort), "sort.default", "sort.stable"),
    aten.cumsum.default: Operator(_cumulate),
    aten.topk.default: Operator(_top, positions=_positions_of_top),
    **table(Operator(_largest, positions=_position_of_largest), "max.dim", "argmax.default"),
    aten.diff.default: Operator(_difference),
}
