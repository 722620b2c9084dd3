"""Fold padding into the convolution or pooling that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Final

from torch import fx

from graphopt.dialects.onnx.facts import is_onnx
from graphopt.editing import insert, remove_dead, replace
from graphopt.graph import Call, Graph
from graphopt.passes.onnx_calls import is_call, tensor_type
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register

NOWHERE_NEGATIVE: Final = ("Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt")


@register
@dataclass(frozen=True)
class FoldPad(Pass):
    """Fold padding by a constant into the convolution or the pooling that reads it.

    A convolution pads with zeros by itself: ``Conv(Pad(x, p), pads=q) = Conv(x, pads=p + q)``. So does an average that
    counts what is padded; one that pads nothing counts what a Pad added, and so must count it afterwards. A maximum
    is over what is there: padding by minus infinity adds nothing to it, nor does padding by zero where nothing is
    negative. Outputs are the same numbers, up to the order of sums.

    Left as they are: paddings of batch or channels, negative ones, other modes and values, automatic padding, and
    poolings whose windows would lie in the padding.
    """

    name: ClassVar[str] = "fold-pad"
    preserves: ClassVar[Preserves] = Preserves.EXACT
    needs_values: ClassVar[bool] = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not is_onnx(graph):
            return PassResult(graph)
        for node in list(graph.nodes):
            if not is_call(node, "Conv", "AveragePool", "MaxPool") or not is_call(node.args[0], "Pad"):
                continue
            reason = _why_not(Call(node), Call(node.args[0]))
            if reason is not None:
                context.skipped(node.name, reason)
            elif context.allows(node.name):
                _fold(graph, node)
                context.applied(node.name, f"pads as {node.args[0].name} did")
        remove_dead(graph)
        graph.module.recompile()
        return PassResult(graph)


def _amounts(pad: Call) -> list[int] | None:
    """Return how much a Pad adds in front and behind, by spatial dimension; None where it does anything else."""
    spec, pads, axes = tensor_type(pad.node), pad["pads"], pad["axes"]
    if spec is None or not isinstance(pads, list | tuple) or any(not isinstance(n, int) or n < 0 for n in pads):
        return None
    rank = len(spec.shape)
    where = range(rank) if axes is None else [axis % rank for axis in axes]
    front, behind = [0] * rank, [0] * rank
    for i, axis in enumerate(where):
        front[axis], behind[axis] = pads[i], pads[len(where) + i]
    return None if any(front[:2] + behind[:2]) else [*front[2:], *behind[2:]]


def _own(call: Call, count: int) -> list[int]:
    """Return how much a convolution or pooling pads."""
    return list(call["pads"] or [0] * count)


def _why_not(call: Call, pad: Call) -> str | None:
    amounts, value = _amounts(pad), pad["constant_value"]
    name = pad.node.name
    if pad["mode"] != "constant":
        return f"{name} pads by {pad['mode']}"
    if isinstance(value, fx.Node):
        return f"{name} pads by a number that is computed"
    if amounts is None:
        return f"{name} pads more than spatial dimensions, or by sizes that vary, or cuts"
    if call["auto_pad"] not in (None, "NOTSET"):
        return f"{call.node.name} pads automatically ({call['auto_pad']})"
    value = float(value or 0)
    if is_call(call.node, "Conv"):
        return None if value == 0 else f"{name} pads by {value:g}, a convolution by 0"
    if tensor_type(call.node) is None or call["ceil_mode"]:
        return f"{call.node.name} rounds its size up, or yields positions"
    total = [a + b for a, b in zip(amounts, _own(call, len(amounts)), strict=True)]
    dilations: Any = call["dilations"] or [1] * len(call["kernel_shape"])
    if any(n >= k for n, k in zip(total, [*call["kernel_shape"]] * 2, strict=True)) or set(dilations) != {1}:
        return f"windows of {call.node.name} would lie in the padding"
    if is_call(call.node, "AveragePool"):
        if value != 0:
            return f"{name} pads by {value:g}, an average by 0"
        own = any(_own(call, len(amounts))) and not call["count_include_pad"]
        return f"{call.node.name} counts what {name} pads, and not what it pads itself" if own else None
    if value == -inf or (value == 0 and is_call(pad.node.args[0], *NOWHERE_NEGATIVE)):
        return None
    return f"{name} pads by {value:g}, a maximum by nothing"


def _fold(graph: Graph, node: fx.Node) -> None:
    pad: fx.Node = node.args[0]  # type: ignore[assignment]
    amounts = _amounts(Call(pad))
    assert amounts is not None
    call = Call(node)
    pads = [a + b for a, b in zip(amounts, _own(call, len(amounts)), strict=True)]
    kwargs = {**node.kwargs, "pads": pads}
    if is_call(node, "AveragePool"):
        kwargs["count_include_pad"] = 1
    replace(node, insert(graph, node, node.target, (pad.args[0], *node.args[1:]), kwargs, like=node))
