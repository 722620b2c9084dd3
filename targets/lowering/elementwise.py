"""Translate operators that compute each entry from the entries at the same place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.dialects.aten.common import overloads
from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import SPEC, Call, TensorSpec, tensor_spec
from graphopt.targets.lowering.emitter import Emitter, Value, is_float, onnx_type, out_spec, scalar_type

aten = torch.ops.aten
Translation = Callable[[Emitter, Call], Value]


# -- types --


def compute_type(*arguments: Any) -> torch.dtype:
    """Return the type in which torch computes on these operands: tensors of some dimension decide over numbers."""
    return _promoted([_example(a) for a in arguments if a is not None])


def _example(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        spec = argument.meta.get(SPEC)
        if isinstance(spec, TensorSpec):
            return torch.empty((1,) * min(len(spec.shape), 1), dtype=spec.dtype, device="meta")
        return spec
    return argument


def _promoted(examples: list[Any]) -> torch.dtype:
    # Tensors with dimensions come first, then tensors without, then numbers: a later kind counts only if its
    # category (bool, integer, float) is higher. torch.result_type says so for two operands at a time.
    tensors = [e for e in examples if isinstance(e, torch.Tensor)]
    if not tensors:
        return scalar_type(examples[0])
    found = tensors[0]
    for other in [*tensors[1:], *(e for e in examples if not isinstance(e, torch.Tensor))]:
        dtype = torch.result_type(found, other)
        rank = max(found.dim(), other.dim() if isinstance(other, torch.Tensor) else 0)
        found = torch.empty((1,) * rank, dtype=dtype, device="meta")
    return found.dtype


def result(e: Emitter, call: Call, name: str, computed: torch.dtype) -> str:
    """Convert a result to the type that the graph says the call has."""
    return e.cast(name, computed, out_spec(call.node).dtype)


def first_operand(call: Call) -> Any:
    """Return the operator's first argument."""
    return call.node.args[0]


# -- builders of translations --


def unary(build: Callable[[Emitter, str, torch.dtype], str]) -> Translation:
    """Translate a function of one tensor; integers are converted to the float type of the result first."""

    def translate(e: Emitter, call: Call) -> Value:
        x = first_operand(call)
        dtype = tensor_spec(x).dtype
        target = out_spec(call.node).dtype
        if is_float(target) and not is_float(dtype):
            dtype = target
        return result(e, call, build(e, e.operand(x, dtype), dtype), dtype)

    return translate


def plain(operator: str, **attributes: Any) -> Translation:
    """Translate to one ONNX operator of one input."""
    return unary(lambda e, x, _: e(operator, x, **attributes))


def predicate(build: Callable[[Emitter, str, torch.dtype], str]) -> Translation:
    """Translate a function of one tensor that answers yes or no."""

    def translate(e: Emitter, call: Call) -> Value:
        x = first_operand(call)
        dtype = x.meta[SPEC].dtype
        return build(e, e[x], dtype)

    return translate


def binary(operator: str, *names: str, alpha: bool = False) -> Translation:
    """Translate to one ONNX operator of two inputs, ``self`` and ``other`` unless named; ``alpha`` scales the other."""
    first, second = names or ("self", "other")

    def translate(e: Emitter, call: Call) -> Value:
        a, b = call[first], call[second]
        dtype = compute_type(a, b)
        y = e.operand(b, dtype)
        if alpha and call["alpha"] != 1:
            y = e("Mul", y, e.operand(call["alpha"], dtype))
        chosen = _ON_BOOLEANS.get(operator, operator) if dtype is torch.bool else operator
        return result(e, call, e(chosen, e.operand(a, dtype), y), dtype)

    return translate


_ON_BOOLEANS = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}


def logical(operator: str) -> Translation:
    """Translate a boolean operator of two inputs; numbers count as whether they are not zero."""

    def translate(e: Emitter, call: Call) -> Value:
        return e(operator, *(truth(e, call[name]) for name in ("self", "other")))

    return translate


def truth(e: Emitter, argument: Any) -> str:
    """Return an operand as booleans."""
    return e.operand(argument, torch.bool)


