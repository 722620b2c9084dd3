"""Translate operators that make one entry of many: sums, extremes, norms; and those that order or accumulate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.dialects.aten.common import overloads
from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import SPEC, Call, TensorSpec
from graphopt.targets.lowering.elementwise import Translation
from graphopt.targets.lowering.emitter import MAXIMUM, Emitter, Value, dims_of, is_float, out_spec

aten = torch.ops.aten


def reduce(e: Emitter, operator: str, name: str, dims: Sequence[int], *, keepdim: bool) -> str:
    """Reduce over dimensions; over none, which ONNX takes for all, nothing is done."""
    if not dims:
        return name
    return e(operator, name, e.constant(list(dims), torch.int64), keepdims=int(keepdim))


def mean(e: Emitter, name: str, dims: Sequence[int], *, keepdim: bool) -> str:
    """Average over dimensions."""
    return reduce(e, "ReduceMean", name, dims, keepdim=keepdim)


def _dims(call: Call) -> tuple[list[int], bool]:
    spec = call.spec("self")
    dims = dims_of(call["dim"] if call.has("dim") else None, len(spec.shape))
    return dims, bool(call["keepdim"]) if call.has("keepdim") else False


def reduction(operator: str) -> Translation:
    """Translate to one ONNX reduction, in the type of the result."""

    def translate(e: Emitter, call: Call) -> Value:
        spec, dtype = call.spec("self"), out_spec(call.node).dtype
        dims, keepdim = _dims(call)
        inner = torch.int32 if dtype is torch.bool else dtype
        found = reduce(e, operator, e.cast(e[call["self"]], spec.dtype, inner), dims, keepdim=keepdim)
        return e.cast(found, inner, dtype)

    return translate


def _mean(e: Emitter, call: Call) -> Value:
    """Translate an average; over all of an image's space it is a pooling, which keeps the layout of convolutions."""
    spec, dtype = call.spec("self"), out_spec(call.node).dtype
    dims, keepdim = _dims(call)
    x = e.cast(e[call["self"]], spec.dtype, dtype)
    rank = len(spec.shape)
    if rank == 4 and sorted(dims) == [2, 3]:
        found = e("GlobalAveragePool", x)
        return found if keepdim else e.squeeze(found, 2, 3)
    return mean(e, x, dims, keepdim=keepdim)


def _any(operator: str) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        spec = call.spec("self")
        dims, keepdim = _dims(call)
        truth = e.cast(e.cast(e[call["self"]], spec.dtype, torch.bool), torch.bool, torch.int32)
        return e.cast(reduce(e, operator, truth, dims, keepdim=keepdim), torch.int32, out_spec(call.node).dtype)

    return translate


def _with_position(value: str, position: str) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        spec = call.spec("self")
        x = e[call["self"]]
        if not spec.shape:
            return [x, e.constant(0, torch.int64)]
        dim, keepdim = call["dim"] % len(spec.shape), bool(call["keepdim"])
        inner = torch.int32 if spec.dtype is torch.bool else spec.dtype
        x = e.cast(x, spec.dtype, inner)
        return [
            e.cast(reduce(e, value, x, [dim], keepdim=keepdim), inner, spec.dtype),
            e(position, x, axis=dim, keepdims=int(keepdim)),
        ]

    return translate


def _position(operator: str) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        spec = call.spec("self")
        x = e.cast(e[call["self"]], spec.dtype, torch.int32 if spec.dtype is torch.bool else spec.dtype)
        if call["dim"] is None:
            flat = e(operator, e.reshape(x, spec, [-1]), axis=0, keepdims=0)
            return e.reshape(flat, TensorSpec((), torch.int64, ()), [1] * len(spec.shape)) if call["keepdim"] else flat
        return e(operator, x, axis=call["dim"] % len(spec.shape), keepdims=int(call["keepdim"]))

    return translate


# -- spread --


