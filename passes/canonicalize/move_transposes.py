"""Move transposes to where they meet others and vanish."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from math import prod
from typing import Any, ClassVar, Final

from torch import fx, nn

from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.operators import op
from graphopt.editing import add_tensor, insert, read, remove_dead, replace
from graphopt.graph import Call, Graph, TensorSpec, spec_of
from graphopt.passes.canonicalize.orders import Moved, Order, composed, inverse, is_plain, moved, reordered
from graphopt.passes.extents import Extent, Extents
from graphopt.passes.onnx_calls import constant, is_call, only_reader, order_of, tensor_type
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import listing, plural

_GETITEM: Final = operator.getitem
MOST: Final = 64
"""How many calls are looked at for one transpose."""


@register
@dataclass(frozen=True)
class MoveTransposes(Pass):
    """Let calls behind a Transpose compute in the order before it, wherever fewer transposes are left then.

    For an f that acts on every entry alike, f(Transpose(x)) = Transpose(f(x)); so for sums of values of one order, and,
    with their axes renamed, for reductions, softmax, concatenations, slices, pads, splits, squeezes and lookups. The
    calls that follow a transpose are taken together as far as that lowers the number of transposes of values that are
    computed: a transpose at the end of the region is joined with the one it started from. Tensors of the model that
    take part are transposed here and now. And of a Transpose between two reshapes the first of which only joins
    dimensions, that one goes: the joined dimensions move together.

    Outputs are the same numbers, but for sums that reductions take in another order. A region stays as it is where as
    many transposes would be left.
    """

    name: ClassVar[str] = "move-transposes"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not is_onnx(graph):
            return PassResult(graph)
        allows = cache(context.allows)
        refused: dict[str, str] = {}
        while True:
            refused.clear()
            sweeps = [_sweep_joined(graph, context, allows), _sweep_regions(graph, context, allows, refused)]
            if not any(sweeps):
                break
            remove_dead(graph)
        for site, reason in refused.items():
            context.skipped(site, reason)
        remove_dead(graph)
        graph.module.recompile()
        return PassResult(graph)


def _transposes(graph: Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if is_call(node, "Transpose") and node.users]


def _sweep_joined(graph: Graph, context: Context, allows: Callable[[str], bool]) -> int:
    """Join transposes that follow each other, and take out what joins dimensions around one; return how many."""
    done = 0
    extents = Extents()
    for node in _transposes(graph):
        inner, outer = order_of(node.args[0]), order_of(node)
        if inner is not None and outer is not None and allows(node.name):
            x, order = node.args[0].args[0], composed(inner, outer)  # type: ignore[union-attr]
            replace(node, x if is_plain(order) else _transposed(graph, x, order, node))  # type: ignore[arg-type]
            context.applied(node.name, f"is joined with {node.args[0].name}")  # type: ignore[union-attr]
            done += 1
        elif (what := _ungroup(graph, node, extents, allows)) is not None:
            context.applied(node.name, what)
            done += 1
    return done


def _sweep_regions(graph: Graph, context: Context, allows: Callable[[str], bool], refused: dict[str, str]) -> int:
    """Let the calls behind each transpose compute in the order before it where that pays; return how often it did."""
    done = 0
    made: dict[tuple[str, Order], fx.Node] = {}
    for node in _transposes(graph):
        if not node.users:  # since an edit
            continue
        region = _Region(graph, node, made)
        region.grow()
        if not region.inside:
            continue
        whole, wish = region.transposes(), region.names()
        region.trim()
        before, after = region.transposes()
        if after >= before:
            listed = listing(wish)
            refused[node.name] = f"with {listed} in the order before it {whole[1]} of {whole[0]} would be left"
        elif allows(node.name):
            region.apply()
            done += 1
            context.applied(node.name, f"{plural(before, 'transpose')} -> {after}", operators=region.names())
    return done


@dataclass
class _Region:
    """The calls behind one Transpose that are to compute in the order before it.

    ``orders`` holds the order of the first Transpose and of every value inside.
    """

    graph: Graph
    first: fx.Node
    made: dict[tuple[str, Order], fx.Node]
    inside: dict[fx.Node, Moved] = field(default_factory=dict)
    orders: dict[fx.Node, Order] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return the names of the calls, in order."""
        return [node.name for node in sorted(self.inside)]

    def grow(self) -> None:
        """Take in every call that can follow."""
        order = order_of(self.first)
        assert order is not None
        self.orders[self.first] = order
        ticket = count()
        waiting = [(user._sort_key, next(ticket), user) for user in self.first.users]
        heapq.heapify(waiting)
        seen: set[fx.Node] = set()
        while waiting and len(self.inside) < MOST:
            _, _, node = heapq.heappop(waiting)
            if node in seen or is_call(node, "Transpose"):
                continue
            seen.add(node)
            found = self._moved(node)
            if found is None:
                continue
            self.inside[node] = found
            self.orders[node] = found.order
            for user in node.users:
                heapq.heappush(waiting, (user._sort_key, next(ticket), user))

    def _moved(self, node: fx.Node) -> Moved | None:
        known = [each for each in node.all_input_nodes if each in self.orders]
        if len({self.orders[each] for each in known}) != 1:
            return None
        found = moved(node, known[0], self.orders[known[0]], self.orders[self.first])
        if found is None or any(each in known and each not in found.operands for each in node.all_input_nodes):
            return None
        for each in found.operands:
            if each not in self.orders and each.op == "get_attr" and constant(self.graph, each) is None:
                return None
        parts = isinstance(spec_of(node), tuple)
        if parts and any(user.target is not _GETITEM for user in node.users):
            return None
        return found

    def trim(self) -> None:
        """Leave out, from the ends, what does not lower the number of transposes."""
        changed = True
        while changed:
            changed = False
            for node in sorted(self.inside, reverse=True):
                if node not in self.inside or any(user in self.inside for user in node.users):
                    continue
                gone = [node]
                if node.target is _GETITEM:  # all parts of a Split, or none
                    split = node.args[0]
                    gone = [*split.users, split]  # type: ignore[union-attr, list-item]
                    if any(user in self.inside for part in gone[:-1] for user in part.users):
                        continue
                saved = {each: self.inside[each] for each in gone if each in self.inside}
                before = self._gain()
                for each in saved:
                    del self.inside[each], self.orders[each]
                if self._gain() < before:
                    for each in reversed(list(saved)):
                        self.inside[each], self.orders[each] = saved[each], saved[each].order
                else:
                    changed = True

    # -- how many transposes --

    def transposes(self) -> tuple[int, int]:
        """Return how many transposes of computed values take part, and how many would be left."""
        before = {node for node in self.orders if is_call(node, "Transpose")}
        before |= {user for value in self.inside for user in value.users if is_call(user, "Transpose")}
        after = 0
        pulled: set[tuple[fx.Node, Order]] = set()
        for node, found in self.inside.items():
            for each in found.operands:
                if each in self.orders or each.op == "get_attr":
                    continue
                value, order = self._pulled(each, self._order_in(node))
                pulled.add((value, order))
                if is_call(each, "Transpose") and only_reader(each, self.inside):
                    before.add(each)
        after += sum(not is_plain(order) for _, order in pulled)
        after += not only_reader(self.first, self.inside)
        for value in self.inside:
            outside = [user for user in value.users if user not in self.inside]
            joined = {composed(self.orders[value], order_of(u)) for u in outside if is_call(u, "Transpose")}  # type: ignore[arg-type]
            if any(not is_call(user, "Transpose") for user in outside):
                joined.add(self.orders[value])
            after += sum(not is_plain(order) for order in joined)
        return len(before), after

    def _gain(self) -> int:
        before, after = self.transposes()
        return before - after

    def _order_in(self, node: fx.Node) -> Order:
        """Return the order of a call's operands."""
        return next(self.orders[each] for each in node.all_input_nodes if each in self.orders)

    def _pulled(self, value: fx.Node, order: Order) -> tuple[fx.Node, Order]:
        """Return which Transpose of what gives an operand from outside in the order of the region."""
        back = inverse(order)
        own = order_of(value)
        if own is None:
            return value, back
        return value.args[0], composed(own, back)  # type: ignore[return-value]

    # -- edits --

    def apply(self) -> None:
        """Compute in the other order, and transpose where someone outside reads."""
        new: dict[fx.Node, fx.Node] = {self.first: self.first.args[0]}  # type: ignore[dict-item]
        for node in sorted(self.inside):
            new[node] = self._call(node, new)
        for node in sorted(self.inside):
            self._hand_out(node, new[node])

    def _call(self, node: fx.Node, new: dict[fx.Node, fx.Node]) -> fx.Node:
        found, order = self.inside[node], self._order_in(node)
        for each in found.operands:
            if each not in new:
                new[each] = self._operand(each, order, node)
        given = {each: new[each] for each in found.operands}
        args = fx.map_arg(node.args, lambda each: given.get(each, each))
        kwargs = fx.map_arg(dict(node.kwargs), lambda each: given.get(each, each))
        made = insert(self.graph, node, node.target, args, kwargs, like=node, spec=_specs(node, found.order))
        call = Call(made)
        for name, value in found.changes.items():
            call[name] = value
        return made

    def _operand(self, value: fx.Node, order: Order, before: fx.Node) -> fx.Node:
        if value.op == "get_attr":
            return self._tensor(value, order, before)
        source, back = self._pulled(value, order)
        return source if is_plain(back) else _transposed(self.graph, source, back, before)

    def _tensor(self, value: fx.Node, order: Order, before: fx.Node) -> fx.Node:
        """Return a tensor of the model in the other order."""
        name = str(value.target)
        key = (name, order)
        if key not in self.made or not self.made[key] < before:
            tensor = self.graph.tensor(name)
            ahead = len(order) - tensor.dim()
            back = inverse(order)
            changed = tensor.detach().reshape((1,) * ahead + tuple(tensor.shape)).permute(back).contiguous()
            if isinstance(tensor, nn.Parameter):
                changed = nn.Parameter(changed, requires_grad=tensor.requires_grad)
            sources = {i: self.graph.stands_for(name, dim - ahead) for i, dim in enumerate(back) if dim >= ahead}
            self.made[key] = read(self.graph, add_tensor(self.graph, f"{name}_moved", changed, sources=sources), before)
        return self.made[key]

    def _hand_out(self, node: fx.Node, new: fx.Node) -> None:
        if isinstance(spec_of(node), tuple):
            return
        order = self.orders[node]
        whole: fx.Node | None = None
        for user in list(node.users):
            if user in self.inside:
                continue
            outer = order_of(user)
            if outer is not None:
                joined = composed(order, outer)
                replace(user, new if is_plain(joined) else _transposed(self.graph, new, joined, user))
                continue
            if whole is None:
                whole = new if is_plain(order) else _transposed(self.graph, new, order, node)
            user.replace_input_with(node, whole)


