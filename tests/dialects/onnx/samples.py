"""Sample calls of every operator of the ONNX dialect, with the number of groups that must be found in each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.dialects.alone import P

__all__ = ["RANDOM", "SAMPLES", "UNSAMPLED", "Sample"]


@dataclass(frozen=True)
class Sample:
    """A call's arguments, where operands are :class:`P`, and how many free groups it has if all of those vanish."""

    groups: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def _of(groups: int, /, *args: Any, **kwargs: Any) -> Sample:
    return Sample(groups, args, kwargs)


def _each(names: Iterable[str], *samples: Sample) -> dict[str, list[Sample]]:
    return {name: list(samples) for name in names}


def _runtime(**samples: list[Sample]) -> dict[str, list[Sample]]:
    return {f"com.microsoft.{name}": found for name, found in samples.items()}


def _whole(*shape: int, low: int = 0, high: int = 7, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(low, high, shape)).to(dtype)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _one(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


X, Y, ROW = P((3, 4, 6)), P((3, 4, 6)), P((6,))
POSITIVE, BEYOND = P((3, 4, 6), 0.1), P((3, 4, 6), 1.1)
MASK, OTHER = torch.arange(72).view(3, 4, 6) % 3 > 0, torch.arange(72).view(3, 4, 6) % 2 > 0
WHOLE = torch.arange(72).view(3, 4, 6)
LINE, IMAGE, VOLUME = P((2, 4, 6)), P((2, 4, 5, 6)), P((2, 4, 3, 4, 5))
DEEP, PATCHES = P((2, 12, 3, 4)), P((2, 12, 20))
C4 = [P((4,)) for _ in range(4)]
GRID = torch.linspace(-1, 1, 36, dtype=torch.float64).view(2, 3, 3, 2)
Q4, K4, V4 = P((2, 4, 3, 5)), P((2, 4, 6, 5)), P((2, 4, 6, 7))
KG, VG = P((2, 2, 6, 5)), P((2, 2, 6, 7))
Q3, K3, V3 = P((2, 3, 20)), P((2, 6, 20)), P((2, 6, 28))
KG3, VG3 = P((2, 6, 10)), P((2, 6, 14))
PAST_K, PAST_V = P((2, 4, 2, 5)), P((2, 4, 2, 7))
COS, SIN = P((9, 3)), P((9, 3))
R4, R3 = P((2, 4, 3, 6)), P((2, 3, 24))
PLACES = torch.tensor([[0, 1, 2], [3, 4, 5]])
BYTES, BYTE, TENTH = _whole(2, 4, 5, 6, high=99, dtype=torch.uint8), torch.tensor(7, dtype=torch.uint8), _one(0.1)
INT8 = _whole(4, 6, low=-9, high=9, dtype=torch.int8)
DATA = P((5, 6))

UNARY = [
    *("Relu", "Gelu", "LeakyRelu", "Elu", "Celu", "Selu", "Tanh", "Mish", "HardSwish", "Swish", "Softsign"),
    *("ThresholdedRelu", "Sin", "Tan", "Asin", "Atan", "Sinh", "Asinh", "Atanh", "Erf", "Abs", "Neg", "Sign"),
    *("Floor", "Ceil", "Round", "IsNaN", "IsInf", "Sigmoid", "HardSigmoid", "Exp", "Softplus", "Cos", "Cosh"),
    *("Acos", "Identity", "Shrink", "com.microsoft.Gelu", "com.microsoft.QuickGelu"),
]

RANDOM = frozenset({"RandomNormalLike", "RandomUniformLike", "RandomNormal", "RandomUniform", "Bernoulli"})
"""Operators that yield other values at every call."""

UNSAMPLED = {
    **dict.fromkeys(("NonZero", "Unique", "Compress", "NonMaxSuppression"), "the size of the result depends on data"),
    **dict.fromkeys(("Constant", "Range", "HannWindow", "HammingWindow", "BlackmanWindow"), "has no tensor operand"),
    **dict.fromkeys(("RandomNormal", "RandomUniform", "ConstantOfShape", "MelWeightMatrix"), "has no tensor operand"),
    **dict.fromkeys(("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"), "is not in models for inference"),
    **dict.fromkeys(("LinearAttention", "CausalConvWithState", "MaxUnpool", "AffineGrid"), "is frozen whole"),
    **dict.fromkeys(("DFT", "STFT", "Det", "Multinomial", "BitCast", "MaxRoiPool", "GRU", "RNN"), "is frozen whole"),
    **dict.fromkeys(("com.microsoft.MatMulNBits", "Size", "Shape", "EyeLike"), "is frozen whole"),
}
"""Operators without a sample, and why."""

SAMPLES: dict[str, list[Sample]] = {
    # elementwise
    **_each(UNARY, _of(3, X)),
    **_each(["Sqrt", "Log", "Reciprocal"], _of(3, POSITIVE)),
    **_each(["Acosh"], _of(3, BEYOND)),
    "Shrink": [_of(3, X), _of(3, X, lambd=0.2, bias=0.1)],
    "Cast": [_of(3, X, to=11), _of(3, X, to=7)],
    "CastLike": [_of(3, X, _zeros(1))],
    "Dropout": [_of(3, X), _of(3, X, 0.5, False, outputs=2)],
    **_each(["RandomNormalLike", "RandomUniformLike"], _of(3, X)),
    "Bernoulli": [_of(3, P((3, 4, 6), 0.0))],
    **_each(["Not", "BitwiseNot"], _of(0, MASK)),
    "Clip": [_of(3, X, -0.1, 0.2), _of(3, X, 0.1), _of(3, X, None, 0.3), _of(3, X, _one(0.1), None)],
    "PRelu": [_of(3, X, P((4, 1))), _of(3, X, P((1,)))],
    **_each(
        ["Add", "Sub", "Mul", "Pow", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"],
        _of(3, POSITIVE, P((3, 4, 6), 0.1)),
        _of(3, POSITIVE, P((6,), 0.1)),
        _of(3, P((4, 1), 0.1), POSITIVE),
        _of(3, POSITIVE, _one(2.0)),
        _of(3, POSITIVE, _one(0.0)),
    ),
    **_each(["Div", "Mod"], _of(3, X, _one(2.0)), _of(3, X, P((4, 6), 0.1)), _of(3, X, P((1, 6), 0.1))),
    **_each(["Max", "Min", "Sum", "Mean"], _of(3, [X, Y, ROW]), _of(3, [X, _one(0.0)]), _of(3, [X])),
    **_each(["And", "Or", "Xor"], _of(0, MASK, OTHER)),
    **_each(["BitwiseAnd", "BitwiseOr", "BitwiseXor"], _of(0, WHOLE, WHOLE + 1)),
    "BitShift": [_of(0, WHOLE.to(torch.uint8), (WHOLE % 3).to(torch.uint8), direction="LEFT")],
    "Where": [_of(3, MASK, X, Y), _of(3, MASK, _zeros(1), X), _of(3, MASK, X, _one(1.0))],
    "SwiGLU": [_of(3, X, Y)],
    **_runtime(
        BiasGelu=[_of(3, X, ROW)],
        FastGelu=[_of(3, X), _of(3, X, ROW)],
        BiasSplitGelu=[_of(3, P((3, 4, 8)), P((8,)))],
    ),
    # shape
    "Reshape": [
        _of(3, X, [3, 24]),
        _of(3, X, [0, -1]),
        _of(3, X, [12, 6]),
        _of(3, X, [0, 0, 6, 1]),
        _of(4, X, [3, 4, 2, 3]),
        _of(3, P((2, 6, 6)), [12, 0]),
        _of(3, X, [-1]),
        _of(3, X, [3, 4, 6], allowzero=1),
        _of(0, P((4, 9)), [6, 6]),
    ],
    "Flatten": [_of(3, X), _of(3, X, axis=2), _of(3, X, axis=0), _of(3, X, axis=-1)],
    "Transpose": [_of(3, X), _of(3, X, perm=[1, 0, 2])],
    "Squeeze": [_of(2, P((3, 1, 4)), [1]), _of(2, P((1, 3, 4, 1))), _of(2, P((3, 1, 4)), [-2])],
    "Unsqueeze": [_of(3, X, [0, 2]), _of(3, X, [-1])],
    "Expand": [_of(2, P((3, 1, 6)), [3, 4, 6]), _of(3, X, [1, 1]), _of(1, P((4, 1)), [3, 1, 6])],
    "Tile": [_of(3, X, [2, 1, 2]), _of(3, X, [1, 1, 1])],
    "Concat": [_of(4, [X, P((3, 5, 6))], axis=1), _of(4, [X, Y], axis=-1)],
    "Split": [
        _of(4, X, [4, 2], axis=2),
        _of(4, X, None, axis=1, num_outputs=2, outputs=2),
        _of(4, P((3, 7)), None, axis=-1, num_outputs=4, outputs=4),
        _of(4, P((4, 6, 2)), None, outputs=2),
    ],
    "Slice": [
        _of(3, X, [1], [5], [2], None),
        _of(3, X, [0, 1], [2, 9223372036854775807], [0, 1]),
        _of(4, X, [-4], [-1], [-1]),
        _of(2, X, [4], [-8], [2], [-1]),
        _of(3, X, [0], [6], [2], [2]),
        _of(3, X, [0, 0, 0], [9, 9, 9]),
        _of(3, X, [1], [6], [2], [3]),
    ],
    "Pad": [
        _of(3, X, [0, 0, 1, 0, 0, 2]),
        _of(3, X, [1, 2], 0.5, [2]),
        _of(2, X, [1, 1], None, [2], mode="reflect"),
        _of(2, X, [-1, 0], None, [2]),
    ],
    "CenterCropPad": [_of(2, X, [3, 4, 4]), _of(2, X, [3, 7], axes=[0, 1]), _of(3, X, [4], axes=[1])],
    "Trilu": [_of(1, X), _of(1, X, 1, upper=0)],
    "ReverseSequence": [_of(1, X, torch.tensor([1, 3, 2]), batch_axis=0, time_axis=1)],
    "DepthToSpace": [_of(2, DEEP, blocksize=2), _of(2, DEEP, blocksize=2, mode="CRD")],
    "SpaceToDepth": [_of(2, P((2, 3, 4, 6)), blocksize=2)],
    "Col2Im": [_of(2, PATCHES, [5, 6], [2, 2])],
    # contraction
    "MatMul": [
        _of(4, X, P((6, 5))),
        _of(4, X, P((3, 6, 5))),
        _of(3, X, ROW),
        _of(1, ROW, P((6,))),
        _of(4, P((4, 6)), P((3, 6, 5))),
        _of(5, P((2, 3, 4, 6)), P((3, 6, 5))),
    ],
    "Gemm": [
        _of(3, P((4, 6)), P((6, 5)), P((5,))),
        _of(3, P((6, 4)), P((5, 6)), P((4, 1)), transA=1, transB=1, alpha=0.5, beta=2.0),
        _of(3, P((4, 6)), P((5, 6)), transB=1),
        _of(3, P((4, 6)), P((5, 6)), _one(1.0), transB=1),
    ],
    "Einsum": [
        _of(4, [X, P((6, 5))], equation="bij,jk->bik"),
        _of(3, [X, Y], equation="bij,bij->ij"),
        _of(5, [P((2, 3, 4, 6)), P((6, 5))], equation="...ij,jk->...ik"),
    ],
    **_runtime(
        FusedGemm=[
            _of(3, P((4, 6)), P((6, 5)), P((5,)), activation="Relu"),
            _of(3, P((4, 6)), P((6, 5)), P((5,)), activation="Sigmoid"),
        ],
        FusedMatMul=[
            _of(4, P((3, 6, 4)), P((3, 5, 6)), transA=1, transB=1, alpha=0.5),
            _of(4, P((4, 3, 6)), P((3, 6, 5)), transBatchA=1),
            _of(4, P((6, 3, 4)), P((5, 3, 6)), transA=1, transB=1, transBatchA=1, transBatchB=1),
        ],
        TransposeMatMul=[_of(4, P((3, 6, 4)), P((3, 6, 5)), transA=1)],
        FusedMatMulActivation=[
            _of(4, X, P((3, 6, 5)), activation="Relu"),
            _of(3, X, P((3, 6, 5)), activation="Softmax", activation_axis=-1),
        ],
        FusedConv=[
            _of(3, IMAGE, P((6, 4, 3, 3)), P((6,)), activation="Relu"),
            _of(3, IMAGE, P((6, 4, 3, 3)), P((6,)), P((2, 6, 3, 4)), activation="Sigmoid"),
        ],
        NhwcConv=[_of(3, P((2, 5, 6, 4)), P((6, 3, 3, 4)), P((6,)))],
    ),
    "Conv": [
        _of(3, IMAGE, P((6, 4, 3, 3)), P((6,)), pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        _of(4, IMAGE, P((6, 2, 3, 3)), P((6,)), group=2, strides=[2, 2]),
        _of(2, IMAGE, P((4, 1, 3, 3)), group=4, dilations=[1, 2], auto_pad="SAME_UPPER"),
        _of(5, IMAGE, P((6, 4, 1, 1))),
        _of(3, LINE, P((6, 4, 3)), P((6,))),
        _of(3, VOLUME, P((6, 4, 3, 3, 3))),
    ],
    "ConvTranspose": [
        _of(3, IMAGE, P((4, 6, 3, 3)), P((6,)), strides=[2, 2], output_padding=[1, 1]),
        _of(4, IMAGE, P((4, 3, 3, 3)), P((6,)), group=2),
    ],
    "DeformConv": [
        _of(3, IMAGE, P((6, 4, 2, 2)), _zeros(2, 8, 4, 5), P((6,))),
        _of(2, IMAGE, P((6, 4, 2, 2)), _zeros(2, 16, 4, 5), P((6,)), offset_group=2),
    ],
    "ConvInteger": [_of(0, _whole(2, 4, 5, 6, dtype=torch.uint8), _whole(6, 4, 3, 3, dtype=torch.uint8))],
    "MatMulInteger": [_of(0, INT8, INT8.t().contiguous())],
    "LSTM": [_of(0, P((3, 2, 5)), P((1, 16, 5)), P((1, 16, 4)), hidden_size=4, outputs=3)],
    # normalisation
    "BatchNormalization": [
        _of(4, IMAGE, C4[0], C4[1], C4[2], P((4,), 0.5)),
        _of(3, LINE, C4[0], C4[1], C4[2], torch.ones(4, dtype=torch.float64)),
    ],
    "InstanceNormalization": [_of(4, IMAGE, C4[0], C4[1])],
    "GroupNormalization": [
        _of(5, P((2, 6, 4, 3)), P((6,)), P((6,)), num_groups=2),
        _of(5, P((2, 6, 4, 3)), P((2,)), P((2,)), num_groups=2),
        _of(4, IMAGE, C4[0], C4[1], num_groups=1),
    ],
    "LayerNormalization": [
        _of(3, X, ROW, P((6,))),
        _of(3, X, P((4, 6)), axis=-2),
        _of(3, X, ROW, P((6,)), axis=2, outputs=3),
    ],
    **_each(
        ["RMSNormalization", "SimplifiedLayerNormalization", "com.microsoft.SimplifiedLayerNormalization"],
        _of(3, X, ROW),
    ),
    **_runtime(
        SkipLayerNormalization=[_of(3, X, Y, ROW, P((6,)), P((6,))), _of(3, X, Y, ROW, P((6,)), None, outputs=4)],
        SkipSimplifiedLayerNormalization=[_of(3, X, Y, ROW), _of(3, X, Y, ROW, P((6,)), outputs=4)],
        GroupNorm=[_of(5, P((2, 4, 3, 6)), P((6,)), P((6,)), groups=2, activation=1)],
        SkipGroupNorm=[
            _of(5, P((2, 4, 3, 6)), P((6,)), P((6,)), P((2, 4, 3, 6)), P((6,)), groups=2, outputs=2),
        ],
        BiasSoftmax=[_of(2, X, P((4, 6)), axis=2, is_inner_broadcast=0)],
    ),
    "LRN": [_of(4, IMAGE, size=3)],
    "LpNormalization": [_of(3, X), _of(3, X, axis=1, p=1)],
    "MeanVarianceNormalization": [_of(4, IMAGE)],
    **_each(["Softmax", "LogSoftmax"], _of(2, X), _of(2, X, axis=1)),
    "Hardmax": [_of(2, X)],
    # reduction
    **_each(
        ["ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare"],
        _of(3, X, [1]),
        _of(3, X, [-1, 0], keepdims=0),
        _of(3, X),
        _of(3, X, [], noop_with_empty_axes=1),
    ),
    "ReduceLogSum": [_of(3, POSITIVE, [1])],
    **_each(["ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"], _of(2, X, [1]), _of(0, X)),
    "TopK": [_of(2, X, 2, axis=1), _of(2, X, 2, axis=1, outputs=2)],
    **_each(["ArgMax", "ArgMin"], _of(3, X, axis=1), _of(3, X, axis=-1, keepdims=0)),
    **_each(["CumSum", "CumProd"], _of(2, X, 1), _of(2, X, 0, reverse=1, exclusive=1)),
    # indexing
    "Gather": [
        _of(1, DATA, PLACES % 5),
        _of(1, DATA, torch.tensor(2), axis=0),
        _of(1, DATA, torch.tensor([0, 2]), axis=1),
    ],
    "GatherElements": [_of(1, DATA, _whole(2, 6, high=5)), _of(0, DATA, _whole(2, 4, high=5))],
    "GatherND": [
        _of(2, X, torch.tensor([[0], [2]])),
        _of(1, X, torch.tensor([[0, 1], [2, 3]])),
        _of(2, X, torch.tensor([[0], [1], [2]]), batch_dims=1),
    ],
    **_each(["Scatter", "ScatterElements"], _of(0, DATA, _whole(2, 6, high=5), P((2, 6)))),
    "ScatterND": [_of(2, X, torch.tensor([[0], [2]]), P((2, 4, 6)))],
    "TensorScatter": [_of(2, P((2, 3, 5, 4)), P((2, 3, 2, 4)), torch.tensor([0, 2]))],
    "OneHot": [_of(0, PLACES, 7, torch.tensor([0.0, 1.0], dtype=torch.float64))],
    # spatial
    **_each(
        ["MaxPool", "AveragePool", "LpPool"],
        _of(2, IMAGE, kernel_shape=[2, 3]),
        _of(2, LINE, kernel_shape=[2], strides=[2]),
        _of(2, VOLUME, kernel_shape=[2, 2, 2], pads=[0, 0, 1, 0, 0, 1]),
    ),
    **_each(["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"], _of(2, IMAGE)),
    "Resize": [
        _of(2, IMAGE, None, [1.0, 1.0, 2.0, 2.0]),
        _of(2, IMAGE, None, None, [2, 4, 10, 3], mode="linear"),
        _of(2, IMAGE, None, None, [9, 9], axes=[2, 3]),
        _of(3, IMAGE, None, None, [2, 4, 10, 6]),
    ],
    "Upsample": [_of(2, IMAGE, [1.0, 1.0, 2.0, 2.0])],
    "GridSample": [_of(2, IMAGE, GRID)],
    "RoiAlign": [
        _of(1, IMAGE, torch.tensor([[0.0, 0, 3, 3], [1, 1, 4, 4]], dtype=torch.float64), torch.tensor([0, 1]))
    ],
    # quantization
    "QuantizeLinear": [
        _of(3, X, _one(0.1)),
        _of(3, X, P((4,), 0.6), _whole(4, dtype=torch.uint8)),
        _of(3, X, P((3, 4, 3), 0.6), None, axis=2, block_size=2),
    ],
    "DequantizeLinear": [
        _of(1, INT8, P((6,), 0.1)),
        _of(1, INT8, P((4,), 0.1), _whole(4, dtype=torch.int8), axis=0),
        _of(2, INT8, P((4, 3), 0.1), None, axis=1, block_size=2),
        _of(0, INT8, _one(0.1)),
    ],
    "QLinearConv": [
        _of(
            1,
            *(BYTES, TENTH, BYTE, _whole(6, 4, 3, 3, low=-9, dtype=torch.int8), P((6,), 0.6)),
            *(torch.zeros(6, dtype=torch.int8), _one(2.0), BYTE, _whole(6, dtype=torch.int32)),
        ),
        _of(
            2,
            *(BYTES, TENTH, BYTE, _whole(6, 2, 3, 3, low=-9, dtype=torch.int8), P((6,), 0.6)),
            *(torch.tensor(0, dtype=torch.int8), _one(2.0), BYTE),
            group=2,
        ),
    ],
    "QLinearMatMul": [
        _of(1, BYTES, TENTH, BYTE, _whole(6, 5, high=99, dtype=torch.uint8), P((5,), 0.6), BYTE, _one(9.0), BYTE)
    ],
    **_runtime(
        QuantizeLinear=[_of(3, X, _one(0.1), BYTE), _of(3, X, P((4,), 0.6), _whole(4, dtype=torch.uint8))],
        DequantizeLinear=[_of(1, INT8, P((6,), 0.1))],
        QLinearAdd=[_of(0, BYTES, TENTH, BYTE, BYTES, TENTH, BYTE, TENTH, BYTE)],
        QLinearMul=[_of(0, BYTES, TENTH, BYTE, BYTES, TENTH, BYTE, TENTH, BYTE)],
        QLinearSigmoid=[_of(0, BYTES, TENTH, BYTE, TENTH, BYTE)],
        QLinearConcat=[_of(0, TENTH, BYTE, [BYTES, TENTH, BYTE, BYTES, TENTH, BYTE], axis=1)],
        QLinearGlobalAveragePool=[
            _of(0, BYTES, TENTH, BYTE, TENTH, BYTE),
            _of(0, BYTES, TENTH, BYTE, TENTH, BYTE, channels_last=1),
        ],
    ),
    "DynamicQuantizeLinear": [_of(3, X, outputs=3)],
    # attention
    "Attention": [
        _of(4, Q4, K4, V4),
        _of(5, Q4, KG, VG),
        _of(4, Q3, K3, V3, q_num_heads=4, kv_num_heads=4, is_causal=1),
        _of(5, Q3, KG3, VG3, q_num_heads=4, kv_num_heads=2),
        _of(4, Q4, K4, V4, P((3, 6))),
        _of(4, Q4, K4, V4, None, PAST_K, PAST_V, outputs=3),
    ],
    "RotaryEmbedding": [
        _of(4, R4, COS, SIN, PLACES),
        _of(4, R3, COS, SIN, PLACES, num_heads=4),
        _of(4, R4, COS, SIN, PLACES, interleaved=1),
        _of(5, P((2, 4, 3, 8)), COS, SIN, PLACES, rotary_embedding_dim=6),
    ],
    **_runtime(
        MultiHeadAttention=[
            _of(4, Q3, K3, V3, num_heads=4),
            _of(4, Q3, K3, V3, P((68,)), num_heads=4),
            _of(4, Q3, K4, V4, num_heads=4),
        ],
        Attention=[
            _of(5, P((2, 3, 6)), P((6, 60)), P((60,)), num_heads=4),
            _of(5, P((2, 3, 6)), P((6, 68)), P((68,)), num_heads=4, qkv_hidden_sizes=[20, 20, 28]),
        ],
        GroupQueryAttention=[
            _of(
                4,
                P((2, 3, 24)),
                P((2, 3, 12)),
                P((2, 3, 12)),
                None,
                None,
                torch.tensor([2, 2], dtype=torch.int32),
                3,
                num_heads=4,
                kv_num_heads=2,
            ),
            _of(
                4,
                P((2, 3, 24)),
                P((2, 3, 12)),
                P((2, 3, 12)),
                None,
                None,
                torch.tensor([2, 2], dtype=torch.int32),
                3,
                COS,
                SIN,
                num_heads=4,
                kv_num_heads=2,
                do_rotary=1,
            ),
        ],
        RotaryEmbedding=[_of(4, R3, PLACES, COS, SIN), _of(4, R4, PLACES, COS, SIN)],
        EmbedLayerNormalization=[
            _of(1, PLACES, None, P((7, 6)), P((5, 6)), None, ROW, P((6,)), outputs=2),
        ],
    ),
}