def compare(operator: str, *, negated: bool = False) -> Translation:
    """Translate a comparison; booleans compare as 0 and 1."""

    def translate(e: Emitter, call: Call) -> Value:
        a, b = call["self"], call["other"]
        dtype = compute_type(a, b)
        if dtype is torch.bool and operator != "Equal":
            dtype = torch.int32
        found = e(operator, e.operand(a, dtype), e.operand(b, dtype))
        return e("Not", found) if negated else found

    return translate


def bitwise(boolean: str, integer: str) -> Translation:
    """Translate an operator on bits, which for booleans is the logical one."""

    def translate(e: Emitter, call: Call) -> Value:
        a, b = call["self"], call["other"]
        dtype = compute_type(a, b)
        operator = boolean if dtype is torch.bool else integer
        return result(e, call, e(operator, e.operand(a, dtype), e.operand(b, dtype)), dtype)

    return translate


# -- arithmetic --


def _rsub(e: Emitter, call: Call) -> Value:
    a, b = call["self"], call["other"]
    dtype = compute_type(a, b)
    x = e.operand(a, dtype)
    if call["alpha"] != 1:
        x = e("Mul", x, e.operand(call["alpha"], dtype))
    return result(e, call, e("Sub", e.operand(b, dtype), x), dtype)


def _div(e: Emitter, call: Call) -> Value:
    a, b = call["self"], call["other"]
    mode = call["rounding_mode"] if call.has("rounding_mode") else None
    dtype = compute_type(a, b)
    if mode is None and not is_float(dtype):
        dtype = out_spec(call.node).dtype
    x, y = e.operand(a, dtype), e.operand(b, dtype)
    if mode is None:
        found = e("Div", x, y)
    elif mode == "floor":
        found = floor_divide(e, x, y, dtype)
    else:
        found = truncated(e, e("Div", x, y), dtype)
    return result(e, call, found, dtype)


def floor_divide(e: Emitter, x: str, y: str, dtype: torch.dtype) -> str:
    """Divide and round down. Integer division of ONNX rounds to zero, so the remainder is taken off first."""
    if is_float(dtype):
        return e("Floor", e("Div", x, y))
    return e("Div", e("Sub", x, e("Mod", x, y)), y)


def truncated(e: Emitter, x: str, dtype: torch.dtype) -> str:
    """Round to zero."""
    if not is_float(dtype):
        return x
    return e("Mul", e("Floor", e("Abs", x)), e("Sign", x))


def _floor_divide(e: Emitter, call: Call) -> Value:
    a, b = call["self"], call["other"]
    dtype = compute_type(a, b)
    return result(e, call, floor_divide(e, e.operand(a, dtype), e.operand(b, dtype), dtype), dtype)


def _remainder(e: Emitter, call: Call) -> Value:
    """Translate the remainder with the divisor's sign: ONNX has it for integers only."""
    a, b = call["self"], call["other"]
    dtype = compute_type(a, b)
    x, y = e.operand(a, dtype), e.operand(b, dtype)
    found = e("Sub", x, e("Mul", e("Floor", e("Div", x, y)), y)) if is_float(dtype) else e("Mod", x, y)
    return result(e, call, found, dtype)


def _fmod(e: Emitter, call: Call) -> Value:
    a, b = call["self"], call["other"]
    dtype = compute_type(a, b)
    return result(e, call, e("Mod", e.operand(a, dtype), e.operand(b, dtype), fmod=1), dtype)


def _pow(e: Emitter, call: Call) -> Value:
    base, exponent = call["self"], call["exponent"]
    dtype = compute_type(base, exponent)
    x = e.operand(base, dtype)
    if exponent == 2:
        found = e("Mul", x, x)
    elif exponent == 1:
        found = x
    elif exponent == 0.5:
        found = e("Sqrt", x)
    elif exponent == -0.5:
        found = e("Reciprocal", e("Sqrt", x))
    elif exponent == -1:
        found = e("Reciprocal", x)
    else:
        found = e("Pow", x, e.operand(exponent, dtype))
    return result(e, call, found, dtype)


def _square(e: Emitter, x: str, dtype: torch.dtype) -> str:
    del dtype
    return e("Mul", x, x)


