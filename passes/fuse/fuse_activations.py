"""Write activation functions that are spelled out as the one operator that computes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, fx

from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.operators import op
from graphopt.editing import insert, remove_dead, replace
from graphopt.graph import Graph
from graphopt.passes.fuse.opsets import SINCE, offers, require
from graphopt.passes.onnx_calls import constant, is_call, tensor_type
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import plural

MOST: Final = 10
"""How many calls an activation function is looked for in."""

BENDING: Final = ("Clip", "Erf", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softplus", "Tanh")
"""Operators at least one of which is in every function that is known here."""
STRAIGHT: Final = ("Add", "Div", "Identity", "Log", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub")

FUNCTIONS: Final[tuple[tuple[str, Mapping[str, Any]], ...]] = (
    ("Gelu", {}),
    ("Gelu", {"approximate": "tanh"}),
    ("HardSwish", {}),
    ("Swish", {}),
    ("Mish", {}),
    ("Softplus", {}),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    ("Sigmoid", {}),
    ("Softsign", {}),
)
"""What is known: operators of one operand, with their attributes."""


@register
@dataclass(frozen=True)
class FuseActivations(Pass):
    """Make one operator of an activation function that is spelled out.

    Known are, where the file's operator set has them: Gelu, by x (1 + erf(x / √2)) / 2 and by its approximation
    x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2; HardSwish x min(max(x/6 + 1/2, 0), 1); Swish x σ(x);
    Mish x tanh(ln(1 + eˣ)); Softplus ln(1 + eˣ); HardSigmoid, Sigmoid 1 / (1 + e⁻ˣ), Softsign.

    There are many ways to write each, so what is compared is values: a region of at most ten calls of elementwise
    operators, with numbers and one value x as operands, is computed with torch in float64 at points over twelve
    decades of either sign, and around each number that occurs in it. It is one of these functions where all results are
    the same to 2e-7, which is how well single precision holds the numbers in it. Exact up to that rounding.

    Left as they are: regions of whose inner values others read any, and operators that the file's version does not
    have.

    Args:
        raise_opset: let the file declare the least version that has the operator.
        swish: make Swish, too. ONNX Runtime 1.31 fuses the product with a sigmoid by itself and has no kernel of the
            operator: an EfficientNet takes 1.4 times as long with it.

    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415; Howard et al. 2019, arXiv:1905.02244; Ramachandran et al. 2017,
    arXiv:1710.05941; Misra 2019, arXiv:1908.08681.
    """

    name: ClassVar[str] = "fuse-activations"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    raise_opset: bool = False
    swish: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not is_onnx(graph):
            return PassResult(graph)
        for node in reversed(list(graph.nodes)):
            if node.users and is_call(node, *BENDING, *STRAIGHT):
                self._fuse(graph, node, context)
        remove_dead(graph)
        graph.module.recompile()
        return PassResult(graph)

    def _fuse(self, graph: Graph, node: fx.Node, context: Context) -> None:
        found: tuple[fx.Node, frozenset[fx.Node], str, Mapping[str, Any]] | None = None
        for x, region in _regions(graph, node):
            known = _known(graph, node, x, region)
            if known is not None:
                found = (x, region, *known)
        if found is None:
            return
        x, region, name, attributes = found
        if name == "Swish" and not self.swish:
            context.skipped(node.name, f"{plural(len(region), 'call')} make Swish, which is slower (swish)")
            return
        if not offers(graph, name, raise_opset=self.raise_opset):
            reason = (
                f"{plural(len(region), 'call')} make {name}, which is there from opset {SINCE[name]} on (raise_opset)"
            )
            context.skipped(node.name, reason)
            return
        if not context.allows(node.name):
            return
        require(graph, name)
        replace(node, insert(graph, node, op(name), (x,), dict(attributes), like=node))
        context.applied(node.name, f"{plural(len(region), 'call')} make {name}", attributes=dict(attributes))


def _regions(graph: Graph, end: fx.Node) -> Iterator[tuple[fx.Node, frozenset[fx.Node]]]:
    """Yield, the smallest first, the regions that compute ``end`` from one value, with that value."""
    region = {end}
    leaves = _values(graph, end)
    while leaves is not None and len(region) <= MOST:
        if len(leaves) == 1 and len(region) > 1 and any(is_call(each, *BENDING) for each in region):
            yield next(iter(leaves)), frozenset(region)
        if not leaves:
            return
        last = max(leaves)
        if not is_call(last, *BENDING, *STRAIGHT) or not set(last.users) <= region:
            return
        region.add(last)
        more = _values(graph, last)
        leaves = None if more is None else (leaves - {last}) | more


def _values(graph: Graph, node: fx.Node) -> set[fx.Node] | None:
    """Return the operands of a call that are not numbers; None where one is a tensor of the model, or sizes differ."""
    spec, found = tensor_type(node), set()
    if spec is None or not spec.dtype.is_floating_point:
        return None
    for each in node.all_input_nodes:
        own = tensor_type(each)
        if own is None:
            return None
        if each.op == "get_attr":
            if constant(graph, each) is None or any(size != 1 for size in own.shape):
                return None
        elif (own.shape, own.dynamic) != (spec.shape, spec.dynamic):
            return None
        else:
            found.add(each)
    return found


def _known(graph: Graph, end: fx.Node, x: fx.Node, region: frozenset[fx.Node]) -> tuple[str, Mapping[str, Any]] | None:
    """Return which function a region computes."""
    numbers: dict[fx.Node, Tensor] = {}
    for node in region:
        for each in node.all_input_nodes:
            if each.op == "get_attr":
                value = constant(graph, each)
                assert value is not None
                numbers[each] = value.double().reshape(())
    points = _points(tuple(sorted(float(value) for value in numbers.values())))
    values = {x: points, **numbers}
    for node in sorted(region):
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    found = values[end]
    for name, attributes in FUNCTIONS:
        expected = op(name)(points, **attributes)
        # Where it is spelled out, an intermediate result may be too large for its type, and what follows no number.
        close = (found - expected).abs() <= 2e-7 * (1 + expected.abs())
        if bool((close | (points.abs() > 50) & ~found.isfinite()).all()):
            return name, attributes
    return None


@cache
def _points(numbers: tuple[float, ...]) -> Tensor:
    """Return where functions are compared: over twelve decades, densely around 0, and on both sides of the numbers."""
    decades = torch.logspace(-6, 6, 121, dtype=torch.float64)
    around = torch.tensor(numbers, dtype=torch.float64)
    near = torch.cat([around, around * (1 + 1e-3), around * (1 - 1e-3)])
    return torch.cat([decades, -decades, torch.linspace(-12, 12, 241, dtype=torch.float64), near, -near])
