"""Compute once what depends on no input."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Final

import torch
from torch import fx, nn

from graphopt.aliases import family, roots, source, written
from graphopt.editing import add_tensor, find_tensor, is_random, read, remove_dead
from graphopt.graph import MODE, Graph, Spec, TensorSpec, spec_of
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import plural

__all__ = ["FoldConstants", "Folding"]

GROWTH_LIMIT: Final = 1 << 22
"""Bytes by which a folded constant may exceed the tensors it is computed from."""

SMALL: Final = 1 << 16
"""Bytes up to which a tensor may be stored twice."""


@register
@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute once what depends on no input, and hold the result as a buffer.

    Position tables, masks, index arithmetic, and, where training does not matter, whatever follows from parameters:
    gathered relative-position biases, standardised or reparametrised weights. The value is the one the graph itself
    computes, in its own types.

    Left as they are: random numbers; what a write in place, or training, may change (caches, batch counters, running
    statistics); a value of more than 4 MiB beyond what it is computed from (an expansion); a mere rearrangement of a
    large tensor that is read elsewhere, too; results that would have to be read as numbers.

    A tensor made of parameters stands for no tensor of the input model any more: fold those after pruning.

    Args:
        trainable: count parameters as inputs, and fold only what follows from buffers and sizes.
    """

    name: ClassVar[str] = "fold-constants"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    trainable: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        folding = Folding(graph, trainable=self.trainable, allows=context.allows)
        folding.run()
        for name, what, facts in folding.folded:
            context.applied(name, what, **facts)
        for name, reason in folding.refused.items():
            context.skipped(name, reason)
        return PassResult(graph)


@dataclass
class Folding:
    """Fold the constants of one graph, in place.

    Attributes:
        graph: the graph.
        trainable: count parameters, and whatever training changes, as inputs.
        frozen_state: count the model's own tensors that the graph writes into as what they are now; for a format in
            which a model has no state.
        allows: whether a value, by its node's name, may be folded.
        folded: the node's name, what was done and the numbers, of each value folded.
        refused: the reason, by the node's name, for each value left.
    """

    graph: Graph
    trainable: bool = False
    frozen_state: bool = False
    allows: Callable[[str], bool] = lambda name: True
    folded: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Fold all there is."""
        constant = self._constant_nodes()
        wanted = self._wanted(constant)
        values = _evaluate(self.graph, constant, wanted)
        for node in wanted:
            if node in values:
                self._replace(node, values[node], constant)
        if self.folded:
            remove_dead(self.graph)
            self.graph.module.recompile()

    # -- what is constant --

    def _constant_nodes(self) -> set[fx.Node]:
        """Return the nodes that follow from constant tensors alone, and are written into by nothing else."""
        graph = self.graph
        changing = self._changing()
        spoiled: set[fx.Node] = set()
        while True:
            constant: set[fx.Node] = set()
            for node in graph.nodes:
                if node in spoiled:
                    continue
                if node.op == "get_attr":
                    if node not in changing and find_tensor(graph, str(node.target)) is not None:
                        constant.add(node)
                elif node.op == "call_function" and self._is_pure(node) and constant.issuperset(node.all_input_nodes):
                    constant.add(node)
            more = set(_spoiled(graph, constant)) - spoiled
            if not more:
                return constant
            spoiled |= more

    def _is_pure(self, node: fx.Node) -> bool:
        if node.target is operator.getitem:
            return True
        if not isinstance(node.target, torch._ops.OpOverload) or is_random(node) or _holds_dynamic(spec_of(node)):
            return False
        return not (self.trainable and MODE in node.meta)

    def _changing(self) -> set[fx.Node]:
        """Return the nodes that read tensors of the model which differ from call to call, or in training."""
        attributes = self.graph.module.graph.find_nodes(op="get_attr")
        found: set[fx.Node] = set()
        if self.trainable:
            for node in attributes:
                is_parameter = isinstance(find_tensor(self.graph, str(node.target)), nn.Parameter)
                if is_parameter or any(MODE in user.meta for user in node.users):
                    found.add(node)
        if not self.frozen_state:
            root_of = roots(self.graph.nodes)
            names = {root_of[target].target for node in self.graph.nodes for target in written(node)}
            found |= {node for node in attributes if node.target in names}
        return found

    # -- what is worth folding --

    def _wanted(self, constant: set[fx.Node]) -> list[fx.Node]:
        """Return the last constant values on the way to something that is none; takes those not worth it out."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        waiting = [node for node in constant if any(user not in constant for user in node.users)]
        wanted: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node.op != "call_function" or node not in constant or node in wanted:
                continue
            reason = self._why_not(node, constant)
            if reason is None:
                wanted.add(node)
                continue
            if reason:
                self.refused[node.name] = reason
            constant.discard(node)
            waiting += [each for each in node.all_input_nodes if each in constant]
        return sorted((node for node in wanted if self.allows(node.name)), key=order.__getitem__)

    def _why_not(self, node: fx.Node, constant: set[fx.Node]) -> str | None:
        """Say why a constant value is not folded; nothing to say of what is no tensor, or made of one tensor anyway."""
        spec = spec_of(node)
        if not isinstance(spec, TensorSpec):
            return ""
        leaves, moved = _origin(node)
        sizes = {leaf.target: _bytes(spec_of(leaf)) for leaf in leaves}
        size, given = _bytes(spec), sum(sizes.values())
        if size > given + GROWTH_LIMIT:
            return f"{size} bytes would be stored in place of the {given} that they are computed from"
        elsewhere = [user for leaf in leaves for user in leaf.users if user not in constant]
        if moved and elsewhere and size > SMALL:
            (leaf,) = leaves
            return f"{size} bytes of {leaf.target}, which {elsewhere[0].name} reads, too, would be stored twice"
        return None

    # -- the edit --

    def _replace(self, node: fx.Node, value: torch.Tensor, constant: set[fx.Node]) -> None:
        leaves, moved = _origin(node)
        names = sorted(str(leaf.target) for leaf in leaves)
        stem = f"{names[0]}_{node.name}" if moved and names else f"folded_{node.name}"
        persistent = any(name in self._state for name in names)
        own = value.clone(memory_format=torch.contiguous_format)
        name = add_tensor(self.graph, stem, own, persistent=persistent, sources={})
        new = read(self.graph, name, node)
        calls = sum(each.op == "call_function" for each in _behind(node))
        what = f"{plural(math.prod(own.shape), 'entry', 'entries')} in place of {plural(calls, 'call')}"
        self.folded.append((node.name, what, {"tensor": name, "bytes": _bytes(spec_of(new)), "from": names}))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in constant, propagate_meta=False)

    @cached_property
    def _state(self) -> set[str]:
        """Names of the tensors that the state of the model holds."""
        return set(self.graph.module.state_dict(keep_vars=True))