def _addc(operator: str) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        dtype = out_spec(call.node).dtype
        term = e(operator, e.operand(call["tensor1"], dtype), e.operand(call["tensor2"], dtype))
        if call["value"] != 1:
            term = e("Mul", term, e.operand(call["value"], dtype))
        return e("Add", e.operand(call["self"], dtype), term)

    return translate


def _lerp(e: Emitter, call: Call) -> Value:
    dtype = out_spec(call.node).dtype
    start, end, weight = (e.operand(call[name], dtype) for name in ("self", "end", "weight"))
    return e("Add", start, e("Mul", weight, e("Sub", end, start)))


def _clamp(e: Emitter, call: Call) -> Value:
    low = call["min"] if call.has("min") else None
    high = call["max"] if call.has("max") else None
    dtype = compute_type(call["self"], low, high)
    x = e.operand(call["self"], dtype)
    if any(_has_dims(bound) for bound in (low, high)) or dtype is torch.bool:
        # torch lets the upper bound win where both apply.
        x = x if low is None else e("Max", x, e.operand(low, dtype))
        x = x if high is None else e("Min", x, e.operand(high, dtype))
    else:
        bounds = (None if bound is None else e.operand(bound, dtype) for bound in (low, high))
        x = e("Clip", x, *bounds)
    return result(e, call, x, dtype)


def _has_dims(argument: Any) -> bool:
    spec = argument.meta.get(SPEC) if isinstance(argument, fx.Node) else None
    return isinstance(spec, TensorSpec) and len(spec.shape) > 0


def _where(e: Emitter, call: Call) -> Value:
    a, b = call["self"], call["other"]
    dtype = compute_type(a, b)
    found = e("Where", truth(e, call["condition"]), e.operand(a, dtype), e.operand(b, dtype))
    return result(e, call, found, dtype)


def _masked_fill(e: Emitter, call: Call) -> Value:
    dtype = out_spec(call.node).dtype
    return e("Where", truth(e, call["mask"]), e.operand(call["value"], dtype), e.operand(call["self"], dtype))


# -- functions of one tensor --


def _rsqrt(e: Emitter, x: str, dtype: torch.dtype) -> str:
    del dtype
    return e("Reciprocal", e("Sqrt", x))


def _scaled(operator: str, factor: float) -> Translation:
    return unary(lambda e, x, dtype: e("Mul", e(operator, x), e.constant(factor, dtype)))


def _log1p(e: Emitter, x: str, dtype: torch.dtype) -> str:
    return e("Log", e("Add", x, e.constant(1, dtype)))


def _expm1(e: Emitter, x: str, dtype: torch.dtype) -> str:
    return e("Sub", e("Exp", x), e.constant(1, dtype))


def _exp2(e: Emitter, x: str, dtype: torch.dtype) -> str:
    return e("Pow", e.constant(2, dtype), x)


def _erfc(e: Emitter, x: str, dtype: torch.dtype) -> str:
    return e("Sub", e.constant(1, dtype), e("Erf", x))


def _silu(e: Emitter, x: str, dtype: torch.dtype) -> str:
    del dtype
    return e("Mul", x, e("Sigmoid", x))


def _log_sigmoid(e: Emitter, x: str, dtype: torch.dtype) -> str:
    del dtype
    return e("Neg", e("Softplus", e("Neg", x)))


def _frac(e: Emitter, x: str, dtype: torch.dtype) -> str:
    return e("Sub", x, truncated(e, x, dtype))


def _hardtanh(e: Emitter, call: Call) -> Value:
    dtype = out_spec(call.node).dtype
    return e("Clip", e[call["self"]], e.constant(call["min_val"], dtype), e.constant(call["max_val"], dtype))


def _relu6(e: Emitter, x: str, dtype: torch.dtype) -> str:
    return e("Clip", x, e.constant(0, dtype), e.constant(6, dtype))


def _relu(e: Emitter, x: str, dtype: torch.dtype) -> str:
    return e("Relu", x) if is_float(dtype) else e("Max", x, e.zero(dtype))


def _gelu(e: Emitter, call: Call) -> Value:
    return e("Gelu", e[call["self"]], approximate=call["approximate"])