def _moments(e: Emitter, call: Call) -> tuple[str, str]:
    """Return variance and mean, by ``correction``: the sum of squares is divided by the count less it."""
    spec, dtype = call.spec("self"), out_spec(call.node).dtype
    dims, keepdim = _dims(call)
    if call.has("correction"):
        correction: Any = 1 if call["correction"] is None else call["correction"]
    else:
        correction = int(call["unbiased"]) if call.has("unbiased") else 1
    x = e[call["self"]]
    middle = mean(e, x, dims, keepdim=True)
    centred = e("Sub", x, middle)
    variance = mean(e, e("Mul", centred, centred), dims, keepdim=keepdim)
    if correction:
        if any(spec.dynamic[d] for d in dims):
            sizes = [e.size(e.extent(x, spec, d)) for d in dims]
            count = sizes[0]
            for size in sizes[1:]:
                count = e("Mul", count, size)
            total = e.squeeze(e.cast(count, torch.int64, dtype), 0)
            factor = e("Div", total, e("Sub", total, e.constant(correction, dtype)))
        else:
            count_ = math.prod(spec.shape[d] for d in dims)
            factor = e.constant(count_ / (count_ - correction) if count_ != correction else math.nan, dtype)
        variance = e("Mul", variance, factor)
    return variance, middle if keepdim else e.squeeze(middle, *sorted(dims))


def _variance(e: Emitter, call: Call) -> Value:
    return _moments(e, call)[0]


def _deviation(e: Emitter, call: Call) -> Value:
    return e("Sqrt", _moments(e, call)[0])


def _variance_and_mean(e: Emitter, call: Call) -> Value:
    return list(_moments(e, call))


def _deviation_and_mean(e: Emitter, call: Call) -> Value:
    variance, middle = _moments(e, call)
    return [e("Sqrt", variance), middle]


# -- norms --


def _vector_norm(e: Emitter, call: Call) -> Value:
    spec, dtype = call.spec("self"), out_spec(call.node).dtype
    order = call["ord"] if call.has("ord") else call["p"]
    order = 2 if order is None else order
    dims, keepdim = _dims(call)
    x = e.cast(e[call["self"]], spec.dtype, dtype)
    if order == 2:
        return reduce(e, "ReduceL2", x, dims, keepdim=keepdim)
    if order == 1:
        return reduce(e, "ReduceL1", x, dims, keepdim=keepdim)
    size = e("Abs", x)
    if order == math.inf:
        return reduce(e, "ReduceMax", size, dims, keepdim=keepdim)
    if order == -math.inf:
        return reduce(e, "ReduceMin", size, dims, keepdim=keepdim)
    if order == 0:
        nonzero = e.cast(e("Not", e("Equal", x, e.zero(dtype))), torch.bool, dtype)
        return reduce(e, "ReduceSum", nonzero, dims, keepdim=keepdim)
    powered = reduce(e, "ReduceSum", e("Pow", size, e.constant(order, dtype)), dims, keepdim=keepdim)
    return e("Pow", powered, e.constant(1 / order, dtype))


# -- order and accumulation --


def _cumsum(e: Emitter, call: Call) -> Value:
    spec, dtype = call.spec("self"), out_spec(call.node).dtype
    x = e.cast(e[call["self"]], spec.dtype, dtype)
    if not spec.shape:
        return x
    return e("CumSum", x, e.constant(call["dim"] % len(spec.shape), torch.int64))


