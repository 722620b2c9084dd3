"""Compare what operators compute with ONNX Runtime, and test what leaves operators to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.dialects.onnx.operators import op
from graphopt.dialects.onnx.semantics import runtime

Draw = Callable[..., Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(low + high + sum(shape))
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def byte(*shape: int) -> Tensor:
    return integers(0, 256, *shape, dtype=torch.uint8)


def signed(*shape: int) -> Tensor:
    return integers(-128, 128, *shape, dtype=torch.int8)


def scalar(value: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.int32)
X = normal(2, 5, 8)
IMAGE = normal(2, 4, 7, 6)
TABLES = (normal(16, 8).cos(), normal(16, 8).sin())
GROUPED = (normal(2, 5, 32), normal(2, 5, 16), normal(2, 5, 16, seed=3))
ZERO = scalar(131, torch.uint8)

Call = tuple[str, list[Any], dict[str, Any]]

MICROSOFT: dict[str, Call] = {
    "attention": ("Attention", [X, normal(8, 24), normal(24)], {"num_heads": 2}),
    "attention, a mask and a scale": (
        "Attention",
        [X, normal(8, 24), normal(24), MASK],
        {"num_heads": 2, "scale": 0.3, "mask_filter_value": -5.0},
    ),
    "attention, lengths": (
        "Attention",
        [X, normal(8, 24), normal(24), scalar([4, 2], torch.int32)],
        {"num_heads": 2},
    ),
    "attention, ends and starts": (
        "Attention",
        [X, normal(8, 24), normal(24), scalar([4, 5, 1, 2], torch.int32)],
        {"num_heads": 2},
    ),
    "attention, causal, other sizes": (
        "Attention",
        [X, normal(8, 20), normal(20)],
        {"num_heads": 2, "unidirectional": 1, "qkv_hidden_sizes": [8, 8, 4]},
    ),
    "attention, a past": (
        "Attention",
        [X, normal(8, 24), normal(24), None, normal(2, 2, 2, 3, 4)],
        {"num_heads": 2, "unidirectional": 1, "outputs": 2},
    ),
    "attention, a mask by query": (
        "Attention",
        [X, normal(8, 24), normal(24), integers(0, 2, 2, 5, 5, dtype=torch.int32)],
        {"num_heads": 2},
    ),
    "bias-gelu": ("BiasGelu", [X, normal(8)], {}),
    "dequantize by axis": (
        "DequantizeLinear",
        [byte(3, 4), normal(4).abs(), byte(4)],
        {"axis": 1},
    ),
    "dynamic matmul": (
        "DynamicQuantizeMatMul",
        [normal(3, 8), byte(8, 5), scalar(0.05), ZERO, normal(5)],
        {},
    ),
    "embeddings": (
        "EmbedLayerNormalization",
        [
            *(integers(0, 9, 2, 5, dtype=torch.int32), integers(0, 2, 2, 5, dtype=torch.int32), normal(9, 8)),
            *(normal(5, 8), normal(2, 8), normal(8, seed=1), normal(8, seed=2), MASK),
        ],
        {"epsilon": 1e-5, "outputs": 2},
    ),
    "fast-gelu": ("FastGelu", [X, normal(8)], {}),
    "fast-gelu, no bias": ("FastGelu", [X], {}),
    "fused-conv": (
        "FusedConv",
        [IMAGE, normal(6, 2, 3, 2), normal(6)],
        {"group": 2, "pads": [1, 0, 2, 1], "strides": [2, 1], "activation": "Relu"},
    ),
    "fused-conv, a sum": (
        "FusedConv",
        [IMAGE, normal(6, 4, 1, 1), normal(6), normal(2, 6, 7, 6)],
        {"activation": "Relu"},
    ),
    "fused-conv, leaky": (
        "FusedConv",
        [IMAGE, normal(6, 4, 1, 1), normal(6)],
        {"activation": "LeakyRelu", "activation_params": [0.2]},
    ),
    "fused-conv, clipped": (
        "FusedConv",
        [IMAGE, normal(6, 4, 1, 1), normal(6)],
        {"activation": "Clip", "activation_params": [-0.5, 0.5]},
    ),
    "fused-conv, hard-sigmoid": (
        "FusedConv",
        [IMAGE, normal(6, 4, 1, 1), normal(6)],
        {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]},
    ),
    "fused-gemm": (
        "FusedGemm",
        [normal(3, 4), normal(5, 4), normal(5)],
        {"transB": 1, "alpha": 0.5, "beta": 2.0, "activation": "LeakyRelu", "activation_alpha": 0.3},
    ),
    "fused-matmul": ("FusedMatMul", [normal(2, 4, 3), normal(2, 5, 4)], {"alpha": 0.5, "transA": 1, "transB": 1}),
    "fused-matmul, batches": (
        "FusedMatMul",
        [normal(3, 2, 4), normal(2, 4, 5)],
        {"transBatchA": 1, "transBatchB": 0},
    ),
    "fused-matmul, both swapped": (
        "FusedMatMul",
        [normal(4, 2, 3), normal(2, 4, 5)],
        {"transBatchA": 1, "transA": 1},
    ),
    "gelu": ("Gelu", [X], {}),
    "grouped": (
        "GroupQueryAttention",
        [*GROUPED, None, None, scalar([4, 4], torch.int32), scalar(5, torch.int32)],
        {"num_heads": 4, "kv_num_heads": 2, "outputs": 3},
    ),
    "grouped, a past and rotary": (
        "GroupQueryAttention",
        [
            *(normal(2, 1, 64), normal(2, 1, 32), normal(2, 1, 32, seed=3), normal(2, 2, 6, 16), normal(2, 2, 6, 16)),
            *(scalar([6, 6], torch.int32), scalar(7, torch.int32), *TABLES),
        ],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "outputs": 3},
    ),
    "grouped, packed, rotary, interleaved": (
        "GroupQueryAttention",
        [
            *(normal(2, 5, 128), None, None, None, None),
            *(scalar([4, 4], torch.int32), scalar(5, torch.int32), *TABLES),
        ],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "rotary_interleaved": 1, "outputs": 3},
    ),
    "grouped, window and cap": (
        "GroupQueryAttention",
        [*GROUPED, None, None, scalar([4, 4], torch.int32), scalar(5, torch.int32)],
        {"num_heads": 4, "kv_num_heads": 2, "outputs": 3, "local_window_size": 2, "softcap": 2.0},
    ),
    "grouped, smooth": (
        "GroupQueryAttention",
        [*GROUPED, None, None, scalar([4, 4], torch.int32), scalar(5, torch.int32)],
        {"num_heads": 4, "kv_num_heads": 2, "outputs": 3, "smooth_softmax": 1},
    ),
    "grouped, sinks": (
        "GroupQueryAttention",
        [
            *(*GROUPED, None, None, scalar([4, 4], torch.int32)),
            *(scalar(5, torch.int32), None, None, None, None, normal(4)),
        ],
        {"num_heads": 4, "kv_num_heads": 2, "outputs": 3},
    ),
    "inverse": ("Inverse", [normal(2, 3, 3)], {}),
    "matmul to float": (
        "MatMulIntegerToFloat",
        [byte(3, 8), byte(8, 5), scalar(0.1), scalar(0.2), ZERO, scalar(120, torch.uint8), normal(5)],
        {},
    ),
    "matmul of four bits": (
        "MatMulNBits",
        [normal(3, 40), byte(6, 3, 8), normal(6, 3)],
        {"K": 40, "N": 6, "bits": 4, "block_size": 16},
    ),
    "matmul of four bits, zero points": (
        "MatMulNBits",
        [normal(3, 40), byte(6, 3, 8), normal(6, 3), byte(6, 2)],
        {"K": 40, "N": 6, "bits": 4, "block_size": 16},
    ),
    "matmul of eight bits": (
        "MatMulNBits",
        [normal(3, 32), byte(6, 2, 16), normal(6, 2)],
        {"K": 32, "N": 6, "bits": 8, "block_size": 16},
    ),
    "heads": ("MultiHeadAttention", [X, normal(2, 6, 8), normal(2, 6, 8, seed=4)], {"num_heads": 2}),
    "heads, bias and mask": (
        "MultiHeadAttention",
        [X, normal(2, 5, 8, seed=5), normal(2, 5, 8, seed=4), normal(24), MASK, normal(1, 2, 5, 5)],
        {"num_heads": 2, "scale": 0.3},
    ),
    "heads, causal, a past": (
        "MultiHeadAttention",
        [X, normal(2, 5, 8, seed=5), X, None, None, None, normal(2, 2, 3, 4), normal(2, 2, 3, 4, seed=1)],
        {"num_heads": 2, "unidirectional": 1, "outputs": 3},
    ),
    "heads, a cache": ("MultiHeadAttention", [X, normal(2, 2, 6, 4), normal(2, 2, 6, 4, seed=4)], {"num_heads": 2}),
    "heads, lengths": (
        "MultiHeadAttention",
        [X, normal(2, 6, 8), normal(2, 6, 8, seed=4), None, scalar([6, 3], torch.int32)],
        {"num_heads": 2},
    ),
    "max-pool, channels last": (
        "NhwcMaxPool",
        [byte(2, 7, 6, 4)],
        {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]},
    ),
    "quantized gemm": (
        "QGemm",
        [byte(3, 8), scalar(0.1), ZERO, signed(5, 8), scalar(0.02), scalar(0, torch.int8), None, scalar(0.5), ZERO],
        {"transB": 1},
    ),
    "quantized gemm by column, to float": (
        "QGemm",
        [byte(3, 8), scalar(0.1), ZERO, signed(8, 5), normal(5).abs(), signed(5), integers(0, 99, 5).int()],
        {"alpha": 0.5},
    ),
    "quantized sum": (
        "QLinearAdd",
        [byte(3, 4), scalar(0.1), ZERO, byte(4), scalar(0.2), ZERO, scalar(0.4), ZERO],
        {},
    ),
    "quantized pool": (
        "QLinearAveragePool",
        [byte(2, 4, 7, 6), scalar(0.1), ZERO, scalar(0.11), ZERO],
        {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]},
    ),
    "quantized concat": (
        "QLinearConcat",
        [scalar(0.1), ZERO, [byte(2, 3), scalar(0.05), ZERO, byte(2, 4), scalar(0.15), ZERO]],
        {"axis": 1},
    ),
    "quantized mean": (
        "QLinearGlobalAveragePool",
        [byte(2, 4, 7, 6), scalar(0.1), ZERO, scalar(0.02), ZERO],
        {"channels_last": 0},
    ),
    "quantized leaky": ("QLinearLeakyRelu", [byte(3, 4), scalar(0.1), ZERO, scalar(0.2), ZERO], {"alpha": 0.3}),
    "quantized product": (
        "QLinearMul",
        [byte(3, 4), scalar(0.1), ZERO, byte(4), scalar(0.2), ZERO, scalar(0.7), ZERO],
        {},
    ),
    "quantized sigmoid": (
        "QLinearSigmoid",
        [byte(3, 4), scalar(0.1), ZERO, scalar(1 / 256), scalar(0, torch.uint8)],
        {},
    ),
    "quantized softmax": (
        "QLinearSoftmax",
        [byte(3, 4), scalar(0.1), ZERO, scalar(1 / 256), scalar(0, torch.uint8)],
        {"axis": -1, "opset": 13},
    ),
    "quantize by axis": ("QuantizeLinear", [normal(3, 4), normal(4).abs() / 50, byte(4)], {"axis": 1}),
    "quick-gelu": ("QuickGelu", [X], {"alpha": 1.5}),
    "rotary": (
        "RotaryEmbedding",
        [normal(2, 5, 32), integers(0, 16, 2, 5), *TABLES],
        {},
    ),
    "rotary from a position on, heads in front": (
        "RotaryEmbedding",
        [normal(2, 3, 5, 16), scalar([4], torch.int64), *TABLES],
        {"interleaved": 1},
    ),
    "rotary of a part": (
        "RotaryEmbedding",
        [normal(2, 5, 48), integers(0, 16, 2, 5), *TABLES],
        {"num_heads": 2, "rotary_embedding_dim": 16},
    ),
    "skip-layer-norm": (
        "SkipLayerNormalization",
        [X, normal(2, 5, 8, seed=1), normal(8), normal(8, seed=1), normal(8, seed=2)],
        {"epsilon": 1e-5},
    ),
    "skip-rms-norm": (
        "SkipSimplifiedLayerNormalization",
        [X, normal(2, 5, 8, seed=1), normal(8), normal(8, seed=2)],
        {"epsilon": 1e-5},
    ),
    "trilu": ("Trilu", [normal(4, 5), scalar(1, torch.int64)], {"upper": 0}),
    "transposed matmul": ("TransposeMatMul", [normal(4, 3), normal(4, 5)], {"transA": 1}),
}
"""Calls of ONNX Runtime's own operators that it has kernels for on the CPU."""

