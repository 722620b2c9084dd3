"""Pointwise operators: unary functions, arithmetic with broadcasting, comparisons, masks, casts."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, type_of, unsigned_as_signed, wide

__all__ = ["TABLE", "cast"]


def _relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def _celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def _selu(x: Tensor, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323) -> Tensor:
    return gamma * F.elu(x, alpha)


def _thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def _shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    kept = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))
    return kept.to(x.dtype)


def _softplus(x: Tensor) -> Tensor:
    # torch's own is the identity from 20 on, which is off by 2e-9.
    return torch.logaddexp(x, torch.zeros_like(x))


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _swiglu(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    return _swish(a, alpha=alpha) * b


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _hard_swish(x: Tensor) -> Tensor:
    return x * (x / 6 + 0.5).clamp(0, 1)


def _softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


def _is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_negative:
        found = found | (x == -math.inf)
    return found | (x == math.inf) if detect_positive else found


def _clip(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """Bound values; where the bounds cross, the upper one holds."""
    for bound, limit in ((low, torch.clamp_min), (high, torch.clamp_max)):
        if bound is not None:
            x = limit(x, bound.to(x.dtype) if isinstance(bound, Tensor) else bound).to(x.dtype)
    return x


def _add(a: Any, b: Any) -> Any:
    return torch.logical_or(a, b) if isinstance(a, Tensor) and a.dtype == torch.bool else a + b


def _sub(a: Any, b: Any) -> Any:
    return a - b


def _mul(a: Any, b: Any) -> Any:
    return a * b


def _div(a: Any, b: Any) -> Any:
    """Divide; of integers the quotient is cut towards zero."""
    if any(torch.is_floating_point(t) for t in (a, b) if isinstance(t, Tensor)) or isinstance(b, float):
        return a / b
    return torch.div(torch.as_tensor(a), b, rounding_mode="trunc")


def _mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Return the remainder: with the divisor's sign, or with ``fmod`` the dividend's."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _pow(x: Tensor, y: Any) -> Tensor:
    """Raise to a power, in the type of the base."""
    return torch.pow(x, y).to(x.dtype)


def _bit_shift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    left = direction.upper() == "LEFT"
    if x.dtype == torch.int64:
        return torch.bitwise_left_shift(x, y) if left else torch.bitwise_right_shift(x, y)
    wider, by = x.to(torch.int64), y.to(torch.int64)
    return (torch.bitwise_left_shift(wider, by) if left else torch.bitwise_right_shift(wider, by)).to(x.dtype)


def _reciprocal(x: Tensor) -> Tensor:
    return 1 / x


def _sum(terms: list[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _mean(terms: list[Tensor]) -> Tensor:
    return _sum(terms) / len(terms)


def _max(terms: list[Tensor]) -> Tensor:
    return reduce(torch.maximum, terms)


def _min(terms: list[Tensor]) -> Tensor:
    return reduce(torch.minimum, terms)


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


def _bias_gelu(a: Tensor, b: Tensor) -> Tensor:
    return F.gelu(a + b)


def _fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _bias_split_gelu(x: Tensor, bias: Tensor) -> Tensor:
    value, gate = (x + bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


_FLOAT8: Final = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


def _cast(x: Tensor, *, to: int | torch.dtype, saturate: int = 1, round_mode: str = "up") -> Tensor:
    if to in _BITS:
        return _few_bits(x, *_BITS[to])
    return cast(x, type_of(to), saturate=bool(saturate))


def _cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return cast(x, like.dtype, saturate=bool(saturate))


def cast(x: Tensor, dtype: torch.dtype, *, saturate: bool = True) -> Tensor:
    """Convert to another type: to integers towards zero, to a float8 type to its nearest value.

    With ``saturate`` what a float8 type cannot hold becomes its largest value; without, infinity or NaN.
    """
    if dtype in _FLOAT8:
        largest = torch.finfo(dtype).max
        if saturate:
            return wide(x).clamp(-largest, largest).to(dtype)
        if dtype != torch.float8_e5m2:
            x = wide(x)
            # Rounding may still bring a value back into range: the bound is half a step above the largest.
            step = largest - torch.tensor(largest * 0.94).to(dtype).float().item()
            return torch.where(x.abs() > largest + step / 2, math.nan, x).to(dtype)
    if x.is_complex() and not dtype.is_complex:
        x = x.real
    return x.to(dtype)


_BITS: Final[dict[int | torch.dtype, tuple[int, bool]]] = {21: (4, False), 22: (4, True), 25: (2, False), 26: (2, True)}
"""How many bits types of less than a byte have, and whether they have a sign."""


def _few_bits(x: Tensor, count: int, signed: bool) -> Tensor:
    """Return what a few bits hold of a number, in a byte: its lowest bits."""
    low = torch.bitwise_and(x.to(torch.int64), 2**count - 1)
    return torch.where(low >= 2 ** (count - 1), low - 2**count, low).to(torch.int8) if signed else low.to(torch.uint8)


_UNARY: Final[dict[str, Function]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Celu": _celu,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Elu": _elu,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "IsInf": _is_inf,
    "IsNaN": torch.isnan,
    "LeakyRelu": _leaky_relu,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": _reciprocal,
    "Relu": _relu,
    "Round": torch.round,
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Sqrt": torch.sqrt,
    "Swish": _swish,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "ThresholdedRelu": _thresholded_relu,
    "com.microsoft.FastGelu": _fast_gelu,
    "com.microsoft.Gelu": F.gelu,
    "com.microsoft.QuickGelu": _quick_gelu,
}

_SEVERAL: Final[dict[str, Function]] = {
    "Add": _add,
    "And": torch.logical_and,
    "BitShift": _bit_shift,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Clip": _clip,
    "Div": _div,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Max": _max,
    "Mean": _mean,
    "Min": _min,
    "Mod": _mod,
    "Mul": _mul,
    "Or": torch.logical_or,
    "PRelu": _prelu,
    "Pow": _pow,
    "Sub": _sub,
    "Sum": _sum,
    "SwiGLU": _swiglu,
    "Where": _where,
    "Xor": torch.logical_xor,
    "com.microsoft.BiasGelu": _bias_gelu,
    "com.microsoft.BiasSplitGelu": _bias_split_gelu,
}

TABLE: Final[dict[str, Function]] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    **{name: unsigned_as_signed(function) for name, function in (_UNARY | _SEVERAL).items()},
}
