"""Pointwise operators: unary functions, arithmetic with broadcasting, comparisons, masks, casts."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from graphopt.axes.infer import NO_ATOMS, Atoms, Operator, Typer, Value, Zeros
from graphopt.axes.rules import broadcast, sections
from graphopt.dialects.common import LIKE, LOSE, MOVE, PASS, elementwise, operands, same, zeros_of_first
from graphopt.dialects.onnx.common import is_positive, is_zero, microsoft, results, table
from graphopt.graph import Call


def _zeros_of_product(z: Zeros, call: Call) -> Atoms:
    return z.some(call.node, *operands(call))


def _zeros_of_every(z: Zeros, call: Call) -> Atoms:
    """Combine terms: a sum is zero where all of them are; a constant of zeros is everywhere."""
    return z.every(call.node, *(n for n in operands(call) if not is_zero(n)))


def _zeros_of_quotient(z: Zeros, call: Call) -> Atoms:
    """0 / x is zero, unless x is zero too."""
    return z.where(call.node, z.at(call.node, call["A"]) - z.at(call.node, call["B"]))


def _zeros_of_shift(z: Zeros, call: Call) -> Atoms:
    return z.some(call.node, call["X"])


def _zeros_of_power(z: Zeros, call: Call) -> Atoms:
    return z.some(call.node, call["X"]) if is_positive(call["Y"]) else NO_ATOMS


def _zeros_of_where(z: Zeros, call: Call) -> Atoms:
    return z.every(call.node, *(n for n in (call["X"], call["Y"]) if not is_zero(n)))


def _zeros_of_clip(z: Zeros, call: Call) -> Atoms:
    low, high = call["min"], call["max"]
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return NO_ATOMS
    return z[call["input"]] if (low or 0) <= 0 <= (high or 0) else NO_ATOMS


def _zeros_of_shrink(z: Zeros, call: Call) -> Atoms:
    return z[call["input"]] if call["lambd"] >= 0 else NO_ATOMS


def _prelu(t: Typer, call: Call) -> Value:
    return broadcast(t, t[call["X"]], t[call["slope"]])


def _dropout(t: Typer, call: Call) -> Value:
    x = t[call["data"]]
    return results(call, x, x)


def _zeros_of_swiglu(z: Zeros, call: Call) -> Atoms:
    return z.some(call.node, call["A"], call["B"])


def _gate(t: Typer, call: Call) -> Value:
    """Type ``a * gelu(b)`` of the halves of a sum with a bias, which share their indices."""
    x = broadcast(t, *(t[n] for n in operands(call)))
    half = x[-1].size // 2
    first, second = sections(t, x, -1, [half, half])
    t.unify(first[-1], second[-1])
    return first


_SUM = Operator(elementwise, _zeros_of_every)
_PRODUCT = Operator(elementwise, _zeros_of_product)

ENTRIES: dict[str, Operator] = {
    # f(0) = 0
    **table(
        PASS,
        *("Relu", "Gelu", "LeakyRelu", "Elu", "Celu", "Selu", "Tanh", "Mish", "HardSwish", "Swish", "Softsign"),
        *("ThresholdedRelu", "Sin", "Tan", "Asin", "Atan", "Sinh", "Asinh", "Atanh", "Erf", "Sqrt", "Abs", "Neg"),
        *("Sign", "Floor", "Ceil", "Round", "IsNaN", "IsInf"),
    ),
    **microsoft(PASS, "Gelu", "QuickGelu"),
    **table(MOVE, "Identity", "Cast"),
    "CastLike": Operator(same, zeros_of_first),
    "Dropout": Operator(_dropout, zeros_of_first),
    **table(replace(LIKE, zeros=None), "RandomNormalLike", "RandomUniformLike"),
    # f(0) != 0, or unknown
    **table(
        LOSE,
        *("Sigmoid", "HardSigmoid", "Exp", "Log", "Softplus", "Cos", "Cosh", "Acos", "Acosh", "Reciprocal", "Not"),
        *("BitwiseNot", "BitCast", "Bernoulli"),
    ),
    "Clip": Operator(same, _zeros_of_clip),
    "Shrink": Operator(same, _zeros_of_shrink),
    "PRelu": Operator(_prelu, zeros_of_first),
    **table(_PRODUCT, "Mul", "And", "BitwiseAnd"),
    **table(Operator(elementwise, _zeros_of_quotient), "Div", "Mod"),
    **table(_SUM, "Add", "Sub", "Max", "Min", "Sum", "Mean", "Or", "Xor", "BitwiseOr", "BitwiseXor"),
    "BitShift": Operator(elementwise, _zeros_of_shift),
    "Pow": Operator(elementwise, _zeros_of_power),
    "Where": Operator(elementwise, _zeros_of_where),
    "SwiGLU": Operator(elementwise, _zeros_of_swiglu),
    **table(Operator(elementwise), "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
    **microsoft(_SUM, "BiasGelu", "FastGelu"),
    **microsoft(Operator(_gate), "BiasSplitGelu"),
}
