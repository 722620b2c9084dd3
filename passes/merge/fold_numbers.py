"""Fold products with a number into the weights and tables that the other factor is made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, fx, nn

from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.operators import op
from graphopt.editing import add_tensor, insert, read, readers, remove_dead, replace, replace_tensor
from graphopt.graph import Graph, spec_of
from graphopt.passes.onnx_calls import constant, is_call, number, only_reader, tensor_type
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register

MOST: Final = 48
"""How many calls are followed back from one product."""
LARGEST: Final = 1 << 22
"""How many entries a result may have whose channels are followed one by one."""

PASSING: Final = (
    "Expand",
    "Gather",
    "Identity",
    "Neg",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators with f(c x) = c f(x) for the first operand."""


@register
@dataclass(frozen=True)
class FoldNumbers(Pass):
    """Fold products with a single number into the weights and tables that the other factor is made with.

    For every call on the way back from the product that is homogeneous, f(c x) = c f(x): moves, joins and selections
    of entries, sums all of whose terms are scaled, products one of whose factors is. The way ends at what holds
    numbers already: the weight (and bias) of a layer, the table that a product is with, a constant term. So attention's
    scale of queries and keys goes into their projections, or into the tables of rotary embeddings. Where queries, keys
    and values are parts of one projection, only the columns are scaled that reach the product. Of two numbers that
    scale both factors of a matrix product, (a q) (b k) = (a b q) k; then one is left to be folded.

    Where that way is barred, the number goes ahead into the weights of the layers that read the product, if none but
    layers do: W (c x) + b = (c W) x + b.

    Signs go, too: ``[-a, b] * [s, t] = [a, b] * [-s, t]``, as in rotary embeddings.

    The tensors are new; of a table that several products share, each scaled one is made once. Exact up to rounding;
    computed in float64.

    Left as they are: products with values on the way that others read unscaled, or with layers whose weights are
    shared; numbers that are parameters, if ``trainable``.

    Args:
        trainable: leave numbers that are parameters.
    """

    name: ClassVar[str] = "fold-numbers"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    trainable: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not is_onnx(graph):
            return PassResult(graph)
        made: dict[tuple[str, float], str] = {}
        allows = cache(context.allows)
        for node in list(graph.nodes):
            found = self._number(graph, node)
            if found is None or not node.users:
                continue
            value, factor = found
            way = _Way(graph, node, factor, made)
            reason = way.follow(value)
            if reason is not None and (ahead := _ahead(graph, node)) is not None:
                way, reason = _Way(graph, node, factor, made, scaled=[(layer, 1, None) for layer in ahead]), None
            if reason is not None:
                context.skipped(node.name, reason)
            elif allows(node.name):
                way.apply()
                replace(node, value)
                graph.module.graph.erase_node(node)
                context.applied(node.name, f"{factor:g} into {', '.join(way.names)}")
        self._join(graph, context, allows)
        tables: dict[tuple[str, int, int, int], str] = {}
        for node in [n for n in graph.nodes if is_call(n, "Neg")]:
            _fold_sign(graph, node, tables, context, allows)
        remove_dead(graph)
        graph.module.recompile()
        return PassResult(graph)

    def _number(self, graph: Graph, node: fx.Node) -> tuple[fx.Node, float] | None:
        """Return what a call multiplies with which number."""
        spec = tensor_type(node)
        if not is_call(node, "Mul", "Div") or spec is None or not spec.dtype.is_floating_point:
            return None
        sides = ((0, 1), (1, 0)) if is_call(node, "Mul") else ((0, 1),)
        for mine, other in sides:
            value, factor = node.args[mine], number(graph, node.args[other])
            if factor is None or factor == 0 or spec_of(value) != spec:  # type: ignore[arg-type]
                continue
            if self.trainable and constant(graph, node.args[other], parameters=False) is None:
                continue
            if isinstance(value, fx.Node) and value.op == "call_function":
                return value, factor if is_call(node, "Mul") else 1 / factor
        return None

    def _join(self, graph: Graph, context: Context, allows: Callable[[str], bool]) -> None:
        """Of numbers that scale both factors of a matrix product, leave one."""
        for node in [n for n in graph.nodes if is_call(n, "MatMul")]:
            first, second = node.args[:2]
            if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
                continue
            one, two = self._number(graph, first), self._number(graph, second)
            if one is None or two is None or not only_reader(first, node) or not only_reader(second, node):
                continue
            if not allows(second.name):
                continue
            (a, factor), (b, other) = one, two
            dtype = tensor_type(a).dtype  # type: ignore[union-attr]
            both = torch.tensor(factor * other, dtype=torch.float64).to(dtype)
            name = add_tensor(graph, f"{node.name}_scale", both)
            scaled = insert(graph, node, op("Mul"), (a, read(graph, name, node)), like=a)
            node.update_arg(0, scaled)
            node.update_arg(1, b)
            context.applied(second.name, f"{other:g} with {factor:g} of {first.name}")