def _elu(e: Emitter, call: Call) -> Value:
    x = e[call["self"]]
    dtype = out_spec(call.node).dtype
    alpha, scale, input_scale = call["alpha"], call["scale"], call["input_scale"]
    if input_scale == 1:
        found = e("Elu", x, alpha=float(alpha))
        return found if scale == 1 else e("Mul", found, e.constant(scale, dtype))
    negative = e("Mul", e("Sub", e("Exp", e("Mul", x, e.constant(input_scale, dtype))), e.constant(1, dtype)),
                 e.constant(alpha, dtype))  # fmt: skip
    found = e("Where", e("Greater", x, e.zero(dtype)), x, negative)
    return found if scale == 1 else e("Mul", found, e.constant(scale, dtype))


def _leaky_relu(e: Emitter, call: Call) -> Value:
    return e("LeakyRelu", e[call["self"]], alpha=float(call["negative_slope"]))


def _prelu(e: Emitter, call: Call) -> Value:
    """Translate a slope per channel, dimension 1, which ONNX aligns with the last dimension."""
    x, slope = call["self"], call["weight"]
    rank = len(call.spec("self").shape)
    weight = e[slope]
    if call.spec("weight").shape != (1,) and rank > 2:
        weight = e.unsqueeze(weight, *range(1, rank - 1))
    return e("PRelu", e[x], weight)


def _softplus(e: Emitter, call: Call) -> Value:
    """Translate log(1 + exp(beta x)) / beta; above the threshold both are x within float rounding."""
    dtype = out_spec(call.node).dtype
    x, beta = e[call["self"]], call["beta"]
    scaled = x if beta == 1 else e("Mul", x, e.constant(beta, dtype))
    found = e("Softplus", scaled)
    found = found if beta == 1 else e("Div", found, e.constant(beta, dtype))
    threshold = call["threshold"]
    return found if threshold >= 20 else e("Where", e("Greater", scaled, e.constant(threshold, dtype)), x, found)


def _shrink(*, hard: bool) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        size = float(call["lambd"])
        return e("Shrink", e[call["self"]], lambd=size, bias=0.0 if hard else size)

    return translate


def _threshold(e: Emitter, call: Call) -> Value:
    dtype = out_spec(call.node).dtype
    x = e[call["self"]]
    above = e("Greater", x, e.constant(call["threshold"], dtype))
    return e("Where", above, x, e.constant(call["value"], dtype))


