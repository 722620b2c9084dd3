"""Hold calls of every operator that has a translation to ONNX: what the tests of the translations run.

Tensors here have a first dimension of 3, which the tests vary; those under `Weight` and `Fixed` do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from graphopt.dialects.aten.common import overloads

from .single import Fixed, Weight

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]

_GENERATOR = torch.Generator().manual_seed(0)
N = 3


def f(*shape: int) -> torch.Tensor:
    """Return normal numbers, none of them very near to zero."""
    x = torch.randn(*shape, generator=_GENERATOR)
    return x + 0.05 * x.sign()


def p(*shape: int) -> torch.Tensor:
    """Return numbers in (0.1, 0.9)."""
    return torch.rand(*shape, generator=_GENERATOR) * 0.8 + 0.1


def i(*shape: int, low: int = 0, high: int = 5) -> torch.Tensor:
    """Return integers."""
    return torch.randint(low, high, shape, generator=_GENERATOR)


def b(*shape: int) -> torch.Tensor:
    """Return booleans."""
    return torch.rand(*shape, generator=_GENERATOR) > 0.4


def of(names: str, *args: Any, **kwargs: Any) -> Iterator[Call]:
    """Yield the same call of several operators, named as in `overloads`, with blanks in between."""
    for target in overloads(*names.split()):
        yield target, args, kwargs


def elementwise() -> Iterator[Call]:
    """Yield calls of the operators in `elementwise`."""
    x, y, row = f(N, 4), f(N, 4), Weight(f(4))
    n, m = i(N, 4), i(N, 4, low=1)
    s, t = b(N, 4), b(N, 4)
    anywhere = (
        "abs atan asinh cos cosh erf exp neg sigmoid sign sgn sin sinh tan tanh ceil floor round.default trunc fix "
        "frac expm1 exp2 erfc relu relu6 hardtanh hardswish hardsigmoid silu mish gelu elu selu celu leaky_relu "
        "softplus log_sigmoid hardshrink softshrink square isnan isinf isfinite logical_not alias detach lift_fresh "
        "lift_fresh_copy clone contiguous positive resolve_conj resolve_neg"
    )
    for name in anywhere.split():
        yield from of(name if "." in name else f"{name}.default", 2 * x)
    for name in ("acos", "asin", "atanh", "log", "sqrt", "rsqrt", "reciprocal", "log1p", "log2", "log10"):
        yield from of(f"{name}.default", p(N, 4))
    yield from of("acosh.default", 1 + p(N, 4))
    for name in ("exp", "sigmoid", "sqrt", "reciprocal", "abs", "neg", "sign", "ceil", "relu", "isfinite", "square"):
        yield from of(f"{name}.default", m)
    special = torch.tensor([[0.5, math.inf, -math.inf, math.nan]] * N)
    yield from of("isnan.default isinf.default isfinite.default", special)
    yield from of("round.decimals", x, decimals=2)
    yield from of("gelu.default", x, approximate="tanh")
    yield from of("elu.default", x, 0.7, 1.1, 1.3)
    yield from of("elu.default", x, 0.7, 1.1, 1)
    yield from of("celu.default", x, 0.6)
    yield from of("leaky_relu.default", x, 0.2)
    yield from of("softplus.default", x, 2.0)
    yield from of("softplus.default", 4 * x, 1.0, 3.0)
    yield from of("hardtanh.default", x, -0.3, 0.4)
    yield from of("hardshrink.default softshrink.default", x, 0.3)
    yield from of("threshold.default", x, 0.2, -7.0)
    yield from of("glu.default", x, -1)
    yield from of("prelu.default _prelu_kernel.default", f(N, 4), Weight(p(1)))
    yield from of("prelu.default", f(N, 4, 2, 2), Weight(p(4)))
    for operands in ((x, y), (x, row), (n, m), (x, n), (s, n), (n, x)):
        yield from of("add.Tensor mul.Tensor maximum.default minimum.default max.other min.other", *operands)
        yield from of("eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor", *operands)
    yield from of("add.Tensor mul.Tensor maximum.default minimum.default eq.Tensor lt.Tensor ge.Tensor", s, t)
    for operands in ((x, y), (n, m), (x, row)):
        yield from of("sub.Tensor", *operands, alpha=2)
        yield from of("add.Tensor", *operands, alpha=3)
        yield from of("rsub.Tensor", *operands)
        yield from of("div.Tensor true_divide.Tensor divide.Tensor", *operands)
        yield from of("remainder.Tensor fmod.Tensor", *operands)
        for mode in ("floor", "trunc"):
            yield from of("div.Tensor_mode divide.Tensor_mode", *operands, rounding_mode=mode)
    signed = torch.tensor([[-7, 7, -8, 8]] * N)
    by = torch.tensor([[3, -3, 4, -4]] * N)
    yield from of("floor_divide.default remainder.Tensor fmod.Tensor", signed, by)
    yield from of("floor_divide.default", 5 * x, y)
    yield from of("floor_divide.Scalar", signed, 3)
    for number in (2, 2.5):
        for left in (x, n):
            yield from of("add.Scalar sub.Scalar rsub.Scalar mul.Scalar div.Scalar true_divide.Scalar", left, number)
            yield from of("divide.Scalar remainder.Scalar fmod.Scalar", left, number)
            yield from of("eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar", left, number)
            yield from of("add.Tensor sub.Tensor mul.Tensor div.Tensor", left, number)
        yield from of("div.Scalar_mode divide.Scalar_mode", x, number, rounding_mode="floor")
    yield from of("rsub.Scalar", x, 1.5, 2)
    for exponent in (2, 3, 0.5, -0.5, -1, 1, 1.7):
        yield from of("pow.Tensor_Scalar", p(N, 4), exponent)
    yield from of("pow.Tensor_Scalar", n, 2)
    yield from of("pow.Tensor_Tensor", p(N, 4), f(N, 4))
    yield from of("pow.Scalar", 2.0, x)
    yield from of("pow.Scalar", 2, n)
    yield from of("addcmul.default", x, y, f(N, 4), value=0.5)
    yield from of("addcdiv.default", x, y, p(N, 4), value=0.5)
    yield from of("addcmul.default addcdiv.default", x, y, p(N, 4))
    yield from of("lerp.Tensor", x, y, p(N, 4))
    yield from of("lerp.Scalar", x, y, 0.3)
    yield from of("clamp.default clip.default", x, -0.5, 0.5)
    yield from of("clamp.default", x, None, 0.5)
    yield from of("clamp.default", n, 1, 3)
    yield from of("clamp.Tensor clip.Tensor", x, Weight(f(4)), Weight(p(4)))
    yield from of("clamp_min.default clamp_max.default", x, 0.1)
    yield from of("clamp_min.Tensor clamp_max.Tensor", x, y)
    yield from of("where.self", s, x, y)
    yield from of("where.self", s, x, n)
    yield from of("where.ScalarOther", s, x, 0.5)
    yield from of("where.ScalarSelf", s, 0.5, x)
    yield from of("where.Scalar", s, 1.0, 2.0)
    yield from of("masked_fill.Scalar", x, s, -9.0)
    yield from of("masked_fill.Tensor", x, s, Weight(torch.tensor(-9.0)))
    yield from of("logical_and.default logical_or.default logical_xor.default", s, t)
    yield from of("logical_and.default logical_or.default logical_xor.default", x, n)
    yield from of("logical_not.default", n)
    yield from of("bitwise_not.default", s)
    yield from of("bitwise_not.default", n)
    bits = "bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__"
    for name in bits.split():
        yield from of(f"{name}.Tensor", s, t)
        yield from of(f"{name}.Tensor", n, m)
        yield from of(f"{name}.Scalar", n, 3)
    yield from of("dropout.default feature_dropout.default alpha_dropout.default", x, 0.5, False)
    yield from of("feature_alpha_dropout.default native_dropout.default", x, 0.5, False)
    for dtype in (torch.int64, torch.bool, torch.float64, torch.int32):
        yield from of("to.dtype _to_copy.default", x, dtype=dtype)
    yield from of("to.dtype_layout", n, dtype=torch.float32, layout=torch.strided, device=torch.device("cpu"))
    yield from of("to.device", x, torch.device("cpu"), torch.float64)
    yield from of("to.other type_as.default", x, n)
    yield from of("to.prim_Device", x, torch.device("cpu"), torch.float64)
    yield from of("to.prim_dtype", x, torch.int64)
    yield from of("copy.default", x, row)
    yield from of("copy.default", n, y)
    yield from of("fill.Scalar", x, 3)
    yield from of("fill.Tensor", x, Weight(torch.tensor(2.0)))


def contraction() -> Iterator[Call]:
    """Yield calls of the operators in `contraction`."""
    weight, bias = Weight(f(5, 4)), Weight(f(5))
    for x in (f(N, 4), f(N, 2, 4)):
        yield from of("linear.default", x, weight, bias)
        yield from of("linear.default", x, weight)
    yield from of("linear.default", Fixed(f(4)), weight, bias)
    yield from of("linear.default", f(N, 2, 4), Fixed(f(5, 4)))
    yield from of("matmul.default linalg_matmul.default", f(N, 2, 4), Weight(f(4, 5)))
    yield from of("matmul.default", f(N, 4), Weight(f(4)))
    yield from of("matmul.default bmm.default", f(N, 2, 4), f(N, 4, 3))
    yield from of("mm.default", f(N, 4), Weight(f(4, 2)))
    yield from of("mv.default", f(N, 4), Weight(f(4)))
    yield from of("dot.default vdot.default", Fixed(f(4)), Weight(f(4)))
    yield from of("addmm.default", Weight(f(5)), f(N, 4), Weight(f(4, 5)))
    yield from of("addmm.default", Weight(f(5)), f(N, 4), Weight(f(4, 5)), beta=0.5, alpha=2)
    yield from of("baddbmm.default", f(N, 2, 3), f(N, 2, 4), f(N, 4, 3), beta=0.5, alpha=2)
    yield from of("baddbmm.default", f(N, 2, 3), f(N, 2, 4), f(N, 4, 3), beta=0)
    yield from of("addmv.default", Weight(f(3)), Fixed(f(3, 4)), Weight(f(4)))
    yield from of("outer.default ger.default", f(N), f(N))
    yield from of("einsum.default", "b i j, b j k -> b i k", [f(N, 2, 4), f(N, 4, 3)])
    yield from of("einsum.default", "bhwc,hkc->bhwk", [f(N, 2, 3, 4), Weight(f(2, 5, 4))])
    for rank, name in ((1, "conv1d"), (2, "conv2d"), (3, "conv3d")):
        space = (7, 6, 5)[:rank]
        kernel = (3, 2, 2)[:rank]
        yield from of(f"{name}.default", f(N, 4, *space), Weight(f(6, 4, *kernel)), Weight(f(6)), [2], [1])
        yield from of(f"{name}.default", f(N, 4, *space), Weight(f(6, 2, *kernel)), None, [1], [1], [2] * rank, 2)
        yield from of(f"{name}.padding", f(N, 4, *space), Weight(f(6, 4, *kernel)), None, [1], "same")
        yield from of(
            f"{name}.padding", f(N, 4, *space), Weight(f(6, 4, *kernel)), Weight(f(6)), [1], "valid", [2] * rank
        )
        yield from of(f"{name}.default", Fixed(f(4, *space)), Weight(f(6, 4, *kernel)))
        transposed = f"conv_transpose{rank}d.{'default' if rank == 1 else 'input'}"
        yield from of(transposed, f(N, 4, *space), Weight(f(4, 6, *kernel)), Weight(f(6)), [2] * rank, [1] * rank)
        yield from of(transposed, f(N, 4, *space), Weight(f(4, 3, *kernel)), None, [2] * rank, [0], [1] * rank, 2)
    forward = (f(N, 4, 7, 6), Weight(f(6, 4, 3, 3)), Weight(f(6)), [1, 2], [1, 0], [1, 1], False, [0, 0], 1)
    yield from of("convolution.default", *forward)
    backward = (f(N, 4, 7, 6), Weight(f(4, 6, 3, 3)), None, [2, 2], [1, 0], [1, 1], True, [1, 0], 1)
    yield from of("convolution.default", *backward)
    yield from attention()


def attention() -> Iterator[Call]:
    """Yield calls of attention: masks, causal, grouped queries, an explicit scale, several ranks."""
    name = "scaled_dot_product_attention.default"
    q, k, v = f(N, 6, 5, 4), f(N, 6, 7, 4), f(N, 6, 7, 3)
    yield from of(name, q, k, v)
    yield from of(name, q, k, v, scale=0.7)
    yield from of(name, q, k, v, is_causal=True)
    yield from of(name, q, k, v, f(N, 1, 5, 7))
    yield from of(name, q, k, v, Weight(f(1, 1, 5, 7)))
    unseen = f(N, 1, 5, 7).masked_fill(torch.eye(5, 7) > 0, -math.inf)
    unseen[:, :, 2] = -math.inf
    yield from of(name, q, k, v, unseen)
    yield from of(name, q, k, v, Weight(unseen[:1]))
    hidden = b(N, 1, 5, 7)
    hidden[:, :, 1] = False
    yield from of(name, q, k, v, hidden)
    yield from of(name, q, k, v, Weight(hidden[:1]))
    yield from of(name, q, k, v, Weight(torch.ones(1, 1, 5, 7, dtype=torch.bool).tril(2)))
    few, values = f(N, 2, 7, 4), f(N, 2, 7, 3)
    yield from of(name, q, few, values, enable_gqa=True)
    yield from of(name, q, few, values, f(N, 6, 5, 7), enable_gqa=True)
    yield from of(name, q, few, values, is_causal=True, enable_gqa=True)
    yield from of(name, f(N, 5, 4), f(N, 7, 4), f(N, 7, 3))
    yield from of(name, f(N, 2, 3, 5, 4), f(N, 2, 3, 7, 4), f(N, 2, 3, 7, 3))
    # Here the first dimension, which varies, is the number of positions.
    yield from of(name, f(N, 4), f(N, 4), f(N, 4), is_causal=True)


def normalisation() -> Iterator[Call]:
    """Yield calls of the operators in `normalisation`."""
    for shape in ((N, 4), (N, 4, 5), (N, 4, 5, 3)):
        x, statistics = f(*shape), [Weight(f(4)), Weight(p(4))]
        yield from of("batch_norm.default", x, Weight(f(4)), Weight(f(4)), *statistics, False, 0.1, 1e-3, False)
    x = f(N, 4, 5, 3)
    yield from of("batch_norm.default", x, None, None, Weight(f(4)), Weight(p(4)), False, 0.1, 1e-3, False)
    yield from of("batch_norm.default", x, Weight(f(4)), Weight(f(4)), None, None, True, 0.1, 1e-3, False)
    yield aten._native_batch_norm_legit_no_training.default, (
        x, Weight(f(4)), Weight(f(4)), Weight(f(4)), Weight(p(4)), 0.1, 1e-3,
    ), {}  # fmt: skip
    yield from of("native_batch_norm.default", x, None, None, Weight(f(4)), Weight(p(4)), False, 0.1, 1e-3)
    yield from of("instance_norm.default", x, Weight(f(4)), Weight(f(4)), None, None, True, 0.1, 1e-3, False)
    yield from of("instance_norm.default", x, None, None, Weight(f(4)), Weight(p(4)), False, 0.1, 1e-3, False)
    yield from of("layer_norm.default", x, [3], Weight(f(3)), Weight(f(3)), 1e-3)
    yield from of("layer_norm.default", x, [5, 3])
    yield from of("native_layer_norm.default", x, [3], Weight(f(3)), None, 1e-3)
    yield from of("rms_norm.default", x, [3], Weight(f(3)), 1e-3)
    yield from of("rms_norm.default", x, [5, 3])
    yield from of("group_norm.default", x, 2, Weight(f(4)), Weight(f(4)), 1e-3)
    yield from of("group_norm.default", f(N, 4, 6), 1)
    for dim in (1, -1):
        yield from of("softmax.int log_softmax.int special_softmax.default special_log_softmax.default", x, dim)
        yield from of("_softmax.default _log_softmax.default", x, dim, False)
    yield from of("softmax.int", i(N, 4), -1, torch.float32)
    yield from of("softmax.int", Fixed(torch.tensor(2.0)), 0)


def reduction() -> Iterator[Call]:
    """Yield calls of the operators in `reduction`."""
    x, n, s = f(N, 4, 5), i(N, 4, 5), b(N, 4, 5)
    for each in (x, n):
        yield from of("sum.default max.default min.default", each)
        for dims in ([1], [0, -1], []):
            yield from of("sum.dim_IntList amax.default amin.default", each, dims)
            yield from of("sum.dim_IntList amax.default amin.default", each, dims, True)
        yield from of("max.dim min.dim", x, 1)
        yield from of("max.dim min.dim", each, -1, True)
        yield from of("argmax.default argmin.default", x, 1)
        yield from of("argmax.default argmin.default", x, -1, True)
        yield from of("argmax.default argmin.default", x)
        yield from of("cumsum.default", each, 1)
        yield from of("topk.default", torch.stack([torch.randperm(9, generator=_GENERATOR) for _ in range(N)]), 3)
        yield from of("sort.default", each, 1)
        yield from of("prod.default", each)
        yield from of("prod.dim_int", each, 1, True)
        yield from of("any.default all.default count_nonzero.default", each)
    yield from of("sum.default any.default all.default", s)
    yield from of("any.dim all.dim", s, 1)
    yield from of("any.dim all.dim", n, -1, True)
    yield from of("any.dims all.dims", s, [1, 2])
    yield from of("count_nonzero.dim_IntList", n, [1])
    yield from of("sum.default", n, dtype=torch.float32)
    yield from of("mean.default", x)
    yield from of("mean.default", n, dtype=torch.float32)
    for axes in ([2], [1, -1], None):
        yield from of("mean.dim", x, axes)
        yield from of("mean.dim", x, axes, True)
    yield from of("mean.dim", f(N, 2, 4, 5), [2, 3])
    yield from of("mean.dim", f(N, 2, 4, 5), [-1, -2], True)
    yield from of("logsumexp.default", x, [1])
    for name in ("var", "std", "var_mean", "std_mean"):
        yield from of(f"{name}.default", x)
        yield from of(f"{name}.default", x, False)
        yield from of(f"{name}.dim", x, [1], True, True)
        yield from of(f"{name}.correction", x, [1, 2], correction=0)
        yield from of(f"{name}.correction", x, [0], keepdim=True)
    for order in (2, 1, 3, 0, math.inf, -math.inf):
        yield from of("linalg_vector_norm.default", x, order, [1])
        yield from of("norm.ScalarOpt_dim", x, order, [1], True)
    yield from of("norm.Scalar", x, 2)
    yield from of("cumsum.default", s, 1)
    yield from of("diff.default", x, 2, 1)
    yield from of("diff.default", x, 1, 1, f(N, 2, 5), f(N, 1, 5))
    yield from of("diff.default", s, 1, 1)
    yield from of("topk.default", x, 2, 1, False)
    yield from of("sort.default argsort.default", x, 1, True)
    yield from of("sort.stable argsort.stable", n, stable=True, dim=1)
    yield from of("histc.default", x, 4, -1, 1)
    yield from of("histc.default", i(N, 4).float(), 5, 0, 4)
    yield from of("bucketize.Tensor", x, Weight(torch.tensor([-0.5, 0.0, 0.5])))
    yield from of("bucketize.Tensor", n, Weight(torch.tensor([1, 3])), out_int32=True, right=True)


def shape() -> Iterator[Call]:
    """Yield calls of the operators in `shape`."""
    x = f(N, 4, 6)
    yield from of("view.default reshape.default _unsafe_view.default view_copy.default", x, [-1, 6])
    yield from of("view.default reshape.default _reshape_copy.default", x, [-1, 2, 2, 6])
    yield from of("view.default", x, [-1])
    yield from of("view.dtype", x, torch.float32)
    yield from of("view_as.default reshape_as.default", x, f(N, 6, 4))
    yield from of("flatten.using_ints", x)
    yield from of("flatten.using_ints", x, 1)
    yield from of("flatten.using_ints", x, 0, 1)
    yield from of("flatten.using_ints", x, 1, 1)
    yield from of("flatten.using_ints", Fixed(torch.tensor(1.0)))
    yield from of("unflatten.int", x, -1, [2, -1])
    yield from of("squeeze.default", f(N, 1, 4, 1))
    yield from of("squeeze.dim", f(N, 1, 4), 1)
    yield from of("squeeze.dim", f(N, 1, 4), -1)
    yield from of("squeeze.dims", f(N, 1, 4, 1), [1, -1])
    yield from of("unsqueeze.default", x, -2)
    yield from of("expand.default broadcast_to.default", f(N, 1, 4), [-1, 5, 4])
    yield from of("expand.default", Fixed(f(1, 4)), [2, 3, -1])
    yield from of("expand_as.default", Weight(f(4, 1)), x)
    yield from of("broadcast_tensors.default", [f(N, 1, 4), Weight(f(5, 1))])
    yield from of("permute.default", x, [2, 0, -2])
    yield from of("permute.default", x, [0, 1, 2])
    yield from of("transpose.int swapaxes.default swapdims.default", x, 0, -1)
    yield from of("t.default", f(N, 4))
    yield from of("mT.default adjoint.default", x)
    yield from of("numpy_T.default", f(N, 4))
    yield from of("movedim.int moveaxis.int", x, 0, -1)
    yield from of("movedim.intlist moveaxis.intlist", x, [0, 1], [2, 0])
    yield from of("flip.default", x, [1, -1])
    yield from of("flip.default", x, [])
    yield from of("roll.default", x, [1, -2], [1, 2])
    yield from of("roll.default", x, [2])
    yield from of("cat.default concat.default concatenate.default", [x, f(N, 2, 6)], 1)
    yield from of("cat.default", [x, i(N, 4, 2), Weight(torch.empty(0))], -1)
    yield from of("stack.default", [x, f(N, 4, 6)], -1)
    yield from of("repeat.default", x, [2, 1, 2])
    yield from of("repeat.default", x, [2, 1, 1, 1])
    yield from of("repeat.default", x, [1, 1, 1])
    yield from of("tile.default", x, [2])
    yield from of("tile.default", x, [2, 1, 1, 3])
    yield from of("repeat_interleave.self_int", x, 2, 1)
    yield from of("repeat_interleave.self_int", x, 2, 0)
    yield from of("repeat_interleave.self_int", x, 3)
    yield from of("meshgrid.default", [f(N), Weight(f(4))])
    yield from of("meshgrid.indexing", [f(N), Weight(f(4))], indexing="xy")
    yield from of("meshgrid.indexing", [f(N), Weight(f(4))], indexing="ij")
    yield from of("slice.Tensor", x, 1, 1, 3)
    yield from of("slice.Tensor", x, 2, -5, -1, 2)
    yield from of("slice.Tensor", x, 0, 1)
    yield from of("slice.Tensor", x, 1, 0, 2**63 - 1)
    yield from of("select.int", x, 1, -1)
    yield from of("select.int", x, 0, 1)
    yield from of("narrow.default", x, 1, -3, 2)
    yield from of("unbind.int", x, 1)
    yield from of("unbind.int", f(N, 1, 4), 1)
    yield from of("split.Tensor", x, 4, -1)
    yield from of("split_with_sizes.default split.sizes", x, [1, 3], 1)
    yield from of("chunk.default", x, 3, 1)
    yield from of("chunk.default", x, 1, 1)
    yield from of("tensor_split.sections", x, 4, 2)
    yield from of("tensor_split.indices", x, [1, 3], 1)
    yield from of("unfold.default", x, 2, 3, 2)
    yield from of("pixel_shuffle.default", f(N, 8, 2, 3), 2)
    yield from of("pixel_unshuffle.default", f(N, 2, 4, 6), 2)
    yield from of("channel_shuffle.default", f(N, 6, 2, 3), 3)
    yield from of("diagonal.default", x, 1, 1, 2)
    yield from of("diagonal.default", x, -1, -1, 1)


def indexing() -> Iterator[Call]:
    """Yield calls of the operators in `indexing`."""
    x, rows = f(N, 4, 5), i(N, high=N)
    cells = i(N, 4, 2, high=5)
    yield from of("embedding.default", Weight(f(7, 4)), i(N, 2, high=7))
    yield from of("index_select.default", x, 1, Fixed(i(6, high=4)))
    yield from of("gather.default", x, -1, cells)
    yield from of("take_along_dim.default", x, cells, -1)
    yield from of("index.Tensor _unsafe_index.Tensor", x, [rows])
    yield from of("index.Tensor", x, [None, Fixed(i(6, low=-4, high=4))])
    yield from of("index.Tensor", x, [rows, i(N, high=4)])
    yield from of("index.Tensor", x, [rows, None, i(N, high=5)])
    yield from of("index.Tensor", x, [None, Fixed(i(2, 1, high=4)), Fixed(i(3, high=5))])
    for accumulate in (False, True):
        places = torch.arange(N)
        yield from of("index_put.default _unsafe_index_put.default", x, [places], f(N, 4, 5), accumulate)
        yield from of("index_put.default", x, [None, Weight(torch.tensor([0, 2]))], f(N, 2, 5), accumulate)
        yield from of("index_put.default", x, [None, Weight(torch.tensor([1]))], Weight(torch.tensor(2.0)), accumulate)
        yield from of(
            "index_put.default", x, [Weight(torch.tensor([0, 1])), None, Weight(torch.tensor([2, 4]))],
            Weight(f(2, 4)), accumulate,
        )  # fmt: skip
    yield from of("index_add.default", x, 1, Weight(torch.tensor([0, 2, 0])), f(N, 3, 5))
    yield from of("index_add.default", x, 1, Weight(torch.tensor([0, 2])), f(N, 2, 5), alpha=2)
    distinct = torch.stack([torch.randperm(5, generator=_GENERATOR)[:2] for _ in range(N * 4)]).view(N, 4, 2)
    yield from of("scatter.src", x, 2, distinct, f(N, 4, 2))
    yield from of("scatter.value", x, 2, distinct, 3.0)
    yield from of("scatter_add.default", x, 2, cells, f(N, 4, 2))
    for reduce in ("sum", "amax", "prod"):
        yield from of("scatter_reduce.two", x, 2, cells, f(N, 4, 2), reduce)
    yield from of("one_hot.default", i(N, 2), 6)
    yield from of("slice_scatter.default", x, f(N, 2, 5), 1, 1, 3)
    yield from of("slice_scatter.default", x, f(N, 4, 2), 2, 0, 4, 2)
    yield from of("slice_scatter.default", x, f(N, 4, 5), 1)
    yield from of("select_scatter.default", x, f(N, 5), 1, -1)
    yield from of("tril.default triu.default", x)
    yield from of("tril.default triu.default", i(N, 4, 5).int(), 1)


def creation() -> Iterator[Call]:
    """Yield calls of the operators in `creation`; those of constant sizes are folded before they are translated."""
    x, n = f(N, 4), i(N, 4)
    yield from of("zeros_like.default ones_like.default", x)
    yield from of("zeros_like.default ones_like.default", n, dtype=torch.float32)
    yield from of("full_like.default", x, 3)
    yield from of("full_like.default", n, 2.5, dtype=torch.float32)
    yield from of("new_zeros.default new_ones.default", x, [2, 3])
    yield from of("new_full.default", x, [2, 3], 1.5)


def spatial() -> Iterator[Call]:
    """Yield calls of the operators in `spatial`."""
    for rank in (1, 2, 3):
        x = f(N, 4, *(9, 8, 6)[:rank])
        for ceil in (False, True):
            yield from of(f"max_pool{rank}d.default", x, [3], [2], [1], [1], ceil)
            yield from of(f"avg_pool{rank}d.default", x, [3], [2], [1], ceil, True)
            yield from of(f"avg_pool{rank}d.default", x, [3], [2], [1], ceil, False)
        yield from of(f"max_pool{rank}d.default", x, [2])
        yield from of(f"max_pool{rank}d.default", x, [2], [1], [0], [2])
        yield from of(f"avg_pool{rank}d.default", x, [2])
        yield from of(f"adaptive_avg_pool{rank}d.default", x, [1] * rank)
        yield from of(f"adaptive_avg_pool{rank}d.default", x, [3, 4, 2][:rank])
        yield from of(f"adaptive_avg_pool{rank}d.default", x, [4, 3, 5][:rank])
        yield from of(f"adaptive_max_pool{rank}d.default", x, [3, 4, 2][:rank])
        yield from of(f"adaptive_avg_pool{rank}d.default", x, list(x.shape[2:]))
        yield from of(f"replication_pad{rank}d.default", x, [1, 2, 0, 1, 1, 0][: 2 * rank])
        yield from of(f"reflection_pad{rank}d.default", x, [1, 2, 0, 1, 1, 0][: 2 * rank])
    yield from of("max_pool2d.default", Fixed(f(4, 6, 6)), [2])
    yield from of("max_pool2d_with_indices.default", f(N, 2, 6, 6), [2])
    yield from of("_adaptive_avg_pool2d.default", f(N, 2, 6, 6), [2, 3])
    yield from of("_adaptive_avg_pool3d.default", f(N, 2, 6, 6, 4), [2, 3, 2])
    for rank, linear in ((1, "linear1d"), (2, "bilinear2d"), (3, "trilinear3d")):
        x = f(N, 2, *(4, 5, 3)[:rank])
        size, factors = [7, 3, 1][:rank], [1.5, 2.0, 0.7][:rank]
        for aligned in (False, True):
            yield from of(f"upsample_{linear}.vec", x, size, aligned, None)
            yield from of(f"upsample_{linear}.default", x, size, aligned)
        yield from of(f"upsample_{linear}.vec", x, None, False, factors)
        yield from of(f"upsample_nearest{rank}d.vec", x, size, None)
        yield from of(f"upsample_nearest{rank}d.vec", x, None, factors)
        yield from of(f"upsample_nearest{rank}d.default", x, size)
    for rank in (1, 2):
        x = f(N, 2, *(4, 5)[:rank])
        yield from of(f"_upsample_nearest_exact{rank}d.vec", x, [7, 3][:rank], None)
        yield from of(f"_upsample_nearest_exact{rank}d.default", x, [7, 3][:rank])
    x = f(N, 2, 6, 5)
    for aligned in (False, True):
        yield from of("upsample_bicubic2d.vec", x, [9, 7], aligned, None)
        yield from of("upsample_bicubic2d.default", x, [9, 7], aligned)
    yield from of("_upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec", x, [3, 4], False, None)
    yield from of("_upsample_bilinear2d_aa.default _upsample_bicubic2d_aa.default", x, [3, 4], False)
    yield from of("pad.default", x, [1, 2, 0, 1])
    yield from of("pad.default", x, [1, -1, 0, 1], "constant", 2.5)
    for way in ("reflect", "replicate", "circular"):
        yield from of("pad.default", x, [1, 2, 3, 1], way)
    yield from of("pad.default", b(N, 4), [1, 1])
    yield from of("pad.default", x, [0, 0])
    yield from of("constant_pad_nd.default", x, [1, 2], 1)
    for padding in range(3):
        for mode in range(2):
            grid = f(N, 3, 4, 2)
            yield from of("grid_sampler.default grid_sampler_2d.default", x, grid, mode, padding, False)
            yield from of("grid_sampler.default", x, grid, mode, padding, True)
    yield from of("grid_sampler.default", x, f(N, 3, 4, 2), 2, 0, False)
    yield from of("grid_sampler.default grid_sampler_3d.default", f(N, 2, 4, 5, 3), f(N, 2, 3, 4, 3), 0, 0, False)
    yield from of("im2col.default", x, [3, 2], [1, 2], [1, 0], [2, 1])
    yield from of("im2col.default", Fixed(f(2, 6, 5)), [3, 2], [1, 1], [0, 0], [1, 1])
    yield from of("col2im.default", f(N, 2 * 6, 16), [6, 5], [3, 2], [1, 1], [0, 0], [1, 1])
    yield from of("col2im.default", f(N, 2 * 9, 9), [6, 6], [3, 3], [1, 1], [1, 1], [2, 2])


FAMILIES = {
    "elementwise": elementwise,
    "contraction": contraction,
    "normalisation": normalisation,
    "reduction": reduction,
    "shape": shape,
    "indexing": indexing,
    "creation": creation,
    "spatial": spatial,
}