def _fold_sign(
    graph: Graph,
    node: fx.Node,
    tables: dict[tuple[str, int, int, int], str],
    context: Context,
    allows: Callable[[str], bool],
) -> None:
    """Let the table that a concatenation is multiplied with hold a sign: ``[-a, b] * [s, t] = [a, b] * [-s, t]``."""
    joined: Any = next(iter(node.users), None)
    if len(node.users) != 1 or not is_call(joined, "Concat") or len(joined.users) != 1:
        return
    product, out = next(iter(joined.users)), tensor_type(joined)
    parts: list[fx.Node] = joined.args[0]
    if not is_call(product, "Mul") or out is None or parts.count(node) != 1:
        return
    side = 1 if product.args[0] is joined else 0
    table = product.args[side]
    held, axis = tensor_type(table), int(joined.kwargs["axis"]) % len(out.shape) - len(out.shape)
    specs = [spec for spec in map(tensor_type, parts) if spec is not None]
    if constant(graph, table) is None or held is None or len(held.shape) < -axis or out.dynamic[axis]:
        return
    if held.shape[axis] != out.shape[axis] or len(specs) != len(parts) or not allows(node.name):
        return
    place = parts.index(node)
    start = sum(spec.shape[axis] for spec in specs[:place])
    key = (str(table.target), axis, start, specs[place].shape[axis])
    if key not in tables:
        tables[key] = _with_sign(graph, *key)
    product.update_arg(side, read(graph, tables[key], product))
    replace(node, node.args[0])  # type: ignore[arg-type]
    graph.module.graph.erase_node(node)
    context.applied(node.name, f"the sign into {key[0]}")


def _with_sign(graph: Graph, name: str, axis: int, start: int, length: int) -> str:
    """Return the name of a new table of which a part has the other sign."""
    tensor = graph.tensor(name)
    value = tensor.detach().clone()
    value.narrow(axis, start, length).neg_()
    made = nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    sources = {dim: graph.stands_for(name, dim) for dim in range(tensor.dim())}
    return add_tensor(graph, f"{name}_signed", made, sources=sources)


def _ahead(graph: Graph, node: fx.Node) -> list[fx.Node] | None:
    """Return the layers that alone read a value, at the end of calls through which a number goes; None for others."""
    layers: list[fx.Node] = []
    waiting, seen = [node], {node}
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if user in seen:
                continue
            seen.add(user)
            weight: Any = user.args[1] if is_call(user, "Conv", "Gemm", "MatMul") else None
            if weight is not None:
                if user.args[0] is not value or weight is value or constant(graph, weight) is None:
                    return None
                if len(weight.users) > 1:
                    return None
                layers.append(user)
            elif is_call(user, "AveragePool", "GlobalAveragePool", "ReduceMean", *PASSING) and len(seen) < MOST:
                if user.args[0] is not value:
                    return None
                waiting.append(user)
            elif user.op == "call_function" and not is_call(user) and isinstance(spec_of(value), tuple):
                waiting.append(user)
            else:
                return None
    return layers or None


