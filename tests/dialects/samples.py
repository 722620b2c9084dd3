"""A sample call, or a few, of every operator of the ATen dialect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.dialects.alone import P

__all__ = ["RANDOM", "WITHOUT_TENSORS", "calls"]

RANDOM = frozenset(
    [
        "rand.default",
        "randn.default",
        "rand_like.default",
        "rand_like.generator",
        "randn_like.default",
        "randn_like.generator",
        "randint.default",
        "randint.low",
        "bernoulli.default",
        "bernoulli.p",
        "bernoulli.Tensor",
        "empty.memory_format",
        "new_empty.default",
        "empty_like.default",
    ]
)
"""Operators that yield other values at every call."""

WITHOUT_TENSORS = frozenset(["sym_size.int", "sym_numel.default", "sym_stride.int", "_assert_async.msg"]) | {
    "_assert_tensor_metadata.default"
}
"""Operators that yield a number or nothing."""


@dataclass(frozen=True)
class Sample:
    """Arguments of a call: operands are :class:`P`, other tensors are constants."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def _of(*args: Any, **kwargs: Any) -> Sample:
    return Sample(args, kwargs)


def _same(names: Iterable[str], samples: list[Sample]) -> dict[str, list[Sample]]:
    return dict.fromkeys(names, samples)


X, Y, Z = P((3, 4, 6)), P((3, 4, 6)), P((3, 4, 6))
ROW = P((6,))
POSITIVE = P((3, 4, 6), 0.1)
MASK = torch.arange(72).view(3, 4, 6) % 3 > 0
WHOLE = torch.arange(72).view(3, 4, 6)
IMAGE, LINE, VOLUME = P((2, 4, 5, 6)), P((2, 4, 6)), P((2, 4, 3, 4, 5))
GRID = torch.zeros(2, 3, 3, 2, dtype=torch.float64)
CHANNELS = P((4,))
LSTM = [P((2, 3, 5)), [P((1, 2, 4)), P((1, 2, 4))], [P((16, 5)), P((16, 4)), P((16,)), P((16,))]]
CELL, GATED = [P((4, 5)), P((4, 4)), P((4,)), P((4,))], [P((12, 5)), P((12, 4)), P((12,)), P((12,))]
STATE = P((1, 2, 4))
DATA, SIZES = P((5, 5)), torch.tensor([2, 2, 1])
RUN = (True, 1, 0.0, False, False)

