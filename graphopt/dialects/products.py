"""Read operators that multiply two operands and sum, the same in every dialect.

What may live here: which operands a call multiplies and which way round, how a convolution slides over its input, and
which argument is the bias. What is scored, fitted or folded there is for others to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphopt.dialects.onnx.operators import Op
from graphopt.graph import Call, tensor_spec

__all__ = ["Attention", "Pairs", "Product", "Windows", "attention_of", "operator_key", "product_of"]

aten = torch.ops.aten

Pairs: TypeAlias = tuple[tuple[int, int], ...]
"""Numbers before and after, one pair a dimension of places."""


def operator_key(node: fx.Node) -> Any:
    """Return what tables of several dialects know an operator by: itself, or of an ONNX operator its name."""
    return node.target.key if isinstance(node.target, Op) else node.target


# -- convolutions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """How a convolution slides over places; every tuple has one entry a dimension of places.

    A transposed convolution is one over its input with ``stride - 1`` zeros put between neighbours, its kernel turned
    round; its windows go over that, step by step.

    Attributes:
        kernel: The extents of the kernel.
        stride: The steps; of a transposed convolution, how far it spreads its input out.
        dilation: How far the taps are apart.
        padding: The zeros before and after what the windows go over; negative ones cut it off. None where they follow
            from the input's size.
        transposed: Whether it is a transposed convolution.
        larger: Of padding that follows from the size, the side that gets the larger half of an odd number.
        extents: Of a transposed one, the extents that the result must have; None for those of the input times stride.
        longer: Of a transposed one with padding that follows, what its result has beyond that of the windows.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Pairs | None
    transposed: bool = False
    larger: Literal["begin", "end"] = "end"
    extents: tuple[int, ...] | None = None
    longer: tuple[int, ...] = ()

    @property
    def reach(self) -> tuple[int, ...]:
        """How far the last tap is from the first."""
        return tuple(gap * (extent - 1) for extent, gap in zip(self.kernel, self.dilation, strict=True))

    def pads(self, sizes: Sequence[int]) -> Pairs:
        """Return the zeros before and after, for an input of these extents."""
        if self.padding is not None:
            return self.padding
        if not self.transposed:
            totals = (
                max((-(-n // step) - 1) * step + reach + 1 - n, 0)
                for n, step, reach in zip(sizes, self.stride, self.reach, strict=True)
            )
            return tuple(self._halves(total) for total in totals)
        wanted = self.extents or [n * step for n, step in zip(sizes, self.stride, strict=True)]
        found = []
        for n, step, reach, more, extent in zip(sizes, self.stride, self.reach, self.longer, wanted, strict=True):
            before, after = self._halves(step * (n - 1) + reach + 1 + more - extent)
            found.append((reach - before, reach - after + more))
        return tuple(found)

    def _halves(self, total: int) -> tuple[int, int]:
        half = total // 2
        return (half, total - half) if self.larger == "end" else (total - half, half)

    def over(self, x: Tensor) -> Tensor:
        """Return what the windows go over: ``x (…, *places)`` padded with zeros, and spread out before."""
        places = x.shape[x.dim() - len(self.kernel) :]
        if self.transposed:
            x = self._spread(x)
        return functional.pad(x, [n for pair in reversed(self.pads(places)) for n in pair])

    def patches(self, x: Tensor) -> Tensor:
        """Return what each place of the result sees of ``x (…, c, *places)``, as a view: ``(…, *places, c, *taps)``."""
        x = self.over(x)
        first = x.dim() - len(self.kernel)
        steps = [1] * len(self.kernel) if self.transposed else self.stride
        # Each turn appends the taps of one dimension at the end.
        for dim, (reach, step, gap) in enumerate(zip(self.reach, steps, self.dilation, strict=True), first):
            x = x.unfold(dim, reach + 1, step)[..., ::gap]
        return x.movedim(first - 1, first - 1 + len(self.kernel))

    def _spread(self, x: Tensor) -> Tensor:
        lead = x.dim() - len(self.stride)
        shape = [*x.shape[:lead], *((n - 1) * s + 1 for n, s in zip(x.shape[lead:], self.stride, strict=True))]
        spread = x.new_zeros(shape)
        places: list[Any] = [slice(None, None, step) for step in self.stride]
        spread[(..., *places)] = x
        return spread


# -- products -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A call that computes ``scale · left × right + bias_scale · bias``, the product being one of matrices or windows.

    Matrices are ``(…, rows, inner)`` and ``(…, inner, columns)``, before they are turned; a vector has ``inner`` alone.
    A convolution's left operand is its input, ``(…, channels, *places)``, its right one the kernel: ``(outputs,
    channels / groups, *taps)``, or of a transposed one ``(channels, outputs / groups, *taps)``.

    Attributes:
        node: The call.
        left: The first operand.
        right: The second operand.
        turned: Whether the call reads the last two dimensions of either operand exchanged.
        scale: What the product is multiplied by.
        bias: What is added to it along the outputs; None where nothing is.
        slot: The argument that holds the bias; None where the operator has none.
        bias_scale: What the bias is multiplied by.
        windows: How a convolution slides; None for a product of matrices.
        groups: How many groups the channels of a convolution are divided into.
        then: What the call does to the sum before it yields it, in words; None where it yields the sum.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    turned: tuple[bool, bool] = (False, False)
    scale: float = 1.0
    bias: fx.Node | None = None
    slot: str | None = None
    bias_scale: float = 1.0
    windows: Windows | None = None
    groups: int = 1
    then: str | None = None

    @property
    def is_linear(self) -> bool:
        """Say whether its right operand can only be a weight: it is a linear layer or a convolution."""
        return self.windows is not None or self.node.target is aten.linear.default


def product_of(node: fx.Node) -> Product | None:
    """Return how a call multiplies two operands; None for any other operator."""
    if node.op != "call_function":
        return None
    read = _READERS.get(operator_key(node))
    return None if read is None else read(Call(node))


def _linear(call: Call) -> Product:
    turned = len(call.spec("weight").shape) == 2
    return Product(call.node, call["input"], call["weight"], (False, turned), bias=call["bias"], slot="bias")


def _of(first: str, second: str) -> Callable[[Call], Product]:
    return lambda call: Product(call.node, call[first], call[second])


def _sum_of(first: str, second: str) -> Callable[[Call], Product]:
    return lambda call: Product(
        call.node,
        call[first],
        call[second],
        scale=call["alpha"],
        bias=call["self"],
        slot="self",
        bias_scale=call["beta"],
    )


def _convolution(call: Call) -> Product:
    kernel = call.spec("weight").shape[2:]
    stride, dilation = _each(call["stride"], kernel), _each(call["dilation"], kernel)
    transposed = bool(call["transposed"]) if call.has("transposed") else "transpose" in call.name
    windows = Windows(kernel, stride, dilation, None, transposed)
    padding: Pairs | None
    if call["padding"] == "same":
        padding = tuple((n // 2, n - n // 2) for n in windows.reach)
    elif call["padding"] == "valid":
        padding = ((0, 0),) * len(kernel)
    else:
        padding = tuple((n, n) for n in _each(call["padding"], kernel))
    if transposed:
        padding = _of_transposed(windows.reach, padding, _each(call["output_padding"], kernel))
    windows = Windows(kernel, stride, dilation, padding, transposed)
    return Product(
        call.node,
        call["input"],
        call["weight"],
        bias=call["bias"],
        slot="bias",
        windows=windows,
        groups=call["groups"],
    )


def _of_transposed(reach: Sequence[int], padding: Pairs, longer: Sequence[int]) -> Pairs:
    """Return the zeros around the spread input of a transposed convolution, of what is cut off its result."""
    return tuple((r - a, r - b + more) for r, (a, b), more in zip(reach, padding, longer, strict=True))


def _each(given: int | Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    """Spell out a number a dimension of places; one number, alone or in a list, holds for all."""
    numbers = tuple(given) if isinstance(given, Sequence) else (given,)
    return numbers * len(kernel) if len(numbers) == 1 else numbers


def _onnx_convolution(call: Call) -> Product:
    kernel = call.spec("W").shape[2:]
    ones = (1,) * len(kernel)
    stride, dilation = tuple(call["strides"] or ones), tuple(call["dilations"] or ones)
    given = list(call["pads"] or [0] * 2 * len(kernel))
    padding: Pairs | None = tuple(zip(given[: len(kernel)], given[len(kernel) :], strict=True))
    automatic = str(call["auto_pad"])
    if automatic == "VALID":
        padding = ((0, 0),) * len(kernel)
    larger: Literal["begin", "end"] = "end" if automatic == "SAME_UPPER" else "begin"
    if not call.has("output_padding"):
        if automatic.startswith("SAME"):
            padding = None
        windows = Windows(kernel, stride, dilation, padding, larger=larger)
    else:
        longer = tuple(call["output_padding"] or [0] * len(kernel))
        extents = None if call["output_shape"] is None else tuple(call["output_shape"][-len(kernel) :])
        reach = Windows(kernel, stride, dilation, None).reach
        follows = extents is not None or automatic.startswith("SAME")
        padding = None if follows or padding is None else _of_transposed(reach, padding, longer)
        windows = Windows(
            kernel, stride, dilation, padding, True, larger=larger, extents=extents, longer=longer if follows else ()
        )
    return Product(
        call.node,
        call["X"],
        call["W"],
        bias=call["B"],
        slot="B",
        windows=windows,
        groups=call["group"],
        then=_then(call),
    )


def _gemm(call: Call) -> Product:
    return Product(
        call.node,
        call["A"],
        call["B"],
        turned=(bool(call["transA"]), bool(call["transB"])),
        scale=call["alpha"],
        bias=call["C"],
        slot="C",
        bias_scale=call["beta"],
        then=_then(call),
    )


def _fused_matmul(call: Call) -> Product | None:
    if any(call.has(name) and call[name] for name in ("transBatchA", "transBatchB")):
        return None
    turned = (bool(call["transA"]), bool(call["transB"]))
    return Product(call.node, call["A"], call["B"], turned=turned, scale=call["alpha"], then=_then(call))


def _then(call: Call) -> str | None:
    """Say what an operator of ONNX Runtime that has more fused into it does to the sum."""
    if call.has("Z") and call["Z"] is not None:
        return "adds another tensor"
    if call.has("activation") and call["activation"]:
        return f"applies {call['activation']}"
    return None


_READERS: Final[dict[Any, Callable[[Call], Product | None]]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _of("self", "other"),
    aten.linalg_matmul.default: _of("self", "other"),
    aten.mm.default: _of("self", "mat2"),
    aten.bmm.default: _of("self", "mat2"),
    aten.addmm.default: _sum_of("mat1", "mat2"),
    aten.baddbmm.default: _sum_of("batch1", "batch2"),
    **{
        getattr(getattr(aten, name), overload): _convolution
        for name in (
            "conv1d",
            "conv2d",
            "conv3d",
            "convolution",
            "conv_transpose1d",
            "conv_transpose2d",
            "conv_transpose3d",
        )
        for overload in getattr(aten, name).overloads()
        if overload != "out"
    },
    "Conv": _onnx_convolution,
    "ConvTranspose": _onnx_convolution,
    "Gemm": _gemm,
    "MatMul": _of("A", "B"),
    "com.microsoft.FusedConv": _onnx_convolution,
    "com.microsoft.FusedGemm": _gemm,
    "com.microsoft.FusedMatMul": _fused_matmul,
    "com.microsoft.FusedMatMulActivation": _fused_matmul,
    "com.microsoft.TransposeMatMul": _fused_matmul,
}


# -- attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """A call that computes the softmax of queries times keys.

    Attributes:
        node: The call.
        query: The node of the queries: ``(…, heads, positions, width)``.
        key: The node of the keys, of which several heads of queries may share one.
        heads: How many heads of queries and of keys there are, where both are flat: ``(…, positions, heads · width)``.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    heads: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """How many entries a query has."""
        last = tensor_spec(self.query).shape[-1]
        return last if self.heads is None else last // self.heads[0]

    def unpacked(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as ``(…, heads, positions, width)``."""
        if self.heads is None:
            return query, key
        first, second = (
            x.unflatten(-1, (n, -1)).transpose(-2, -3) for x, n in zip((query, key), self.heads, strict=True)
        )
        return first, second


def attention_of(node: fx.Node) -> Attention | None:
    """Return what a call of fused attention reads; None for any other operator, and where it makes queries itself."""
    if node.target is aten.scaled_dot_product_attention.default:
        return Attention(node, Call(node)["query"], Call(node)["key"])
    names = _ATTENTIONS.get(operator_key(node))
    if names is None:
        return None
    call = Call(node)
    query, key, count, shared = (call[name] for name in names)
    turns = call.has("do_rotary") and call["do_rotary"]
    if turns or key is None or len(tensor_spec(key).shape) != len(tensor_spec(query).shape):
        return None
    if len(tensor_spec(query).shape) == 4:
        return Attention(node, query, key)
    return Attention(node, query, key, (count, shared)) if len(tensor_spec(query).shape) == 3 else None


_ATTENTIONS: Final[dict[Any, tuple[str, str, str, str]]] = {
    "Attention": ("Q", "K", "q_num_heads", "kv_num_heads"),
    "com.microsoft.GroupQueryAttention": ("query", "key", "num_heads", "kv_num_heads"),
    "com.microsoft.MultiHeadAttention": ("query", "key", "num_heads", "num_heads"),
}
"""Queries, keys and the numbers of their heads, by operator of ONNX."""