@dataclass
class _Way:
    """The way back from a product with a number to what holds the numbers that can take it."""

    graph: Graph
    end: fx.Node
    factor: float
    made: dict[tuple[str, float], str]
    passed: dict[fx.Node, None] = field(default_factory=dict)
    scaled: list[tuple[fx.Node, int, Tensor | None]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def follow(self, value: fx.Node) -> str | None:
        """Find all that must be scaled; say why that cannot be, if it cannot."""
        waiting = [value]
        while waiting:
            each = waiting.pop()
            if each in self.passed:
                continue
            if len(self.passed) == MOST:
                return f"more than {MOST} calls are on the way"
            self.passed[each] = None
            more = self._step(each)
            if isinstance(more, str):
                return more
            waiting += more
        outside = [node for node in self.passed if not only_reader(node, {self.end, *self.passed})]
        return self._packed(outside) if outside else None

    def _step(self, node: fx.Node) -> list[fx.Node] | str:
        """Return what must be scaled for a value to be, besides tensors of the model."""
        if node.op == "call_function" and not is_call(node):
            return [node.args[0]] if isinstance(spec_of(node.args[0]), tuple) else f"{node.name} is no tensor"  # type: ignore[list-item, arg-type]
        if is_call(node, *PASSING):
            return self._operands(node, 0)
        if is_call(node, "Concat"):
            return self._each(node, node.args[0])  # type: ignore[arg-type]
        if is_call(node, "Add", "Sub", "Sum"):
            return self._operands(node, 0, 1)
        if is_call(node, "MatMul", "Conv", "Gemm"):
            return self._layer(node)
        if is_call(node, "Mul"):
            side = 1 if constant(self.graph, node.args[1]) is not None else 0
            return self._operands(node, side)
        if is_call(node, "Div"):
            return self._operands(node, 0)
        return f"{node.name} ({node.target}) does not scale with what it reads"

    def _operands(self, node: fx.Node, *positions: int) -> list[fx.Node] | str:
        found: list[fx.Node] = []
        for position in positions:
            value = node.args[position]
            if not isinstance(value, fx.Node):
                return f"{node.name} has no operand {position}"
            if value.op == "call_function":
                found.append(value)
            elif constant(self.graph, value) is None:
                return f"{value.name} is an input"
            else:
                self.scaled.append((node, position, None))
        return found

    def _each(self, node: fx.Node, values: list[fx.Node]) -> list[fx.Node] | str:
        rest = [value for value in values if value.op != "call_function"]
        return f"{rest[0].name} is joined, unscaled" if rest else list(values)

    def _layer(self, node: fx.Node) -> list[fx.Node] | str:
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or constant(self.graph, weight) is None:
            return f"{node.name} is a product of two values"
        for position in range(1, len(node.args)):
            value = node.args[position]
            if value is None:
                continue
            if constant(self.graph, value) is None or len(value.users) > 1:  # type: ignore[union-attr]
                return f"{getattr(value, 'name', value)} is shared, or computed"
            self.scaled.append((node, position, None))
        return []

    # -- one projection of several parts --

    def _packed(self, outside: list[fx.Node]) -> str | None:
        """Scale only the columns of a layer that reach the product, where no others read those."""
        reason = f"others read {outside[0].name}, unscaled"
        layers = [n for n in self.passed if is_call(n, "MatMul") or (is_call(n, "Gemm") and not n.kwargs.get("transB"))]
        known = ("MatMul", "Gemm", "Add", *PASSING)
        if len(layers) != 1 or any(not is_call(n, *known) and is_call(n) for n in self.passed):
            return reason
        spec, layer = tensor_type(layers[0]), layers[0]
        if spec is None or len(spec.shape) < 2 or prod(spec.shape) > LARGEST or 0 in spec.shape:
            return reason
        columns = torch.arange(spec.shape[-1]).expand(spec.shape)
        values: dict[fx.Node, Any] = {layer: columns}
        mine: set[int] = set()
        others: set[int] = set()
        for node in sorted(self.passed):
            if node is not layer and not self._place(node, values):
                return reason
            for user in node.users:
                if user is self.end:
                    mine |= set(values[node].unique().tolist())
                elif user not in self.passed:
                    reached = self._reached(user, node, values)
                    others |= set(reached.unique().tolist()) if reached is not None else set(range(spec.shape[-1]))
        if mine & others or not mine:
            return reason
        factors = torch.ones(spec.shape[-1], dtype=torch.float64)
        factors[sorted(mine)] = self.factor
        self.scaled = [(node, position, factors) for node, position, _ in self.scaled]
        for node, position, _ in self.scaled:
            held = tensor_type(node.args[position])
            if held is None or held.shape[-1] != spec.shape[-1] or tensor_type(node).shape[-1] != spec.shape[-1]:  # type: ignore[union-attr]
                return reason
        return None

    def _place(self, node: fx.Node, values: dict[fx.Node, Any]) -> bool:
        """Compute which column of the layer each entry of a value is."""
        known = [each for each in node.all_input_nodes if each in values]
        if not known:
            return False
        if is_call(node, "Add"):
            same = tensor_type(node).shape == tuple(values[known[0]].shape)  # type: ignore[union-attr]
            values[node] = values[known[0]]
            return same and len(known) == 1
        values[node] = _computed(self.graph, node, {known[0]: values[known[0]]})
        return values[node] is not None

    def _reached(self, user: fx.Node, value: fx.Node, values: dict[fx.Node, Any]) -> Tensor | None:
        """Return the columns that a reader from outside reads; None where that may be all."""
        if not is_call(user, "Gather", "Slice") and is_call(user):
            return None
        found = _computed(self.graph, user, {value: values[value]})
        return found if isinstance(found, Tensor) else None

    # -- edits --

    def apply(self) -> None:
        """Put scaled tensors in place."""
        in_place: set[str] = set()
        for node, position, factors in self.scaled:
            old = node.args[position]
            name = str(old.target)  # type: ignore[union-attr]
            if name in in_place:  # a call may read a tensor twice
                continue
            self.names.append(name)
            value = self._value(name, factors)
            twin = factors is None and (name, self.factor) in self.made
            if not twin and len(readers(self.graph, name)) == 1 and len(self.graph.names(name)) == 1:
                replace_tensor(self.graph, name, value)
                in_place.add(name)
            else:
                node.update_arg(position, read(self.graph, self._new(name, value, shared=factors is None), node))

    def _value(self, name: str, factors: Tensor | None) -> Tensor:
        tensor = self.graph.tensor(name)
        return (tensor.detach().double() * (self.factor if factors is None else factors)).to(tensor.dtype)

    def _new(self, name: str, value: Tensor, *, shared: bool) -> str:
        """Return the name of a scaled table; of those that are scaled as a whole, each is made once."""
        key = (name, self.factor)
        if shared and key in self.made:
            return self.made[key]
        tensor = self.graph.tensor(name)
        changed = nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        sources = {dim: self.graph.stands_for(name, dim) for dim in range(tensor.dim())}
        made = add_tensor(self.graph, f"{name}_scaled", changed, sources=sources)
        if shared:
            self.made[key] = made
        return made


def _computed(graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Compute a call with the example's sizes; None where an operand is not known."""

    def value(each: fx.Node) -> Any:
        if each in values:
            return values[each]
        spec = spec_of(each)
        return spec if isinstance(spec, int) else constant(graph, each)

    if any(value(each) is None for each in node.all_input_nodes) or is_call(node, "Neg"):
        return values[next(iter(values))] if is_call(node, "Neg") else None
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]