UNCHECKED = {
    "BiasSoftmax": "ONNX Runtime has it for CUDA only",
    "BiasSplitGelu": "ONNX Runtime has it for CUDA only",
    "FusedMatMulActivation": "ONNX Runtime has it for DirectML only",
    "GroupNorm": "ONNX Runtime has it for CUDA only",
    "NhwcConv": "ONNX Runtime has it for CUDA only",
    "SimplifiedLayerNormalization": "ONNX Runtime has it in the default domain",
    "SkipGroupNorm": "ONNX Runtime has it for CUDA only",
}
"""Operators that nothing on the CPU can be compared with."""


def compare(key: str, args: list[Any], attributes: dict[str, Any], tolerance: float = 2e-5) -> None:
    """Compare with ONNX Runtime, in an older opset where it knows the operator in that only."""
    wanted = runtime.call(key, *args, **attributes)
    found = op(key)(*args, **{name: value for name, value in attributes.items() if name != "opset_version"})
    wanted, found = (v if isinstance(v, tuple | list) else (v,) for v in (wanted, found))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # A value between two quantized ones may be rounded to either.
        allowed = tolerance if a.is_floating_point() else 1
        assert torch.allclose(a.double(), b.double(), tolerance, allowed), (a.double() - b.double()).abs().max()