def _holds_dynamic(spec: Spec) -> bool:
    if isinstance(spec, TensorSpec):
        return any(spec.dynamic)
    return any(_holds_dynamic(each) for each in spec) if isinstance(spec, tuple) else False


def _bytes(spec: Spec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize if isinstance(spec, TensorSpec) else 0


def _spoiled(graph: Graph, constant: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield the nodes that cannot be computed ahead of time because of a write to memory they share.

    A write by constants into memory made by constants can, unless something that is not constant reads in between.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        for target in written(node):
            members = list(family(target))
            ahead = node in constant and members[0].op == "call_function"
            read_before = any(
                user not in constant and order[user] < order[node] for member in members for user in member.users
            )
            if not ahead or read_before:
                yield from (member for member in members if member.op == "call_function")


def _behind(node: fx.Node) -> set[fx.Node]:
    """Return what a value is computed from, itself included."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            waiting += each.all_input_nodes
    return seen


def _origin(node: fx.Node) -> tuple[set[fx.Node], bool]:
    """Return the tensors that a value is computed from, and whether it is one of them, rearranged."""
    behind = _behind(node)
    leaves = {each for each in behind if each.op == "get_attr"}
    return leaves, len(leaves) == 1 and all(each in leaves or source(each) is not None for each in behind)


def _evaluate(graph: Graph, constant: set[fx.Node], wanted: list[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """Compute the wanted values, in the graph's own types; other values are freed after their last use."""
    needed = {each for node in wanted for each in _behind(node)}
    for node in reversed(graph.nodes):  # writes into what is needed are needed, with what they write
        if node in constant and any(member in needed for target in written(node) for member in family(target)):
            needed |= _behind(node)
    uses = Counter(each for node in needed for each in node.all_input_nodes)
    kept = set(wanted)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node not in needed:
                continue
            if node.op == "get_attr":
                values[node] = graph.tensor(str(node.target)).detach()
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            for each in node.all_input_nodes:
                uses[each] -= 1
                if not uses[each] and each not in kept:
                    del values[each]
    return {node: values[node] for node in wanted}