def _diff(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    dim = call["dim"] % len(spec.shape)
    parts = [e.optional(call["prepend"]), e[call["self"]], e.optional(call["append"])]
    given = [part for part in parts if part is not None]
    x = given[0] if len(given) == 1 else e("Concat", *given, axis=dim)
    for _ in range(call["n"]):
        later, earlier = e.slice(x, dim, 1, MAXIMUM), e.slice(x, dim, 0, -1)
        x = e("Xor" if spec.dtype is torch.bool else "Sub", later, earlier)
    return x


def _topk(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    return e.several(
        "TopK",
        2,
        e[call["self"]],
        e.size(call["k"]),
        axis=call["dim"] % len(spec.shape),
        largest=int(call["largest"]),
        sorted=int(call["sorted"]),
    )


def _sort(e: Emitter, call: Call) -> tuple[str, str]:
    """Sort by taking all the largest (or smallest); of equal entries the first comes first, so that it is stable."""
    spec = call.spec("self")
    dim = call["dim"] % len(spec.shape)
    x = e[call["self"]]
    inner = torch.int32 if spec.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16) else spec.dtype
    values, positions = e.several(
        "TopK",
        2,
        e.cast(x, spec.dtype, inner),
        e.size(e.extent(x, spec, dim)),
        axis=dim,
        largest=int(bool(call["descending"])),
        sorted=1,
    )
    return e.cast(values, inner, spec.dtype), positions


def _argsort(e: Emitter, call: Call) -> Value:
    return _sort(e, call)[1]


def _histogram(e: Emitter, call: Call) -> Value:
    """Count the entries in each of ``bins`` equal parts of [min, max]; an entry outside counts nowhere."""
    spec, result = call.spec("self"), out_spec(call.node)
    low, high, bins = call["min"], call["max"], call["bins"]
    if low == high:
        raise UnsupportedOperatorError("a histogram over the range of the data: give its range, min and max")
    dtype = spec.dtype if is_float(spec.dtype) else torch.float32
    x = e.cast(e.reshape(e[call["self"]], spec, [-1]), spec.dtype, dtype)
    first, last = e.constant(low, dtype), e.constant(high, dtype)
    part = e("Floor", e("Mul", e("Sub", x, first), e.constant(bins / (high - low), dtype)))
    part = e("Min", part, e.constant(bins - 1, dtype))
    inside = e("And", e("GreaterOrEqual", x, first), e("LessOrEqual", x, last))
    chosen = e("Equal", e.unsqueeze(part, 1), e.constant(torch.arange(bins, dtype=dtype)))
    counted = e.cast(e("And", chosen, e.unsqueeze(inside, 1)), torch.bool, result.dtype)
    return reduce(e, "ReduceSum", counted, [0], keepdim=False)


def _count_nonzero(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    dims, _ = _dims(call)
    truth = e.cast(e.cast(e[call["self"]], spec.dtype, torch.bool), torch.bool, torch.int64)
    return reduce(e, "ReduceSum", truth, dims, keepdim=False)


def _bucketize(e: Emitter, call: Call) -> Value:
    """Count the boundaries below each entry (``right``: not above it)."""
    spec, result = call.spec("self"), out_spec(call.node)
    boundaries: fx.Node = call["boundaries"]
    dtype = torch.promote_types(spec.dtype, boundaries.meta[SPEC].dtype)
    x = e.unsqueeze(e.operand(call["self"], dtype), len(spec.shape))
    passed = e("LessOrEqual" if call["right"] else "Less", e.operand(boundaries, dtype), x)
    counted = e.cast(passed, torch.bool, result.dtype)
    return reduce(e, "ReduceSum", counted, [len(spec.shape)], keepdim=False)


def _table(translation: Translation, *names: str) -> dict[Any, Translation]:
    return dict.fromkeys(overloads(*names), translation)


TRANSLATIONS: dict[Any, Translation] = {
    **_table(reduction("ReduceSum"), "sum.default", "sum.dim_IntList"),
    **_table(_mean, "mean.default", "mean.dim"),
    **_table(reduction("ReduceProd"), "prod.default", "prod.dim_int"),
    **_table(reduction("ReduceMax"), "amax.default", "max.default"),
    **_table(reduction("ReduceMin"), "amin.default", "min.default"),
    **_table(reduction("ReduceLogSumExp"), "logsumexp.default"),
    **_table(_any("ReduceMax"), "any.default", "any.dim", "any.dims"),
    **_table(_any("ReduceMin"), "all.default", "all.dim", "all.dims"),
    **_table(_with_position("ReduceMax", "ArgMax"), "max.dim"),
    **_table(_with_position("ReduceMin", "ArgMin"), "min.dim"),
    **_table(_position("ArgMax"), "argmax.default"),
    **_table(_position("ArgMin"), "argmin.default"),
    **_table(_variance, "var.default", "var.dim", "var.correction"),
    **_table(_deviation, "std.default", "std.dim", "std.correction"),
    **_table(_variance_and_mean, "var_mean.default", "var_mean.dim", "var_mean.correction"),
    **_table(_deviation_and_mean, "std_mean.default", "std_mean.dim", "std_mean.correction"),
    **_table(_vector_norm, "linalg_vector_norm.default", "norm.Scalar", "norm.ScalarOpt_dim"),
    **_table(_cumsum, "cumsum.default"),
    **_table(_diff, "diff.default"),
    **_table(_topk, "topk.default"),
    **_table(lambda e, call: list(_sort(e, call)), "sort.default", "sort.stable"),
    **_table(_argsort, "argsort.default", "argsort.stable"),
    **_table(_histogram, "histc.default"),
    **_table(_count_nonzero, "count_nonzero.default", "count_nonzero.dim_IntList"),
    **_table(_bucketize, "bucketize.Tensor"),
}
