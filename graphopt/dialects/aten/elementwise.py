"""Pointwise operators: unary functions, arithmetic with broadcasting, comparisons, masks, casts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from graphopt.axes.infer import NO_ATOMS, Atoms, Operator, Typer, Value, Zeros
from graphopt.axes.rules import broadcast
from graphopt.dialects.aten.common import table
from graphopt.dialects.common import LIKE, LOSE, MOVE, PASS, elementwise, is_tensor, no_value, operands, same
from graphopt.graph import Call

aten = torch.ops.aten


def _zeros_of_product(z: Zeros, call: Call) -> Atoms:
    return z.some(call.node, *operands(call))


def _zeros_of_sum(z: Zeros, call: Call) -> Atoms:
    """Combine terms: a sum is zero where both are; adding a nonzero number leaves no zero."""
    for value in call.node.args[:2]:
        if not is_tensor(value) and value != 0:
            return NO_ATOMS
    return z.every(call.node, *operands(call))


def _zeros_of_every(z: Zeros, call: Call) -> Atoms:
    return z.every(call.node, *operands(call))


def _zeros_of_where(z: Zeros, call: Call) -> Atoms:
    chosen = [call["self"], call["other"]]
    if any(not is_tensor(c) and c != 0 for c in chosen):
        return NO_ATOMS
    return z.every(call.node, *(c for c in chosen if is_tensor(c)))


def _zeros_of_fill(z: Zeros, call: Call) -> Atoms:
    value = call["value"]
    return z.some(call.node, call["self"]) if value == 0 else NO_ATOMS


def _zeros_of_power(z: Zeros, call: Call) -> Atoms:
    exponent = call["exponent"]
    positive = isinstance(exponent, int | float) and exponent > 0
    return z[call["self"]] if positive else NO_ATOMS


def _zeros_of_clamp(z: Zeros, call: Call) -> Atoms:
    low = call["min"] if call.has("min") else None
    high = call["max"] if call.has("max") else None
    holds_zero = all(not isinstance(v, fx.Node) for v in (low, high)) and (low or 0) <= 0 <= (high or 0)
    return z[call["self"]] if holds_zero else NO_ATOMS


def _zeros_of_hardtanh(z: Zeros, call: Call) -> Atoms:
    return z[call["self"]] if call["min_val"] <= 0 <= call["max_val"] else NO_ATOMS


def _prelu(t: Typer, call: Call) -> Value:
    x, weight = t[call["self"]], t[call["weight"]]
    if weight[0].size != 1:
        t.unify(x[1] if len(x) > 1 else x[0], weight[0])
    return x


def _zeros_of_quotient(z: Zeros, call: Call) -> Atoms:
    """0 / x is zero, unless x is zero too."""
    dividend, divisor = call.node.args[:2]
    return z.where(call.node, z.at(call.node, dividend) - z.at(call.node, divisor))


def _zeros_of_addcmul(z: Zeros, call: Call) -> Atoms:
    product = z.at(call.node, call["tensor1"]) | z.at(call.node, call["tensor2"])
    return z.where(call.node, z.at(call.node, call["self"]) & product)


def _zeros_of_addcdiv(z: Zeros, call: Call) -> Atoms:
    quotient = z.at(call.node, call["tensor1"]) - z.at(call.node, call["tensor2"])
    return z.where(call.node, z.at(call.node, call["self"]) & quotient)


def _lerp(t: Typer, call: Call) -> Value:
    return broadcast(t, *(t[n] for n in operands(call)))


OPERATORS = {
    # f(0) = 0
    **table(
        PASS,
        *(
            "relu",
            "relu_",
            "relu6",
            "relu6_",
            "gelu",
            "gelu_",
            "silu",
            "silu_",
            "hardswish",
            "hardswish_",
            "mish",
            "mish_",
        ),
        *("leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "celu_", "selu", "selu_", "tanh", "tanh_", "hardshrink"),
        *(
            "softshrink",
            "rrelu",
            "rrelu_",
            "tanh_",
            "sin",
            "sin_",
            "tan",
            "asin",
            "atan",
            "sinh",
            "asinh",
            "atanh",
            "erf",
        ),
        *(
            "expm1",
            "log1p",
            "sqrt",
            "sqrt_",
            "abs",
            "abs_",
            "neg",
            "neg_",
            "sign",
            "floor",
            "ceil",
            "trunc",
            "round.default",
        ),
        *(
            "square",
            "square_",
            "dropout",
            "dropout_",
            "feature_dropout",
            "alpha_dropout",
        ),
        *("positive", "real", "nan_to_num", "zero_"),
    ),
    **table(
        MOVE,
        *("contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy", "lift_fresh", "_to_copy", "to.dtype"),
        *("to.device", "to.dtype_layout", "to.other", "type_as"),
    ),
    **table(LIKE, "zeros_like"),
    **table(replace(LIKE, zeros=None), "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    # f(0) != 0, or unknown
    **table(
        LOSE,
        *(
            "sigmoid",
            "sigmoid_",
            "hardsigmoid",
            "hardsigmoid_",
            "exp",
            "exp_",
            "exp2",
            "log",
            "log2",
            "log10",
            "softplus",
        ),
        *("log_sigmoid", "cos", "cos_", "cosh", "acos", "acosh", "rsqrt", "rsqrt_", "reciprocal", "reciprocal_"),
        *(
            "logical_not",
            "bitwise_not",
            "isnan",
            "isinf",
            "isfinite",
        ),
        *(
            "threshold",
            "threshold_",
            "sgn",
            "erfc",
            "digamma",
            "lgamma",
            "logit",
            "bernoulli",
            "fill_.Scalar",
        ),
        *("fill.Scalar", "special_expit"),
    ),
    **table(Operator(same, _zeros_of_hardtanh), "hardtanh", "hardtanh_"),
    **table(
        Operator(elementwise, _zeros_of_product), "mul", "mul_", "logical_and", "multiply.Tensor", "multiply.Scalar"
    ),
    **table(
        Operator(elementwise, _zeros_of_quotient),
        *(
            "div",
            "div_",
            "true_divide.Tensor",
            "true_divide.Scalar",
            "floor_divide",
            "remainder.Tensor",
            "remainder.Scalar",
        ),
        *("fmod.Tensor", "fmod.Scalar"),
    ),
    **table(Operator(elementwise, _zeros_of_sum), "add", "add_", "sub", "sub_", "maximum", "minimum", "fmax", "fmin"),
    **table(Operator(elementwise, _zeros_of_every), "max.other", "min.other", "atan2", "logical_or", "hypot"),
    **table(
        Operator(elementwise),
        *("rsub", "eq", "ne", "lt", "le", "gt", "ge", "__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or"),
        *("bitwise_xor", "logical_xor", "pow.Tensor_Tensor", "pow.Scalar", "where.self", "isclose", "copysign.Tensor"),
    )
    | {aten.where.self: Operator(elementwise, _zeros_of_where)},
    aten.where.ScalarOther: Operator(elementwise, _zeros_of_where),
    aten.where.ScalarSelf: Operator(elementwise, _zeros_of_where),
    aten.where.Scalar: Operator(elementwise),
    **table(Operator(elementwise, _zeros_of_fill), "masked_fill", "masked_fill_"),
    **table(Operator(elementwise, _zeros_of_power), "pow.Tensor_Scalar", "pow_.Scalar"),
    **table(
        Operator(elementwise, _zeros_of_clamp), "clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"
    ),
    **table(Operator(_lerp, _zeros_of_every), "lerp"),
    **table(Operator(elementwise, _zeros_of_addcmul), "addcmul", "addcmul_"),
    **table(Operator(elementwise, _zeros_of_addcdiv), "addcdiv", "addcdiv_"),
    **table(Operator(_prelu, lambda z, call: z[call["self"]]), "prelu"),
    aten.copy_.default: Operator(elementwise, _zeros_of_every),
    aten._assert_tensor_metadata.default: Operator(no_value),
    aten._assert_async.msg: Operator(no_value),
}