DEFAULT: dict[str, Call] = {
    "average pool": (
        "AveragePool",
        [IMAGE],
        {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1], "ceil_mode": 1},
    ),
    "average pool, pads count": (
        "AveragePool",
        [IMAGE],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1, "count_include_pad": 1},
    ),
    "average pool, same": (
        "AveragePool",
        [IMAGE],
        {"kernel_shape": [4, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER", "count_include_pad": 1},
    ),
    "batch norm, one dimension": ("BatchNormalization", [X, *(normal(5, seed=i).abs() for i in range(4))], {}),
    "conv, one dimension": ("Conv", [X, normal(4, 5, 3)], {"pads": [2, 0], "dilations": [2]}),
    "conv, three dimensions": (
        "Conv",
        [normal(1, 2, 5, 6, 4), normal(3, 2, 2, 3, 2), normal(3)],
        {"pads": [1, 0, 1, 0, 1, 1], "strides": [1, 2, 1]},
    ),
    "conv, same": ("Conv", [IMAGE, normal(3, 4, 4, 2)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "conv, same, lower": ("Conv", [IMAGE, normal(3, 4, 4, 2)], {"auto_pad": "SAME_LOWER", "strides": [3, 2]}),
    "conv, valid": ("Conv", [IMAGE, normal(4, 1, 3, 3)], {"auto_pad": "VALID", "group": 4}),
    "conv transpose": (
        "ConvTranspose",
        [IMAGE, normal(4, 3, 3, 2), normal(6)],
        {"group": 2, "strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 2], "dilations": [1, 2]},
    ),
    "conv transpose, even pads": (
        "ConvTranspose",
        [IMAGE, normal(4, 3, 3, 3), normal(3)],
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
    ),
    "conv transpose, a shape": (
        "ConvTranspose",
        [IMAGE, normal(4, 3, 3, 3)],
        {"strides": [2, 2], "output_shape": [15, 12], "auto_pad": "SAME_LOWER"},
    ),
    "conv transpose, same": (
        "ConvTranspose",
        [IMAGE, normal(4, 3, 3, 4)],
        {"strides": [2, 3], "auto_pad": "SAME_UPPER"},
    ),
    "cumulative sum": ("CumSum", [X, scalar(-2, torch.int64)], {"reverse": 1, "exclusive": 1}),
    "division of integers": ("Div", [integers(-9, 9, 4, 5), torch.tensor([-3, 2, 4, -2, 7])], {}),
    "gather, negative": ("Gather", [X, torch.tensor([[-1, 0], [3, -4]])], {"axis": 1}),
    "global lp pool": ("GlobalLpPool", [IMAGE], {"p": 3, "opset_version": 21}),
    "group norm, by group": ("GroupNormalization", [IMAGE, normal(4), normal(4, seed=1)], {"num_groups": 2}),
    "gru": (
        "GRU",
        [normal(5, 2, 4), normal(2, 9, 4), normal(2, 9, 3), normal(2, 18), scalar([5, 3], torch.int32)],
        {"hidden_size": 3, "direction": "bidirectional", "linear_before_reset": 1, "outputs": 2},
    ),
    "instance norm, one dimension": ("InstanceNormalization", [X, normal(5), normal(5, seed=1)], {}),
    "layer norm, from the front": (
        "LayerNormalization",
        [X, normal(5, 8), normal(5, 8, seed=1)],
        {"axis": 1, "outputs": 3},
    ),
    "local response": ("LRN", [IMAGE], {"size": 3, "alpha": 0.1, "beta": 0.6, "bias": 1.5}),
    "local response, an even size": ("LRN", [normal(2, 7, 3, 3)], {"size": 5}),
    "lp pool": ("LpPool", [IMAGE], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 2], "p": 3}),
    "lstm": (
        "LSTM",
        [
            *(normal(5, 2, 4), normal(2, 12, 4), normal(2, 12, 3), normal(2, 24), scalar([5, 3], torch.int32)),
            *(normal(2, 2, 3), normal(2, 2, 3, seed=1), normal(2, 9)),
        ],
        {"hidden_size": 3, "direction": "bidirectional", "outputs": 3},
    ),
    "lstm, backward, other functions": (
        "LSTM",
        [normal(5, 2, 4), normal(1, 12, 4), normal(1, 12, 3), normal(1, 24)],
        {
            **{"hidden_size": 3, "direction": "reverse", "outputs": 3, "clip": 0.8},
            **{"activations": ["HardSigmoid", "ScaledTanh", "Elu"], "activation_alpha": [0.3, 1.1, 0.7]},
            **{"activation_beta": [0.4, 0.9]},
        },
    ),
    "max pool, same": ("MaxPool", [IMAGE], {"kernel_shape": [4, 2], "strides": [3, 2], "auto_pad": "SAME_LOWER"}),
    "max pool, places": (
        "MaxPool",
        [IMAGE],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1, "outputs": 2},
    ),
    "max pool, three dimensions": (
        "MaxPool",
        [normal(1, 2, 5, 6, 4)],
        {"kernel_shape": [2, 2, 2], "strides": [2, 1, 2]},
    ),
    "max roi pool": (
        "MaxRoiPool",
        [IMAGE, torch.tensor([[0.0, 1, 1, 4, 5], [1, 0, 2, 5, 6]])],
        {"pooled_shape": [2, 3], "spatial_scale": 0.8, "opset_version": 21},
    ),
    "one hot, negative": ("OneHot", [torch.tensor([-1, 5, 2, -7]), scalar(4, torch.int64), normal(2)], {"axis": 0}),
    "pad, negative": ("Pad", [X, [0, -1, 2, 0, 3, -2], 1.5], {}),
    "pad, reflected": ("Pad", [X, [0, 2, 3, 0, 4, 1]], {"mode": "reflect"}),
    "pad, wrapped": ("Pad", [X, [0, 2, 3, 0, 4, 1]], {"mode": "wrap"}),
    "power of integers": ("Pow", [integers(1, 5, 3, 4), scalar(1.5)], {}),
    "remainder": ("Mod", [integers(-9, 9, 4, 5), torch.tensor([-3, 2, 4, -2, 7])], {}),
    "resize, cubic": (
        "Resize",
        [IMAGE, None, [1.0, 1.0, 1.7, 0.6]],
        {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
    ),
    "resize, cubic, aligned": (
        "Resize",
        [IMAGE, None, None, [2, 4, 11, 5]],
        {"mode": "cubic", "coordinate_transformation_mode": "align_corners"},
    ),
    "resize, linear": ("Resize", [IMAGE, None, [1.0, 1.0, 2.0, 1.5]], {"mode": "linear"}),
    "resize, linear, asymmetric": (
        "Resize",
        [IMAGE, None, None, [2, 4, 10, 9]],
        {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
    ),
    "resize, linear, pytorch": (
        "Resize",
        [IMAGE, None, None, [2, 4, 1, 9]],
        {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
    ),
    "resize, nearest": (
        "Resize",
        [IMAGE, None, [1.0, 1.0, 2.0, 3.0]],
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    "resize, nearest, shrinking": ("Resize", [IMAGE, None, [1.0, 1.0, 0.4, 1 / 3]], {"nearest_mode": "ceil"}),
    "rnn": (
        "RNN",
        [normal(5, 2, 4), normal(1, 3, 4), normal(1, 3, 3), normal(1, 6)],
        {"hidden_size": 3, "activations": ["Relu"], "outputs": 2},
    ),
    "roi align, as many samples as pixels": (
        "RoiAlign",
        [IMAGE, torch.tensor([[1.0, 1, 4, 5.5], [-1, 2, 5, 9]]), torch.tensor([0, 1])],
        {"output_height": 2, "output_width": 2, "spatial_scale": 0.9, "opset_version": 21},
    ),
    "shape, a part": ("Shape", [IMAGE], {"start": -3, "end": -1}),
    "slice, backward": ("Slice", [X, [-1, 7], [-99, 0], [1, 2], [-2, -3]], {}),
    "split, uneven": ("Split", [X], {"axis": 2, "num_outputs": 3, "outputs": 3}),
    "top k, smallest": ("TopK", [X, torch.tensor([3])], {"axis": 1, "largest": 0, "outputs": 2}),
}
"""Calls that ONNX ships no results for."""


@pytest.mark.parametrize("name", DEFAULT)
def test_standard_operators_compute_what_onnx_runtime_computes(name: str) -> None:
    compare(*DEFAULT[name])


@pytest.mark.parametrize("name", MICROSOFT)
def test_fused_operators_compute_what_onnx_runtime_computes(name: str) -> None:
    key, args, attributes = MICROSOFT[name]
    compare(f"com.microsoft.{key}", args, attributes)


def test_every_fused_operator_is_compared() -> None:
    from graphopt.dialects.onnx import semantics

    described = {k.removeprefix("com.microsoft.") for k in semantics._table() if k.startswith("com.microsoft.")}
    assert described == {key for key, _, _ in MICROSOFT.values()} | set(UNCHECKED)
    assert not {key for key, _, _ in MICROSOFT.values()} & set(UNCHECKED)


def test_keys_and_values_may_come_in_one() -> None:
    packed = normal(2, 5, 2, 3, 4)
    fused = op("com.microsoft.MultiHeadAttention")
    q, k, v = (t.flatten(2) for t in packed.unbind(3))
    wanted = fused(q, k, v, num_heads=2)
    assert torch.equal(fused(packed, num_heads=2), wanted)
    assert torch.equal(fused(q, packed[:, :, :, 1:], num_heads=2), wanted)


def test_a_softmax_with_a_bias_takes_dimensions_as_one() -> None:
    x, bias = normal(4, 3, 2, 5), normal(4, 1, 1, 5)
    fused = op("com.microsoft.BiasSoftmax")
    assert torch.equal(fused(x, bias, axis=3, is_inner_broadcast=1), torch.softmax(x + bias, -1))
    both = torch.softmax((x + bias).flatten(2), -1).reshape(x.shape)
    assert torch.equal(fused(x, bias, axis=2, is_inner_broadcast=1), both)


@pytest.mark.parametrize("past", [False, True])
def test_rows_of_a_cache_may_have_different_lengths(past: bool) -> None:
    """What ONNX Runtime leaves behind the end of a row means nothing, and differs."""
    key = "com.microsoft.GroupQueryAttention"
    lengths = torch.tensor([6, 3] if past else [4, 2], dtype=torch.int32)
    new = 1 if past else 5
    args: list[Any] = [normal(2, new, 64), normal(2, new, 32), normal(2, new, 32, seed=3)]
    args += [normal(2, 2, 9, 16), normal(2, 2, 9, 16, seed=1)] if past else [None, None]
    args += [lengths, scalar(7 if past else 5, torch.int32), *TABLES]
    attributes: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "outputs": 3}
    wanted, found = runtime.call(key, *args, **attributes), op(key)(*args, **attributes)
    for row, last in enumerate(lengths.tolist()):
        assert torch.allclose(found[0][row, : last + 1], wanted[0][row, : last + 1], atol=1e-5)
        for cache in (1, 2):
            assert torch.allclose(found[cache][row, :, : last + 1], wanted[cache][row, :, : last + 1], atol=1e-5)
    assert [t.shape for t in found] == [t.shape for t in wanted]


def test_channels_may_be_last() -> None:
    weight, bias = normal(6, 2, 3, 3), normal(6)
    wanted = op("Conv")(IMAGE, weight, bias, group=2, pads=[1, 1, 1, 1])
    found = op("com.microsoft.NhwcConv")(IMAGE.movedim(1, -1), weight.movedim(1, -1), bias, group=2, pads=[1, 1, 1, 1])
    assert torch.allclose(found.movedim(-1, 1), wanted, atol=1e-6)


def test_groups_are_normalised_after_a_sum() -> None:
    scale, shift, skip, bias = normal(4), normal(4, seed=1), normal(2, 7, 6, 4), normal(4, seed=2)
    x = IMAGE.movedim(1, -1)
    y, total = op("com.microsoft.SkipGroupNorm")(x, scale, shift, skip, bias, groups=2, activation=1, outputs=2)
    assert torch.allclose(total, x + skip + bias)
    wanted = torch.nn.functional.silu(torch.group_norm(total.movedim(-1, 1), 2, scale, shift, 1e-5))
    assert torch.allclose(y.movedim(-1, 1), wanted, atol=1e-6)
    plain = op("com.microsoft.GroupNorm")(total.movedim(-1, 1), scale, shift, groups=2, channels_last=0)
    assert torch.allclose(torch.nn.functional.silu(plain), wanted, atol=1e-6)


# -- what is left to ONNX Runtime ------------------------------------------------------------------------------------


def body() -> Any:
    """Return the body of a Loop that adds a value from outside to its state."""
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Add", ["state", "step"], ["next"]), helper.make_node("Identity", ["go"], ["going"])]
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [3]),
    ]
    ends = [
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        helper.make_tensor_value_info("next", TensorProto.FLOAT, [3]),
    ]
    return helper.make_graph(nodes, "body", inputs, ends)


def test_a_graph_may_take_values_from_outside() -> None:
    x, step = normal(3), normal(3, seed=1)
    found = op("Loop")(torch.tensor(4), torch.tensor(True), [x], body=body(), captured={"step": step})
    assert torch.allclose(found, x + 4 * step)
    double = op("Loop")(
        torch.tensor(4), torch.tensor(True), [x.double()], body=body(), captured={"step": step.double()}
    )
    assert double.dtype == torch.float64
    assert torch.allclose(double, (x + 4 * step).double(), atol=1e-6)


def test_text_is_an_array() -> None:
    found = op("StringConcat")(np.array(["a", "b"], dtype=object), np.array(["c"], dtype=object))
    assert found.tolist() == ["ac", "bc"]


def test_shapes_are_inferred_or_not_known() -> None:
    x = torch.empty(4, dtype=torch.int64, device="meta")
    attributes = {
        **{"mode": "TF", "min_gram_length": 1, "max_gram_length": 1, "max_skip_count": 0},
        **{"ngram_counts": [0], "ngram_indexes": [0, 1], "pool_int64s": [2, 3]},
    }
    found = op("TfIdfVectorizer")(x, **attributes)
    assert (found.shape, found.dtype, found.device.type) == ((2,), torch.float32, "meta")
    condition = torch.empty((), dtype=torch.bool, device="meta")
    with pytest.raises(NotImplementedError, match="If: onnx does not tell the shape"):
        op("If")(condition, then_branch=branch(2), else_branch=branch(3))


def branch(size: int) -> Any:
    """Return the branch of an If that yields a vector of a size."""
    from onnx import TensorProto, helper

    node = helper.make_node("Constant", [], ["y"], value_floats=[1.0] * size)
    return helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [size])])


def test_what_onnx_runtime_lacks_is_named() -> None:
    with pytest.raises(NotImplementedError, match="ImageDecoder, which ONNX Runtime does not compute"):
        op("ImageDecoder")(byte(8))