def _specs(node: fx.Node, order: Order) -> Any:
    spec = spec_of(node)
    if isinstance(spec, tuple):
        return tuple(reordered(each, order) if isinstance(each, TensorSpec) else each for each in spec)
    return reordered(spec, order) if isinstance(spec, TensorSpec) else spec


def _transposed(graph: Graph, value: fx.Node, order: Order, before: fx.Node) -> fx.Node:
    spec = tensor_type(value)
    assert spec is not None
    return insert(
        graph,
        before,
        op("Transpose"),
        (value,),
        {"perm": list(order)},
        like=value,
        spec=reordered(spec, inverse(order)),
    )


# -- transposes between reshapes --


def _ungroup(graph: Graph, node: fx.Node, extents: Extents, allows: Callable[[str], bool]) -> str | None:
    """``Reshape(Transpose(Reshape(x)))`` with joined dimensions needs no joining: they move one after the other."""
    joined, order = node.args[0], order_of(node)
    if order is None or not is_call(joined, "Reshape", "Flatten") or not only_reader(joined, node):  # type: ignore[arg-type]
        return None
    users = list(node.users)
    x = joined.args[0]  # type: ignore[union-attr]
    if len(users) != 1 or not is_call(users[0], "Reshape", "Flatten"):
        return None
    groups = _groups(extents.shape(x), extents.shape(joined))  # type: ignore[arg-type]
    last, spec = users[0], tensor_type(users[0])
    if groups is None or spec is None or sum(spec.dynamic) > 1 or 0 in spec.shape or not allows(node.name):
        return None
    perm = tuple(dim for group in order for dim in groups[group])
    x, perm = _squeezed(graph, x, perm, node)  # type: ignore[arg-type]
    whole = x if is_plain(perm) else _transposed(graph, x, perm, node)
    if tensor_type(whole) != spec:
        sizes = [-1 if varies else size for size, varies in zip(spec.shape, spec.dynamic, strict=True)]
        whole = insert(graph, last, op("Reshape"), (whole, sizes), like=last)
    replace(last, whole)
    return f"moves the dimensions that {joined.name} joins"  # type: ignore[union-attr]


