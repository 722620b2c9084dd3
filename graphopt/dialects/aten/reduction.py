"""Reductions: sums and means, norms, extrema, cumulative operators, sorting."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.axes.infer import Axes, Operator, Typer, Value
from graphopt.axes.rules import drop
from graphopt.dialects.aten.common import dims_of, specs_of, table, zeros_of_first
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
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    t.freeze(x[dim], "its largest entries are taken")
    k = specs_of(call)[0].shape[dim]
    out = (*x[:dim], t.fixed(k, "its largest entries are taken"), *x[dim + 1 :])
    return [out, out]


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
        *("amax.default", "amin.default", "max.dim", "min.dim", "max.default", "min.default", "argmax.default"),
        *("argmin.default", "prod.dim_int", "prod.default", "any.dim", "any.default", "all.dim", "all.default"),
        *("logsumexp.default", "median.dim", "mode.default", "aminmax.default"),
    ),
    **table(
        Operator(_ordered),
        *("cumsum.default", "cumprod.default", "sort.default", "sort.stable", "argsort.default", "argsort.stable"),
        *("cummax.default", "logcumsumexp.default"),
    ),
    aten.topk.default: Operator(_top),
    aten.diff.default: Operator(_difference),
}