SAMPLES: dict[str, list[Sample]] = {
    **_same(
        ["dropout.default", "dropout_.default", "feature_dropout.default", "alpha_dropout.default"],
        [_of(X, 0.5, False)],
    ),
    "to.dtype": [_of(X, torch.float64)],
    "to.device": [_of(X, torch.device("cpu"), torch.float64)],
    "to.other": [_of(X, Y)],
    "rand_like.generator": [_of(X, generator=None)],
    "randn_like.generator": [_of(X, generator=None)],
    "threshold.default": [_of(X, 0.1, 0.3)],
    "threshold_.default": [_of(X, 0.1, 0.3)],
    "bernoulli.default": [_of(P((3, 4), 0.0))],
    "bernoulli.p": [_of(X, 0.5)],
    "bernoulli.Tensor": [_of(X, P((3, 4, 6), 0.0))],
    "view_as_real_copy.default": [_of(torch.zeros(3, 4, dtype=torch.complex128))],
    "view_as_real.default": [_of(torch.zeros(3, 4, dtype=torch.complex128))],
    "view_as_complex.default": [_of(P((3, 4, 2)))],
    "bitwise_not.default": [_of(WHOLE)],
    "full_like.default": [_of(X, 2.0)],
    "div.Tensor": [_of(X, POSITIVE), _of(X, P((4, 1), 0.1)), _of(X, 2)],
    "div.Tensor_mode": [_of(X, POSITIVE, rounding_mode="floor")],
    "div_.Tensor_mode": [_of(X, POSITIVE, rounding_mode="trunc")],
    "div.Scalar_mode": [_of(X, 2, rounding_mode=None)],
    "div_.Scalar_mode": [_of(X, 2, rounding_mode="floor")],
    "add.Tensor": [_of(X, Y), _of(X, ROW), _of(X, P((4, 1))), _of(X, 2), _of(X, Y, alpha=3)],
    "sub.Tensor": [_of(X, Y), _of(P((4, 1)), ROW)],
    "mul.Tensor": [_of(X, Y), _of(X, ROW), _of(P((3, 1, 6)), P((4, 1))), _of(X, 0.5)],
    "pow.Tensor_Tensor": [_of(POSITIVE, Y)],
    "pow.Tensor_Scalar": [_of(X, 2), _of(POSITIVE, -1.5), _of(X, 0)],
    "pow_.Scalar": [_of(X, 3)],
    "where.self": [_of(MASK, X, Y), _of(MASK[:1], X, ROW)],
    "where.ScalarOther": [_of(MASK, X, 0), _of(MASK, X, 1.0)],
    "where.ScalarSelf": [_of(MASK, 0, X), _of(MASK, 2.0, X)],
    "where.Scalar": [_of(MASK, 1.0, 0.0)],
    "masked_fill.Scalar": [_of(X, MASK, 0), _of(X, MASK, 2.0), _of(X, MASK[:, :, :1], -1)],
    "masked_fill.Tensor": [_of(X, MASK, torch.tensor(2.0, dtype=torch.float64))],
    "masked_fill_.Scalar": [_of(X, MASK, 0)],
    "masked_fill_.Tensor": [_of(X, MASK, torch.tensor(0.0, dtype=torch.float64))],
    "clamp.default": [_of(X, -0.2, 0.3), _of(X, 0.1), _of(X, None, 0.2)],
    "clamp.Tensor": [_of(X, Y)],
    "clamp_.default": [_of(X, 0.1, 0.3)],
    "clamp_.Tensor": [_of(X, Y)],
    "clamp_min.default": [_of(X, 0.1), _of(X, -0.1)],
    "clamp_max.default": [_of(X, -0.1), _of(X, 0.1)],
    "hardtanh.default": [_of(X), _of(X, 0.1, 0.2)],
    "lerp.Tensor": [_of(X, Y, Z)],
    "lerp.Scalar": [_of(X, Y, 0.3)],
    "addcmul.default": [_of(X, Y, ROW)],
    "addcmul_.default": [_of(X, Y, Z)],
    "addcdiv.default": [_of(X, Y, POSITIVE)],
    "addcdiv_.default": [_of(X, Y, POSITIVE)],
    "prelu.default": [_of(X, CHANNELS), _of(X, P((1,)))],
    "copy_.default": [_of(X, Y), _of(X, ROW)],
    **_same(
        [f"{n}.Tensor" for n in ["__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor"]],
        [_of(WHOLE, WHOLE)],
    ),
    **_same(
        [f"{n}.Scalar" for n in ["__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor"]],
        [_of(WHOLE, 5)],
    ),
    **_same([f"bitwise_{n}.Scalar_Tensor" for n in ("and", "or", "xor")], [_of(5, WHOLE)]),
    # views
    "view.default": [_of(X, [3, 2, 2, 6]), _of(X, [12, 6]), _of(X, [3, -1]), _of(X, [3, 6, 4]), _of(X, [72])],
    "_unsafe_view.default": [_of(X, [3, 2, 2, 6])],
    "reshape.default": [_of(X, [3, 2, 2, 6]), _of(X, [3, 4, 2, -1]), _of(X, [2, 36])],
    "unflatten.int": [_of(X, 2, [2, 3]), _of(X, -2, [-1, 2])],
    "reshape_as.default": [_of(X, P((12, 6)))],
    "view_as.default": [_of(X, P((3, 24)))],
    "flatten.using_ints": [_of(X), _of(X, 1), _of(X, 0, 1)],
    "permute.default": [_of(X, [2, 0, -2])],
    "transpose.int": [_of(X, 1, -1)],
    "swapaxes.default": [_of(X, 0, 2)],
    "swapdims.default": [_of(X, 0, 2)],
    "transpose_.default": [_of(X, 0, 1)],
    "t.default": [_of(P((3, 4))), _of(ROW)],
    "movedim.intlist": [_of(X, [0, 1], [2, 0])],
    "movedim.int": [_of(X, 0, -1)],
    "moveaxis.int": [_of(X, 2, 0)],
    "moveaxis.intlist": [_of(X, [2], [0])],
    "unsqueeze.default": [_of(X, 1), _of(X, -1)],
    "unsqueeze_.default": [_of(X, 0)],
    "squeeze.default": [_of(P((3, 1, 6)))],
    "squeeze.dim": [_of(P((3, 1, 6)), 1), _of(X, 1)],
    "squeeze.dims": [_of(P((1, 3, 1)), [0, 2])],
    "squeeze_.dim": [_of(P((3, 1, 6)), 1)],
    "expand.default": [_of(P((3, 1, 6)), [3, 4, 6]), _of(ROW, [5, -1]), _of(P((4, 1)), [-1, 3])],
    "expand_as.default": [_of(P((4, 1)), X), _of(X, Y)],
    "broadcast_to.default": [_of(ROW, [3, 4, 6])],
    "repeat.default": [_of(X, [2, 1, 3]), _of(ROW, [2, 3])],
    "tile.default": [_of(X, [2, 1, 3]), _of(X, [2]), _of(ROW, [2, 3])],
    "repeat_interleave.self_int": [_of(X, 2, 1), _of(X, 3), _of(X, 2, -1, output_size=12)],
    # joining and cutting
    **_same(
        ["cat.default", "concat.default", "concatenate.default"],
        [_of([X, P((3, 5, 6))], 1), _of([X, Y], -1), _of([X, X], 0), _of([X, torch.zeros(0, dtype=torch.float64)], 2)],
    ),
    "hstack.default": [_of([X, P((3, 5, 6))]), _of([ROW, CHANNELS])],
    "stack.default": [_of([X, Y], 1), _of([X, X], -1)],
    "split.Tensor": [_of(X, 2, 1), _of(X, 4, -1)],
    "split.sizes": [_of(X, [1, 3], 1)],
    "split_with_sizes.default": [_of(X, [1, 2, 3], 2)],
    "chunk.default": [_of(X, 2, 1), _of(X, 4, 2), _of(X, 4, 0)],
    "tensor_split.sections": [_of(X, 4, 2)],
    "tensor_split.indices": [_of(X, [2, 5], 2), _of(X, [1], 0)],
    "unbind.int": [_of(X), _of(X, -1)],
    "select.int": [_of(X, 1, 2), _of(X, -1, -1)],
    "slice.Tensor": [_of(X, 2, 1, 4), _of(X, 1, 0, 9223372036854775807), _of(X, 2, None, -2), _of(X, 2, 1, 6, 2)],
    "narrow.default": [_of(X, 2, 1, 3), _of(X, 1, -2, 2)],
    "pad.default": [_of(X, [1, 2]), _of(X, [0, 0, 1, 1], "constant", 2.0), _of(X, [1, 1], "reflect"), _of(X, [-1, 2])],
    "constant_pad_nd.default": [_of(X, [1, 0, 0, 2], 0)],
    "roll.default": [_of(X, [1], [1]), _of(X, [2])],
    "flip.default": [_of(X, [0, 2])],
    "diagonal.default": [_of(X, 0, 1, 2)],
    "unfold.default": [_of(X, 2, 3, 1)],
    "glu.default": [_of(X, 1), _of(X)],
    "pixel_shuffle.default": [_of(IMAGE, 2)],
    "pixel_unshuffle.default": [_of(P((2, 3, 4, 6)), 2)],
    "channel_shuffle.default": [_of(IMAGE, 2)],
    "native_channel_shuffle.default": [_of(IMAGE, 2)],
    "im2col.default": [_of(IMAGE, [2, 2], [1, 1], [0, 0], [1, 1])],
    "col2im.default": [_of(P((2, 12, 20)), [5, 6], [2, 2], [1, 1], [0, 0], [1, 1])],
    # contractions
    "linear.default": [_of(X, P((5, 6)), P((5,))), _of(X, P((5, 6))), _of(X, ROW), _of(X, P((6, 6)), ROW)],
    "conv1d.default": [_of(LINE, P((6, 2, 3)), P((6,)), [1], [1], [1], 2), _of(P((4, 6)), P((3, 4, 1)))],
    "conv2d.default": [
        _of(IMAGE, P((6, 4, 3, 3)), P((6,)), [2, 2], [1, 1]),
        _of(IMAGE, P((8, 1, 3, 1)), None, [1, 1], [1, 0], [1, 1], 4),
        _of(IMAGE, P((5, 4, 1, 1))),
    ],
    "conv3d.default": [_of(VOLUME, P((6, 2, 1, 2, 2)), P((6,)), [1, 1, 1], [0, 0, 0], [1, 1, 1], 2)],
    "conv1d.padding": [_of(LINE, P((6, 4, 3)), None, [1], "same")],
    "conv2d.padding": [_of(IMAGE, P((6, 4, 3, 3)), None, [1, 1], "valid")],
    "conv3d.padding": [_of(VOLUME, P((6, 4, 1, 1, 1)), None, [1, 1, 1], "same")],
    "conv_transpose1d.default": [_of(LINE, P((4, 3, 2)), P((6,)), [2], [0], [0], 2)],
    "conv_transpose2d.input": [
        _of(IMAGE, P((4, 5, 2, 2)), P((5,)), [2, 2]),
        _of(IMAGE, P((4, 1, 1, 3)), None, [1, 1], [0, 0], [0, 0], 4),
    ],
    "conv_transpose3d.input": [_of(VOLUME, P((4, 5, 1, 1, 1)))],
    "convolution.default": [
        _of(IMAGE, P((6, 4, 3, 3)), P((6,)), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        _of(IMAGE, P((4, 3, 1, 1)), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 2),
    ],
    **_same(
        ["matmul.default", "linalg_matmul.default"],
        [
            _of(X, P((3, 6, 5))),
            _of(X, P((6, 5))),
            _of(X, ROW),
            _of(ROW, P((6, 5))),
            _of(ROW, ROW),
            _of(P((2, 1, 4, 6)), P((3, 6, 4))),
        ],
    ),
    "mm.default": [_of(P((3, 4)), P((4, 5))), _of(P((4, 4)), P((4, 4)))],
    "bmm.default": [_of(X, P((3, 6, 5)))],
    "mv.default": [_of(P((3, 4)), CHANNELS)],
    "dot.default": [_of(ROW, P((6,)))],
    "outer.default": [_of(ROW, CHANNELS), _of(ROW, ROW)],
    "ger.default": [_of(ROW, CHANNELS)],
    "addmm.default": [_of(P((5,)), P((3, 4)), P((4, 5)))],
    "baddbmm.default": [_of(P((1, 4, 5)), X, P((3, 6, 5)))],
    "addmv.default": [_of(P((3,)), P((3, 4)), CHANNELS)],
    "einsum.default": [
        _of("abc,dc->abd", [X, P((5, 6))]),
        _of("...c,...c->...", [X, Y]),
        _of("abc,ad,bd->cd", [X, P((3, 2)), P((4, 2))]),
        _of("ij,jk", [P((3, 4)), P((4, 5))]),
        _of("ii->i", [P((4, 4))]),
        _of("ab->ba", [P((3, 4))]),
        _of("abc->b", [X]),
    ],
    "scaled_dot_product_attention.default": [
        _of(P((2, 4, 5, 6)), P((2, 4, 3, 6)), P((2, 4, 3, 7))),
        _of(P((2, 4, 5, 6)), P((2, 2, 3, 6)), P((2, 2, 3, 7)), enable_gqa=True),
        _of(P((2, 4, 5, 6)), P((2, 4, 5, 6)), P((2, 4, 5, 6)), None, 0.0, True, scale=0.3),
        _of(P((2, 4, 5, 6)), P((2, 4, 3, 6)), P((2, 4, 3, 7)), P((4, 5, 3))),
        _of(P((4, 5, 6)), P((4, 3, 6)), P((4, 3, 7))),
    ],
    "bilinear.default": [_of(P((2, 3)), P((2, 4)), P((5, 3, 4)), P((5,)))],
    "lstm.input": [_of(*LSTM, *RUN, True)],
    "lstm.data": [_of(DATA, SIZES, *LSTM[1:], *RUN)],
    "gru.input": [_of(P((2, 3, 5)), STATE, GATED, *RUN, True)],
    "gru.data": [_of(DATA, SIZES, STATE, GATED, *RUN)],
    **_same(["rnn_tanh.input", "rnn_relu.input"], [_of(P((2, 3, 5)), STATE, CELL, *RUN, True)]),
    **_same(["rnn_tanh.data", "rnn_relu.data"], [_of(DATA, SIZES, STATE, CELL, *RUN)]),
    # normalisations
    "batch_norm.default": [
        _of(X, CHANNELS, P((4,)), P((4,)), P((4,), 0.5), False, 0.1, 1e-5, False),
        _of(IMAGE, CHANNELS, None, None, None, True, 0.1, 1e-5, False),
        _of(X, None, None, P((4,)), P((4,), 0.5), False, 0.1, 1e-5, False),
    ],
    "instance_norm.default": [
        _of(X, CHANNELS, P((4,)), None, None, True, 0.1, 1e-5, False),
        _of(IMAGE, None, None, P((4,)), P((4,), 0.5), False, 0.1, 1e-5, False),
    ],
    "layer_norm.default": [_of(X, [6], ROW, P((6,))), _of(X, [4, 6]), _of(X, [6], P((6,)))],
    "rms_norm.default": [_of(X, [6], ROW), _of(X, [4, 6])],
    "group_norm.default": [_of(IMAGE, 2, CHANNELS, P((4,))), _of(IMAGE, 4, CHANNELS), _of(X, 1)],
    "_native_batch_norm_legit_no_training.default": [_of(X, CHANNELS, P((4,)), P((4,)), P((4,), 0.5), 0.1, 1e-5)],
    "native_layer_norm.default": [_of(X, [6], ROW, P((6,)), 1e-5), _of(X, [4, 6], None, None, 1e-5)],
    "native_group_norm.default": [
        _of(IMAGE, CHANNELS, P((4,)), 2, 4, 30, 2, 1e-5),
        _of(X, None, None, 3, 4, 6, 4, 1e-5),
    ],
    **_same(["softmax.int", "log_softmax.int"], [_of(X, 1), _of(X, -1)]),
    **_same(["_softmax.default", "_log_softmax.default"], [_of(X, 1, False)]),
    # reductions
    "sum.default": [_of(X)],
    "sum.dim_IntList": [_of(X, [1]), _of(X, [0, -1], True), _of(X, None)],
    "linalg_vector_norm.default": [_of(X, 2, [1]), _of(X, float("inf"), [0, 2], True), _of(X, -1, [1]), _of(X, 0, [1])],
    "norm.ScalarOpt_dim": [_of(X, 3, [1])],
    "norm.Scalar": [_of(X, 1), _of(X, -2)],
    "frobenius_norm.dim": [_of(X, [1, 2])],
    "mean.dim": [_of(X, [1]), _of(X, [-1], True)],
    **_same(["var.dim", "std.dim", "var_mean.dim"], [_of(POSITIVE, [1])]),
    **_same(
        ["var.correction", "std.correction", "var_mean.correction", "std_mean.correction"],
        [_of(POSITIVE, [1], correction=0)],
    ),
    **_same(["amax.default", "amin.default"], [_of(X, [1]), _of(X)]),
    **_same(["max.dim", "min.dim", "prod.dim_int", "any.dim", "all.dim", "median.dim"], [_of(X, 1), _of(X, -1, True)]),
    **_same(["argmax.default", "argmin.default"], [_of(X, 1), _of(X)]),
    "logsumexp.default": [_of(X, [1])],
    "mode.default": [_of(X, 1)],
    "aminmax.default": [_of(X, dim=1)],
    **_same(["cumsum.default", "cumprod.default", "cummax.default", "logcumsumexp.default"], [_of(X, 1)]),
    "sort.default": [_of(X, 1)],
    "sort.stable": [_of(X, stable=True, dim=1)],
    "argsort.default": [_of(X, 1)],
    "argsort.stable": [_of(X, stable=True, dim=1)],
    "topk.default": [_of(X, 2, 1)],
    "diff.default": [_of(X, 1, 1)],
    # addressing
    "embedding.default": [_of(P((7, 4)), torch.tensor([[1, 2], [0, 6]]))],
    "index.Tensor": [
        _of(X, [None, torch.tensor([1, 0])]),
        _of(X, [torch.tensor([1, 0]), None, torch.tensor([2, 3])]),
        _of(X, [torch.tensor([[1], [0]]), torch.tensor([2, 3])]),
        _of(X, [MASK[:, 0, 0]]),
    ],
    "index_select.default": [_of(X, 1, torch.tensor([3, 0]))],
    "gather.default": [_of(X, 1, WHOLE[:, :2] % 4), _of(X, 1, WHOLE[:2, :2] % 4)],
    "take_along_dim.default": [_of(X, WHOLE[:, :2] % 4, 1), _of(X, WHOLE[:1, :2] % 4, 1), _of(X, WHOLE % 7)],
    **_same(["index_put.default", "index_put_.default"], [_of(X, [None, torch.tensor([1, 0])], P((3, 2, 6)))]),
    **_same(
        ["scatter.src", "scatter_.src", "scatter_add.default", "scatter_add_.default"], [_of(X, 1, WHOLE[:, :2] % 4, Y)]
    ),
    **_same(["scatter.value", "scatter_.value"], [_of(X, 1, WHOLE[:, :2] % 4, 2.0)]),
    **_same(
        ["index_add.default", "index_add_.default", "index_copy.default"],
        [_of(X, 1, torch.tensor([3, 0]), P((3, 2, 6)))],
    ),
    "masked_scatter.default": [_of(X, MASK, Y)],
    "index_fill.int_Scalar": [_of(X, 1, torch.tensor([3, 0]), 2.0)],
    "slice_scatter.default": [_of(X, P((3, 2, 6)), 1, 1, 3)],
    "select_scatter.default": [_of(X, P((3, 6)), 1, 2)],
    "histc.default": [_of(ROW, 3)],
    "bincount.default": [_of(torch.tensor([1, 2, 2]))],
    "searchsorted.Tensor": [_of(torch.arange(6.0), torch.tensor([[0.5, 2.0]]))],
    "bucketize.Tensor": [_of(X, torch.arange(3.0).double())],
    "one_hot.default": [_of(torch.tensor([1, 2, 0]), 4)],
    "masked_select.default": [_of(X, MASK)],
    "cdist.default": [_of(X, P((3, 5, 6)))],
    # making
    **_same(["zeros.default", "ones.default", "empty.memory_format", "rand.default", "randn.default"], [_of([3, 4])]),
    "full.default": [_of([3, 4], 2.0)],
    **_same(["new_zeros.default", "new_ones.default", "new_empty.default"], [_of(X, [3, 4])]),
    "new_full.default": [_of(X, [3, 4], 2.0)],
    "arange.default": [_of(5)],
    "arange.start": [_of(2, 5)],
    "arange.start_step": [_of(2, 9, 2)],
    "linspace.default": [_of(0, 1, 5)],
    "logspace.default": [_of(0, 1, 5)],
    "eye.default": [_of(3)],
    "eye.m": [_of(3, 4)],
    "scalar_tensor.default": [_of(2.0)],
    "randint.default": [_of(5, [3, 4])],
    "randint.low": [_of(2, 5, [3, 4])],
    "hann_window.default": [_of(5)],
    "tril_indices.default": [_of(3, 3)],
    "meshgrid.default": [_of([ROW, CHANNELS])],
    "meshgrid.indexing": [_of([ROW, CHANNELS], indexing="xy")],
    # space
    **_same(["max_pool1d.default", "max_pool1d_with_indices.default", "avg_pool1d.default"], [_of(LINE, [2])]),
    **_same(["adaptive_avg_pool1d.default", "adaptive_max_pool1d.default"], [_of(LINE, [2])]),
    **_same(
        ["max_pool2d.default", "max_pool2d_with_indices.default", "avg_pool2d.default"], [_of(IMAGE, [2, 2], [1, 2])]
    ),
    **_same(
        ["adaptive_avg_pool2d.default", "adaptive_max_pool2d.default", "_adaptive_avg_pool2d.default"],
        [_of(IMAGE, [2, 3])],
    ),
    **_same(["max_pool3d.default", "max_pool3d_with_indices.default", "avg_pool3d.default"], [_of(VOLUME, [2, 2, 2])]),
    **_same(["adaptive_avg_pool3d.default", "adaptive_max_pool3d.default"], [_of(VOLUME, [2, 2, 3])]),
    "upsample_nearest1d.default": [_of(LINE, [9])],
    "upsample_nearest1d.vec": [_of(LINE, None, [2.0])],
    "upsample_linear1d.default": [_of(LINE, [9], False)],
    "upsample_linear1d.vec": [_of(LINE, None, False, [2.0])],
    **_same(["upsample_nearest2d.default", "_upsample_nearest_exact2d.default"], [_of(IMAGE, [7, 8])]),
    **_same(["upsample_nearest2d.vec", "_upsample_nearest_exact2d.vec"], [_of(IMAGE, None, [2.0, 1.5])]),
    "upsample_nearest3d.default": [_of(VOLUME, [4, 5, 6])],
    "upsample_nearest3d.vec": [_of(VOLUME, [4, 5, 6], None)],
    "upsample_trilinear3d.default": [_of(VOLUME, [4, 5, 6], True)],
    "upsample_trilinear3d.vec": [_of(VOLUME, [4, 5, 6], False, None)],
    **_same(
        [
            f"{n}.default"
            for n in ["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
        ],
        [_of(IMAGE, [7, 8], False)],
    ),
    **_same(
        [
            f"{n}.vec"
            for n in ["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
        ],
        [_of(IMAGE, [7, 8], False, None)],
    ),
    **_same(["reflection_pad2d.default", "replication_pad2d.default"], [_of(IMAGE, [1, 1, 0, 2])]),
    **_same(["grid_sampler.default", "grid_sampler_2d.default"], [_of(IMAGE, GRID, 0, 0, False)]),
    "grid_sampler_3d.default": [_of(VOLUME, torch.zeros(2, 2, 2, 2, 3, dtype=torch.float64), 0, 0, False)],
}

_POSITIVE_ONLY = frozenset(
    [
        "log",
        "log2",
        "log10",
        "rsqrt",
        "rsqrt_",
        "sqrt",
        "sqrt_",
        "lgamma",
        "digamma",
        "logit",
        "reciprocal",
        "reciprocal_",
    ]
)


def calls(target: Any) -> list[Sample]:
    """Return sample calls of an operator: those written here, or one that its schema suggests.

    Raises:
        LookupError: nothing is written here, and the schema suggests nothing.
    """
    packet = target._schema.name.partition("::")[2]
    written = SAMPLES.get(f"{packet}.{target._schema.overload_name or 'default'}")
    return written if written else [_of(*_arguments(target, packet))]


def _arguments(target: Any, packet: str) -> Iterator[Any]:
    tensors = iter((P((3, 4, 6), 0.1) if packet in _POSITIVE_ONLY else X, Y))
    for argument in target._schema.arguments:
        if argument.has_default_value():
            continue
        kind = str(argument.type)
        if kind == "Tensor":
            yield next(tensors)
        elif kind == "number":
            yield 0.5
        else:
            raise LookupError(f"{target} has no sample call; add one to tests/dialects/samples.py")