def _squeezed(graph: Graph, x: fx.Node, perm: Order, before: fx.Node) -> tuple[fx.Node, Order]:
    """Leave dimensions of size 1 out of what is to be moved."""
    spec = tensor_type(x)
    assert spec is not None
    kept = [i for i, size in enumerate(spec.shape) if size != 1 or spec.dynamic[i]]
    if len(kept) == len(perm):
        return x, perm
    small = TensorSpec(tuple(spec.shape[i] for i in kept), spec.dtype, tuple(spec.dynamic[i] for i in kept))
    axes = [i for i in range(len(perm)) if i not in kept]
    return insert(graph, before, op("Squeeze"), (x, axes), like=x, spec=small), tuple(
        kept.index(dim) for dim in perm if dim in kept
    )


def _groups(before: tuple[Extent, ...], after: tuple[Extent, ...]) -> list[list[int]] | None:
    """Return which dimensions each dimension of a Reshape's result joins; None where it does something else."""
    groups: list[list[int]] = []
    ends: list[list[int]] = []
    dims, left = list(range(len(before))), list(after)
    while left and isinstance(left[0], int) and (group := _taken(before, dims, left[0])) is not None:
        groups.append(group)
        dims, left = dims[len(group) :], left[1:]
    while left and isinstance(left[-1], int) and (group := _taken(before, dims[::-1], left[-1])) is not None:
        ends.append(group[::-1])
        dims, left = dims[: len(dims) - len(group)], left[:-1]
    if len(left) > 1 or (not left and dims):
        return None
    return [*groups, *([dims] if left else []), *ends[::-1]]


def _taken(before: tuple[Extent, ...], dims: list[int], size: int) -> list[int] | None:
    """Return the first of ``dims`` whose sizes multiply to ``size``."""
    sizes: list[int] = []
    for i, dim in enumerate(dims):
        extent = before[dim]
        if not isinstance(extent, int):
            return None
        sizes.append(extent)
        if prod(sizes) == size and size > 1:
            return dims[: i + 1]
        if prod(sizes) > size:
            return None
    return None