def _glu(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    first, second = e.several("Split", 2, e[call["self"]], axis=call["dim"] % len(spec.shape), num_outputs=2)
    return e("Mul", first, e("Sigmoid", second))


def _isfinite(e: Emitter, x: str, dtype: torch.dtype) -> str:
    if not is_float(dtype):
        return e("Equal", x, x)
    return e("Not", e("Or", e("IsNaN", x), e("IsInf", x)))


def _float_only(operator: str) -> Callable[[Emitter, str, torch.dtype], str]:
    def build(e: Emitter, x: str, dtype: torch.dtype) -> str:
        return e(operator, x) if is_float(dtype) else e("Not", e("Equal", x, x))

    return build


def _round(e: Emitter, call: Call) -> Value:
    if call.has("decimals") and call["decimals"]:
        dtype = out_spec(call.node).dtype
        factor = e.constant(10.0 ** call["decimals"], dtype)
        return e("Div", e("Round", e("Mul", e[call["self"]], factor)), factor)
    return e("Round", e[call["self"]]) if is_float(call.spec("self").dtype) else e[call["self"]]


def _rounding(operator: str) -> Translation:
    return unary(lambda e, x, dtype: e(operator, x) if is_float(dtype) else x)


# -- values as they are --


def identity(e: Emitter, call: Call) -> Value:
    """Translate an operator that, in evaluation, hands on its first argument."""
    return e[first_operand(call)]


def _convert(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    target = out_spec(call.node).dtype
    onnx_type(target)
    return e.cast(e[call["self"]], spec.dtype, target)


def _copy(e: Emitter, call: Call) -> Value:
    """Translate the result of writing ``src`` into ``self``: its values, in the type and shape of ``self``."""
    target = out_spec(call.node)
    source = e.operand(call["src"], target.dtype)
    if call.spec("src").shape == target.shape:
        return source
    return e.expand(source, e.shape(e[call["self"]], call.spec("self")))


def _fill(e: Emitter, call: Call) -> Value:
    target = out_spec(call.node)
    value = e.operand(call["value"], target.dtype)
    return e.expand(value, e.shape(e[call["self"]], call.spec("self")))


def _no_dropout(e: Emitter, call: Call) -> Value:
    if call["train"]:
        raise UnsupportedOperatorError("dropout in training mode: lower the graph in evaluation mode")
    return identity(e, call)


def _table(translation: Translation, *names: str) -> dict[Any, Translation]:
    return dict.fromkeys(overloads(*names), translation)


TRANSLATIONS: dict[Any, Translation] = {
    **_table(binary("Add", alpha=True), "add.Tensor", "add.Scalar"),
    **_table(binary("Sub", alpha=True), "sub.Tensor", "sub.Scalar"),
    **_table(_rsub, "rsub.Tensor", "rsub.Scalar"),
    **_table(binary("Mul"), "mul.Tensor", "mul.Scalar"),
    **_table(_div, "div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode", "true_divide", "divide"),
    **_table(_floor_divide, "floor_divide"),
    **_table(_remainder, "remainder.Tensor", "remainder.Scalar"),
    **_table(_fmod, "fmod.Tensor", "fmod.Scalar"),
    **_table(_pow, "pow.Tensor_Tensor", "pow.Tensor_Scalar", "pow.Scalar"),
    **_table(unary(_square), "square.default"),
    **_table(_addc("Mul"), "addcmul.default"),
    **_table(_addc("Div"), "addcdiv.default"),
    **_table(_lerp, "lerp.Tensor", "lerp.Scalar"),
    **_table(_clamp, "clamp.default", "clamp.Tensor", "clip.default", "clip.Tensor"),
    **_table(_clamp, "clamp_min.default", "clamp_min.Tensor", "clamp_max.default", "clamp_max.Tensor"),
    **_table(binary("Max"), "maximum.default", "max.other"),
    **_table(binary("Min"), "minimum.default", "min.other"),
    **_table(_where, "where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"),
    **_table(_masked_fill, "masked_fill.Scalar", "masked_fill.Tensor"),
    # comparisons and logic
    **_table(compare("Equal"), "eq.Tensor", "eq.Scalar"),
    **_table(compare("Equal", negated=True), "ne.Tensor", "ne.Scalar"),
    **_table(compare("Less"), "lt.Tensor", "lt.Scalar"),
    **_table(compare("LessOrEqual"), "le.Tensor", "le.Scalar"),
    **_table(compare("Greater"), "gt.Tensor", "gt.Scalar"),
    **_table(compare("GreaterOrEqual"), "ge.Tensor", "ge.Scalar"),
    **_table(logical("And"), "logical_and.default"),
    **_table(logical("Or"), "logical_or.default"),
    **_table(logical("Xor"), "logical_xor.default"),
    **_table(predicate(lambda e, x, dtype: e("Not", e.cast(x, dtype, torch.bool))), "logical_not.default"),
    **_table(
        bitwise("And", "BitwiseAnd"), "bitwise_and.Tensor", "bitwise_and.Scalar", "__and__.Tensor", "__and__.Scalar"
    ),
    **_table(bitwise("Or", "BitwiseOr"), "bitwise_or.Tensor", "bitwise_or.Scalar", "__or__.Tensor", "__or__.Scalar"),
    **_table(
        bitwise("Xor", "BitwiseXor"), "bitwise_xor.Tensor", "bitwise_xor.Scalar", "__xor__.Tensor", "__xor__.Scalar"
    ),
    **_table(unary(lambda e, x, dtype: e("Not" if dtype is torch.bool else "BitwiseNot", x)), "bitwise_not.default"),
    **_table(predicate(_float_only("IsNaN")), "isnan.default"),
    **_table(predicate(_float_only("IsInf")), "isinf.default"),
    **_table(predicate(_isfinite), "isfinite.default"),
    # functions
    **_table(plain("Abs"), "abs.default"),
    **_table(plain("Acos"), "acos.default"),
    **_table(plain("Acosh"), "acosh.default"),
    **_table(plain("Asin"), "asin.default"),
    **_table(plain("Asinh"), "asinh.default"),
    **_table(plain("Atan"), "atan.default"),
    **_table(plain("Atanh"), "atanh.default"),
    **_table(plain("Cos"), "cos.default"),
    **_table(plain("Cosh"), "cosh.default"),
    **_table(plain("Erf"), "erf.default"),
    **_table(plain("Exp"), "exp.default"),
    **_table(plain("Log"), "log.default"),
    **_table(plain("Neg"), "neg.default"),
    **_table(plain("Reciprocal"), "reciprocal.default"),
    **_table(plain("Sigmoid"), "sigmoid.default"),
    **_table(plain("Sign"), "sign.default", "sgn.default"),
    **_table(plain("Sin"), "sin.default"),
    **_table(plain("Sinh"), "sinh.default"),
    **_table(plain("Sqrt"), "sqrt.default"),
    **_table(plain("Tan"), "tan.default"),
    **_table(plain("Tanh"), "tanh.default"),
    **_table(_rounding("Ceil"), "ceil.default"),
    **_table(_rounding("Floor"), "floor.default"),
    **_table(_round, "round.default", "round.decimals"),
    **_table(unary(truncated), "trunc.default", "fix.default"),
    **_table(unary(_frac), "frac.default"),
    **_table(unary(_rsqrt), "rsqrt.default"),
    **_table(unary(_log1p), "log1p.default"),
    **_table(unary(_expm1), "expm1.default"),
    **_table(unary(_exp2), "exp2.default"),
    **_table(unary(_erfc), "erfc.default"),
    **_table(_scaled("Log", 1 / math.log(2)), "log2.default"),
    **_table(_scaled("Log", 1 / math.log(10)), "log10.default"),
    # activations
    **_table(unary(_relu), "relu.default"),
    **_table(unary(_relu6), "relu6.default"),
    **_table(_hardtanh, "hardtanh.default"),
    **_table(plain("HardSwish"), "hardswish.default"),
    **_table(plain("HardSigmoid", alpha=1 / 6, beta=0.5), "hardsigmoid.default"),
    **_table(unary(_silu), "silu.default"),
    **_table(plain("Mish"), "mish.default"),
    **_table(_gelu, "gelu.default"),
    **_table(_elu, "elu.default"),
    **_table(plain("Selu", alpha=1.6732632423543772, gamma=1.0507009873554805), "selu.default"),
    **_table(lambda e, call: e("Celu", e[call["self"]], alpha=float(call["alpha"])), "celu.default"),
    **_table(_leaky_relu, "leaky_relu.default"),
    **_table(_prelu, "prelu.default", "_prelu_kernel.default"),
    **_table(_softplus, "softplus.default"),
    **_table(unary(_log_sigmoid), "log_sigmoid.default"),
    **_table(_shrink(hard=True), "hardshrink.default"),
    **_table(_shrink(hard=False), "softshrink.default"),
    **_table(_threshold, "threshold.default"),
    **_table(_glu, "glu.default"),
    # values as they are
    **_table(identity, "alias.default", "detach.default", "lift_fresh.default", "lift_fresh_copy.default"),
    **_table(identity, "clone.default", "contiguous.default", "positive.default", "resolve_conj.default"),
    **_table(identity, "resolve_neg.default"),
    **_table(_no_dropout, "dropout.default", "feature_dropout.default", "alpha_dropout.default"),
    **_table(_no_dropout, "feature_alpha_dropout.default"),
    **_table(lambda e, call: (_no_dropout(e, call), None), "native_dropout.default"),
    **_table(_convert, "to.dtype", "to.dtype_layout", "to.device", "to.other", "to.prim_Device", "to.prim_dtype"),
    **_table(_convert, "_to_copy.default", "type_as.default"),
    **_table(_copy, "copy.default"),
    **_table(_fill, "fill.Scalar", "fill.Tensor"),
}
