"""Operators that round values to few bits and take them back, and those that compute with such values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, axis_of, results, type_of
from graphopt.dialects.onnx.semantics.contraction import convolve, gemm
from graphopt.dialects.onnx.semantics.elementwise import cast
from graphopt.dialects.onnx.semantics.spatial import average_pool
from graphopt.dialects.onnx.semantics.windows import Windows

__all__ = ["TABLE"]

_RANGES: Final[dict[int, tuple[int, int]]] = {21: (0, 15), 22: (-8, 7), 25: (0, 3), 26: (-2, 1)}
"""The least and the largest number of types that are held in bytes and have fewer bits."""


def _placed(values: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Return scales or zero points so that they fit a tensor: of the whole, of each index of an axis, or of blocks."""
    if values.numel() == 1 and (values.dim() < 2 or not block_size):
        return values.reshape(())
    axis = axis_of(axis, x.dim()) if x.dim() > 1 else 0
    if values.dim() == 1 and not block_size:
        return values.reshape(-1, *[1] * (x.dim() - 1 - axis))
    if not block_size:
        block_size = -(-x.shape[axis] // values.shape[axis])
    return values.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """Return x / scale, rounded half to even, plus the zero point, within the range of the type.

    Numbers of four or two bits are held in bytes: only ``output_dtype`` says that they have fewer bits.
    """
    scale = _placed(scale, x, axis, block_size)
    dtype = zero_point.dtype if zero_point is not None else torch.uint8
    if output_dtype:
        dtype = type_of(output_dtype)
    division = type_of(precision) if precision else torch.promote_types(scale.dtype, torch.float32)
    shifted = x.to(division) / scale.to(division)
    if zero_point is not None:
        zero_point = _placed(zero_point, x, axis, block_size)
    if dtype.is_floating_point:
        return cast(
            shifted if zero_point is None else shifted + zero_point.to(division), dtype, saturate=bool(saturate)
        )
    low, high = _RANGES.get(output_dtype) or (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return _rounded(shifted, zero_point, dtype, low, high)


def _rounded(x: Tensor, zero_point: Tensor | None, dtype: torch.dtype, low: int, high: int) -> Tensor:
    rounded = torch.round(x)
    if zero_point is not None:
        rounded = rounded + zero_point.to(x.dtype)
    return rounded.clamp(low, high).to(dtype)


def _dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """Return (x − zero point) · scale."""
    dtype = type_of(output_dtype) if output_dtype else scale.dtype
    # Numbers of 32 bits do not fit into all floating-point types.
    wide = torch.promote_types(dtype, torch.float32) if x.dtype.is_floating_point else torch.int64
    shifted = x.to(wide)
    if zero_point is not None:
        shifted = shifted - _placed(zero_point, x, axis, block_size).to(wide)
    return shifted.to(dtype) * _placed(scale, x, axis, block_size).to(dtype)


def _dynamic_quantize(x: Tensor, *, outputs: int = 1) -> Any:
    """Quantize to eight bits without sign by the range of the values, which is widened to hold zero."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    # Where all is zero any scale does.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round((-low / scale).clamp(0, 255)).to(torch.uint8)
    return results(outputs, _rounded(x / scale, zero_point, torch.uint8, 0, 255), scale, zero_point)


def _centred(x: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return integers less their zero point, in float64, which holds their products and sums exactly."""
    exact = x.to(torch.float64)
    return exact if zero_point is None else exact - zero_point.to(torch.float64)


def _of_rows(values: Tensor | None) -> Tensor | None:
    return values.unsqueeze(-1) if values is not None and values.dim() == 1 and values.numel() > 1 else values


def _matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    return (_centred(a, _of_rows(a_zero_point)) @ _centred(b, b_zero_point)).to(torch.int32)


def _matmul_integer_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    product = _centred(a, a_zero_point) @ _centred(b, b_zero_point)
    y = (product * (a_scale.double() * b_scale.double())).to(a_scale.dtype)
    return y if bias is None else y + bias


def _dynamic_matmul(
    a: Tensor, b: Tensor, b_scale: Tensor, b_zero_point: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Quantize the left factor by its range, multiply, and return to the values' own scale."""
    quantized, scale, zero_point = _dynamic_quantize(a, outputs=3)
    return _matmul_integer_to_float(quantized, b, scale, b_scale, zero_point, b_zero_point, bias)


def _requantized(exact: Tensor, zero_point: Tensor | None, like: torch.dtype) -> Tensor:
    """Round values that are divided by the result's scale already."""
    dtype = like if zero_point is None else zero_point.dtype
    if dtype.is_floating_point:
        return cast(exact.float(), dtype)
    return _rounded(exact, zero_point, dtype, torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def _qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    product = _centred(a, _of_rows(a_zero_point)) @ _centred(b, b_zero_point)
    rows = _of_rows(a_scale)
    assert rows is not None
    return _requantized(product * (rows.double() * b_scale.double() / y_scale.double()), y_zero_point, a.dtype)


def _integer_conv(
    x: Tensor,
    weight: Tensor,
    x_zero_point: Tensor | None,
    w_zero_point: Tensor | None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolve integers less their zero points, in float64; what is padded stands for zero."""
    if w_zero_point is not None and w_zero_point.dim() == 1:
        w_zero_point = w_zero_point.reshape(-1, *[1] * (weight.dim() - 1))
    windows = Windows.of(x, weight.shape[2:], strides, dilations, pads, auto_pad)
    return convolve(_centred(x, x_zero_point), _centred(weight, w_zero_point), None, windows, group)


def _conv_integer(
    x: Tensor,
    weight: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    return _integer_conv(x, weight, x_zero_point, w_zero_point, **attributes).to(torch.int32)


def _qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    total = _integer_conv(x, weight, x_zero_point, w_zero_point, **attributes)
    channels = (-1, *[1] * (x.dim() - 2))
    if bias is not None:
        total = total + bias.double().reshape(channels)
    scale = x_scale.double() * w_scale.double() / y_scale.double()
    return _requantized(total * (scale.reshape(channels) if scale.dim() else scale), y_zero_point, x.dtype)


def _real(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return the number that a quantized value stands for, in float64."""
    return _centred(x, zero_point) * scale.double()


def _qlinear(function: Function) -> Function:
    """Return an operator on one or two quantized tensors, each followed by its scale and zero point."""

    def computed(*operands: Any, **attributes: Any) -> Tensor:
        # Of the result there are a scale and perhaps a zero point, and no tensor.
        count = (len(operands) - 1) // 3
        operands = (*operands, None)
        given = [_real(*operands[3 * i : 3 * i + 3]) for i in range(count)]
        scale, zero_point = operands[3 * count], operands[3 * count + 1]
        return _requantized(function(*given, **attributes) / scale.double(), zero_point, operands[0].dtype)

    return computed


def _qlinear_concat(y_scale: Tensor, y_zero_point: Tensor, inputs: list[Tensor], *, axis: int = 0) -> Tensor:
    parts = [_real(*inputs[i : i + 3]) for i in range(0, len(inputs), 3)]
    return _requantized(torch.cat(parts, axis) / y_scale.double(), y_zero_point, inputs[0].dtype)


def _mean_of_planes(x: Tensor, *, channels_last: int = 0) -> Tensor:
    dims = list(range(1, x.dim() - 1)) if channels_last else list(range(2, x.dim()))
    return x.mean(dims, keepdim=True)


def _average(x: Tensor, *, channels_last: int = 0, **attributes: Any) -> Tensor:
    if not channels_last:
        return average_pool(x, **attributes)
    return average_pool(x.movedim(-1, 1), **attributes).movedim(1, -1)


def _softmax(x: Tensor, *, axis: int = -1, opset: int | None = None) -> Tensor:
    """Return the softmax; before opset 13 over all dimensions from the axis on, as one."""
    if opset is None or opset >= 13:
        return F.softmax(x, axis)
    return F.softmax(x.flatten(axis_of(axis, x.dim())), -1).reshape(x.shape)


def _leaky(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def _q_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Return alpha·A·B + C of quantized matrices, C in units of the factors' scales; quantized if a scale is given."""
    if transB and b_zero_point.numel() > 1:
        b_zero_point = b_zero_point.unsqueeze(-1)
    total = gemm(_centred(a, a_zero_point), _centred(b, b_zero_point), transA=transA, transB=transB)
    if c is not None:
        total = total + c.double()
    total = total * (alpha * a_scale.double() * b_scale.double())
    return total.to(a_scale.dtype) if y_scale is None else _requantized(total / y_scale.double(), y_zero_point, a.dtype)


def _matmul_few_bits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    block_size: int,
    accuracy_level: int = 0,
    bits: int = 4,
    **others: Any,
) -> Tensor:
    """Multiply by the transpose of a matrix (N, K) whose numbers have few bits, in blocks along K with a scale each."""
    blocks = -(-K // block_size)
    numbers = _unpacked(b.reshape(N, blocks, -1), bits)[..., :block_size].to(a.dtype)
    scales = scales.reshape(N, blocks, 1)
    if zero_points is None:
        shift: Any = 2 ** (bits - 1)
    elif zero_points.dtype == torch.uint8:
        shift = _unpacked(zero_points.reshape(N, -1), bits)[:, :blocks].unsqueeze(-1).to(a.dtype)
    else:
        shift = zero_points.reshape(N, blocks, 1)
    if g_idx is not None:
        groups = g_idx.to(torch.int64).reshape(-1)[:K]
        flat = numbers.reshape(N, -1)[:, :K]
        moved = shift if not isinstance(shift, Tensor) else shift.squeeze(-1)[:, groups]
        weight = (flat - moved) * scales.squeeze(-1)[:, groups]
    else:
        weight = ((numbers - shift) * scales).reshape(N, -1)[:, :K]
    y: Tensor = a @ weight.t().to(a.dtype)
    return y if bias is None else y + bias


def _unpacked(x: Tensor, bits: int) -> Tensor:
    """Return the numbers of a few bits that bytes hold one after the other, the lowest bits first."""
    if bits == 8:
        return x
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    numbers: Tensor = torch.bitwise_right_shift(x.unsqueeze(-1), shifts) & (2**bits - 1)
    return numbers.flatten(-2)


TABLE: Final[dict[str, Function]] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": _quantize,
    "com.microsoft.DequantizeLinear": _dequantize,
    "com.microsoft.DynamicQuantizeMatMul": _dynamic_matmul,
    "com.microsoft.MatMulIntegerToFloat": _matmul_integer_to_float,
    "com.microsoft.MatMulNBits": _matmul_few_bits,
    "com.microsoft.QGemm": _q_gemm,
    "com.microsoft.QLinearAdd": _qlinear(torch.add),
    "com.microsoft.QLinearAveragePool": _qlinear(_average),
    "com.microsoft.QLinearConcat": _qlinear_concat,
    "com.microsoft.QLinearGlobalAveragePool": _qlinear(_mean_of_planes),
    "com.microsoft.QLinearLeakyRelu": _qlinear(_leaky),
    "com.microsoft.QLinearMul": _qlinear(torch.mul),
    "com.microsoft.QLinearSigmoid": _qlinear(torch.sigmoid),
    "com.microsoft.QLinearSoftmax": _qlinear(_softmax),
    "com.microsoft.QuantizeLinear": _quantize,
}
