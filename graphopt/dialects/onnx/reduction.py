"""Reductions: sums and means, norms, extrema, cumulative operators, positions of the largest entries."""

from __future__ import annotations

from graphopt.axes.algebra import Axis
from graphopt.axes.infer import Axes, Operator, Positions, Typer, Value
from graphopt.axes.rules import drop
from graphopt.dialects.common import are_used, dims_of, freeze_operands, hints, opaque, specs_of, zeros_of_first
from graphopt.dialects.onnx.common import BY_DATA, is_given, results, table
from graphopt.graph import Call


def _dims(call: Call, rank: int) -> list[int]:
    """Return the reduced dimensions: those given, or all, or none where no list is said to mean none."""
    axes = call["axes"]
    if axes is None or not axes:
        return [] if call["noop_with_empty_axes"] else list(range(rank))
    return dims_of(hints(axes), rank)


def _reduced(t: Typer, call: Call) -> tuple[Axes, list[int], Axes] | None:
    """Return the input's axes, which dimensions go, and the result's axes; None where data say what to reduce."""
    if not is_given(call["axes"]):
        return None
    x = t[call["data"]]
    dims = _dims(call, len(x))
    return x, dims, drop(x, dims, keepdim=bool(call["keepdims"])) if dims else x


def _by_data(t: Typer, call: Call) -> Value:
    freeze_operands(t, call, BY_DATA)
    return opaque(t, call, BY_DATA)


def _sum(t: Typer, call: Call) -> Value:
    """Exact under removal where the removed entries are zero."""
    found = _reduced(t, call)
    if found is None:
        return _by_data(t, call)
    x, dims, out = found
    for d in dims:
        t.contract(x[d], call["data"])
    return out


def _mean(t: Typer, call: Call) -> Value:
    """Type a mean, which divides by the count: it renormalises over the kept indices."""
    found = _reduced(t, call)
    if found is None:
        return _by_data(t, call)
    x, dims, out = found
    for d in dims:
        t.normalise(x[d])
    return out


def _extremum(t: Typer, call: Call) -> Value:
    """Type an extremum or a product: each depends on which entries are there."""
    found = _reduced(t, call)
    if found is None:
        return _by_data(t, call)
    x, dims, out = found
    for d in dims:
        t.freeze(x[d], f"{call.name.removeprefix('onnx.')} over it")
    return out


def _top(t: Typer, call: Call) -> Value:
    """Type the k largest entries along ``axis`` and their positions; k of them must stay."""
    x = t[call["X"]]
    dim = call["axis"] % len(x)
    k = (specs_of(call) or [call.out])[0].shape[dim]
    if are_used(call, 1) and isinstance(call["K"], int):
        t.choose(x[dim], k)
    else:
        t.freeze(x[dim], "its largest entries are taken")
    out = (*x[:dim], t.fixed(k, "its largest entries are taken"), *x[dim + 1 :])
    return results(call, out, out)


def _positions_of_top(t: Typer, call: Call) -> Positions:
    x = t[call["X"]]
    return [None, x[call["axis"] % len(x)]] if len(specs_of(call)) > 1 else None


def _largest(t: Typer, call: Call) -> Value:
    """Type the position of the largest, or smallest, entry along ``axis``."""
    x = t[call["data"]]
    dim = call["axis"] % len(x)
    t.choose(x[dim], 1)
    return drop(x, [dim], keepdim=bool(call["keepdims"]))


def _position_of_largest(t: Typer, call: Call) -> Positions:
    x = t[call["data"]]
    held: Axis = x[call["axis"] % len(x)]
    return held


def _cumulate(t: Typer, call: Call) -> Value:
    """Type running sums: over experts that no row chose, nothing is added, so those that stay read the same."""
    x = t[call["x"]]
    if not isinstance(call["axis"], int):
        return _by_data(t, call)
    dim = call["axis"] % len(x)
    if call.name == "onnx.CumSum" and t.is_chosen(x[dim]):
        t.contract(x[dim], call["x"])
    else:
        t.freeze(x[dim], f"{call.name.removeprefix('onnx.')} along it")
    return x


ENTRIES: dict[str, Operator] = {
    **table(Operator(_sum, zeros_of_first), "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
    "ReduceLogSum": Operator(_sum),
    "ReduceMean": Operator(_mean, zeros_of_first),
    **table(Operator(_extremum), "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"),
    "TopK": Operator(_top, positions=_positions_of_top),
    **table(Operator(_largest, positions=_position_of_largest), "ArgMax", "ArgMin"),
    **table(Operator(_cumulate), "CumSum", "CumProd"),
}
