"""Translate operators that normalise, and softmaxes."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.dialects.aten.common import overloads
from graphopt.graph import Call, TensorSpec
from graphopt.targets.lowering.elementwise import Translation
from graphopt.targets.lowering.emitter import Emitter, Value, out_spec
from graphopt.targets.lowering.reduction import mean

aten = torch.ops.aten


def _per_channel(e: Emitter, call: Call, name: str, fill: float, channels: int, dtype: torch.dtype) -> str:
    """Return a vector of one value a channel, or a constant one where there is none."""
    given = e.optional(call[name])
    return e.constant(torch.full((channels,), fill, dtype=dtype)) if given is None else given


def _batch_norm(e: Emitter, call: Call) -> Value:
    """Translate a batch norm: with its running statistics in evaluation, with the batch's where it has none."""
    spec = call.spec("input")
    channels, dtype = spec.shape[1], spec.dtype
    x = e[call["input"]]
    weight = _per_channel(e, call, "weight", 1.0, channels, dtype)
    bias = _per_channel(e, call, "bias", 0.0, channels, dtype)
    flag = "use_input_stats" if call.has("use_input_stats") else "training"
    if (call.has(flag) and call[flag]) or call["running_mean"] is None:
        dims = [0, *range(2, len(spec.shape))]
        return _standardised(e, x, dims, len(spec.shape), weight, bias, call["eps"], dtype)
    return e(
        "BatchNormalization",
        x,
        weight,
        bias,
        e[call["running_mean"]],
        e[call["running_var"]],
        epsilon=float(call["eps"]),
    )


def _first_of_three(translation: Translation) -> Translation:
    """Return the result of an operator which also hands out its statistics; those have no use in evaluation."""
    return lambda e, call: (translation(e, call), None, None)


def _standardised(
    e: Emitter, x: str, dims: list[int], rank: int, weight: str, bias: str, eps: float, dtype: torch.dtype
) -> str:
    axes = e.constant(dims, torch.int64)
    centred = e("Sub", x, e("ReduceMean", x, axes))
    variance = e("ReduceMean", e("Mul", centred, centred), axes)
    scaled = e("Div", centred, e("Sqrt", e("Add", variance, e.constant(eps, dtype))))
    trailing = range(1, rank - 1)
    return e("Add", e("Mul", scaled, e.unsqueeze(weight, *trailing)), e.unsqueeze(bias, *trailing))


def _instance_norm(e: Emitter, call: Call) -> Value:
    if not call["use_input_stats"]:
        return _batch_norm(e, call)
    spec = call.spec("input")
    channels, dtype = spec.shape[1], spec.dtype
    return e(
        "InstanceNormalization",
        e[call["input"]],
        _per_channel(e, call, "weight", 1.0, channels, dtype),
        _per_channel(e, call, "bias", 0.0, channels, dtype),
        epsilon=float(call["eps"]),
    )


def _layer_norm(e: Emitter, call: Call) -> Value:
    spec = call.spec("input")
    shape = [int(n) for n in call["normalized_shape"]]
    weight = e.optional(call["weight"])
    if weight is None:
        weight = e.constant(torch.ones(shape, dtype=spec.dtype))
    return e(
        "LayerNormalization",
        e[call["input"]],
        weight,
        e.optional(call["bias"]),
        axis=len(spec.shape) - len(shape),
        epsilon=float(call["eps"]),
    )


def _rms_norm(e: Emitter, call: Call) -> Value:
    """Translate ``x / sqrt(mean(x^2) + eps) * weight``; the operator of its own comes with a later opset."""
    spec = call.spec("input")
    x = e[call["input"]]
    rank, count = len(spec.shape), len(call["normalized_shape"])
    eps = call["eps"]
    if eps is None:
        eps = torch.finfo(spec.dtype).eps
    squares = mean(e, e("Mul", x, x), list(range(rank - count, rank)), keepdim=True)
    found = e("Mul", x, e("Reciprocal", e("Sqrt", e("Add", squares, e.constant(eps, spec.dtype)))))
    weight = e.optional(call["weight"])
    return found if weight is None else e("Mul", found, weight)


def _group_norm(e: Emitter, call: Call) -> Value:
    """Normalise the channels of a group and their space together, then scale by channel.

    Each group is one channel of an instance norm: the operator GroupNormalization scales by group in this opset.
    """
    spec = call.spec("input")
    groups, dtype = call["num_groups"], spec.dtype
    x = e[call["input"]]
    sizes = e.shape(x, spec)
    merged = e.reshape(x, spec, [sizes[0], groups, -1])
    one = e.constant(torch.ones(groups, dtype=dtype))
    zero = e.constant(torch.zeros(groups, dtype=dtype))
    normal = e("InstanceNormalization", merged, one, zero, epsilon=float(call["eps"]))
    found = e.reshape(normal, TensorSpec((0, 0, 0), dtype, (True, True, True)), sizes)
    trailing = range(1, len(spec.shape) - 1)
    weight, bias = e.optional(call["weight"]), e.optional(call["bias"])
    if weight is not None:
        found = e("Mul", found, e.unsqueeze(weight, *trailing))
    return found if bias is None else e("Add", found, e.unsqueeze(bias, *trailing))


def _softmax(operator: str) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        spec, result = call.spec("self"), out_spec(call.node)
        x = e.cast(e[call["self"]], spec.dtype, result.dtype)
        if not spec.shape:
            return e.squeeze(e(operator, e.unsqueeze(x, 0), axis=0), 0)
        return e(operator, x, axis=call["dim"] % len(spec.shape))

    return translate


def _table(translation: Translation, *names: str) -> dict[Any, Translation]:
    return dict.fromkeys(overloads(*names), translation)


TRANSLATIONS: dict[Any, Translation] = {
    **_table(_batch_norm, "batch_norm.default"),
    **_table(_first_of_three(_batch_norm), "native_batch_norm.default", "_native_batch_norm_legit_no_training.default"),
    **_table(_instance_norm, "instance_norm.default"),
    **_table(_layer_norm, "layer_norm.default"),
    **_table(_first_of_three(_layer_norm), "native_layer_norm.default"),
    **_table(_rms_norm, "rms_norm.default"),
    **_table(_group_norm, "group_norm.default"),
    **_table(_softmax("Softmax"), "softmax.int", "_softmax.default", "special_softmax.default"),
    **_table(_softmax("LogSoftmax"), "log_softmax.int", "_log_softmax.default", "special_log_softmax.default"),
}
