"""Operators that multiply and sum: matrix products, convolutions, einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function
from graphopt.dialects.onnx.semantics.windows import Windows

__all__ = ["TABLE", "convolve", "gemm"]


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Return alpha·A·B + beta·C, with A or B transposed where told so."""
    product = (a.t() if transA else a) @ (b.t() if transB else b)
    if alpha != 1:
        product = (product * alpha).to(a.dtype)
    if c is None:
        return product
    return product + (c if beta == 1 else (c * beta).to(a.dtype))


def _einsum(inputs: list[Tensor], *, equation: str) -> Tensor:
    return torch.einsum(equation, *inputs)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    return convolve(x, weight, bias, Windows.of(x, weight.shape[2:], strides, dilations, pads, auto_pad), group)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows, group: int) -> Tensor:
    """Convolve over one to three spatial dimensions, any of them padded unevenly."""
    padding = windows.begins
    if windows.begins != windows.ends:
        x, padding = windows.padded(x), [0] * len(windows.begins)
    convolution: Function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[_spatial_rank(x)]
    found: Tensor = convolution(x, weight, bias, windows.strides, padding, windows.dilations, group)
    return found


def _spatial_rank(x: Tensor) -> int:
    if not 3 <= x.dim() <= 5:
        raise NotImplementedError(f"torch convolves over one to three spatial dimensions, not over {x.dim() - 2}")
    return x.dim() - 2


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolve backwards, cut ``pads`` off the result and add ``output_padding`` at its ends.

    Where the output's shape is given, or the automatic padding asks for input·stride, the pads follow from it.
    """
    rank = _spatial_rank(x)
    windows = Windows.of(x, weight.shape[2:], strides, dilations, pads, "NOTSET")
    added = list(output_padding or [0] * rank)
    full = [
        s * (n - 1) + span + more
        for s, n, span, more in zip(windows.strides, x.shape[2:], windows.spans, added, strict=True)
    ]
    begins, ends = windows.begins, windows.ends
    if output_shape is not None or auto_pad.startswith("SAME"):
        wanted = output_shape or [n * s for n, s in zip(x.shape[2:], windows.strides, strict=True)]
        # A result that is too short is padded with zeros, which the crop of a negative amount below does.
        excess = [f - w for f, w in zip(full, wanted[-rank:], strict=True)]
        begins = [e // 2 if auto_pad == "SAME_UPPER" else e - e // 2 for e in excess]
        ends = [e - b for e, b in zip(excess, begins, strict=True)]
    elif auto_pad == "VALID":
        begins = ends = [0] * rank
    convolution: Function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[rank]
    limits = [max(s, d) for s, d in zip(windows.strides, windows.dilations, strict=True)]
    if begins == ends and min(begins) >= 0 and all(a < m for a, m in zip(added, limits, strict=True)):
        native: Tensor = convolution(x, weight, bias, windows.strides, begins, added, group, windows.dilations)
        return native
    y = convolution(x, weight, None, windows.strides, 0, 0, group, windows.dilations)
    crops = [n for b, e, a in reversed(list(zip(begins, ends, added, strict=True))) for n in (-b, a - e)]
    y = F.pad(y, crops)
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


def _activated(y: Tensor, activation: str | None, parameters: Sequence[float]) -> Tensor:
    """Apply the function that ONNX Runtime has fused into an operator; its parameters are alpha, beta and so on."""
    if not activation:
        return y
    given = [*parameters, *[0.0] * 2]
    functions: dict[str, Function] = {
        "Relu": lambda: y.clamp(min=0),
        "Tanh": lambda: y.tanh(),
        "Sigmoid": lambda: y.sigmoid(),
        "LeakyRelu": lambda: F.leaky_relu(y, given[0]),
        "Clip": lambda: y.clamp(given[0], given[1]),
        "HardSigmoid": lambda: (given[0] * y + given[1]).clamp(0, 1),
        "HardSwish": lambda: y * (y / 6 + 0.5).clamp(0, 1),
        "Elu": lambda: F.elu(y, given[0] if parameters else 1.0),
        "Gelu": lambda: F.gelu(y),
        "Softplus": lambda: torch.logaddexp(y, torch.zeros_like(y)),
        "Softsign": lambda: y / (1 + y.abs()),
        "ThresholdedRelu": lambda: torch.where(y > given[0], y, torch.zeros_like(y)),
    }
    if activation not in functions:
        raise NotImplementedError(f"an operator that has {activation!r} fused into it")
    found: Tensor = functions[activation]()
    return found


def _fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    *,
    activation: str | None = None,
    activation_params: Sequence[float] | None = None,
    **attributes: Any,
) -> Tensor:
    """Convolve, add another tensor, apply a function."""
    y = _conv(x, weight, bias, **attributes)
    return _activated(y if z is None else y + z, activation, activation_params or ())


def _nhwc_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **attributes: Any) -> Tensor:
    """Convolve a tensor whose channels are last; the weight's input channels are last, too."""
    return _conv(x.movedim(-1, 1), weight.movedim(-1, 1), bias, **attributes).movedim(1, -1)


def _fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str | None = None,
    activation_alpha: float = 0.0,
    activation_beta: float = 0.0,
    activation_gamma: float = 0.0,
    **attributes: Any,
) -> Tensor:
    return _activated(gemm(a, b, c, **attributes), activation, (activation_alpha, activation_beta))


def _transposed(x: Tensor, swap: int, swap_batch: int) -> Tensor:
    """Bring a matrix into place: with ``swap_batch`` the first dimension goes before the last but one."""
    if swap_batch:
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if swap and x.dim() > 1 else x


def _fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    product = _transposed(a, transA, transBatchA) @ _transposed(b, transB, transBatchB)
    return product if alpha == 1 else product * alpha


def _fused_matmul_activation(
    a: Tensor,
    b: Tensor,
    *,
    activation: str | None = None,
    activation_alpha: float = 0.0,
    activation_axis: int = 0,
    activation_beta: float = 0.0,
    activation_gamma: float = 0.0,
    **attributes: Any,
) -> Tensor:
    y = _fused_matmul(a, b, **attributes)
    if activation == "Softmax":
        return F.softmax(y, activation_axis)
    return _activated(y, activation, (activation_alpha, activation_beta))


TABLE: Final[dict[str, Function]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Det": torch.linalg.det,
    "Einsum": _einsum,
    "Gemm": gemm,
    "MatMul": torch.matmul,
    "com.microsoft.FusedConv": _fused_conv,
    "com.microsoft.FusedGemm": _fused_gemm,
    "com.microsoft.FusedMatMul": _fused_matmul,
    "com.microsoft.FusedMatMulActivation": _fused_matmul_activation,
    "com.microsoft.Inverse": torch.linalg.inv,
    "com.microsoft.NhwcConv": _nhwc_conv,
    "com.microsoft.TransposeMatMul": _fused_matmul,
}
