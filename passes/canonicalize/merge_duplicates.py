"""Compute once what is computed several times."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import fx, nn

from graphopt.aliases import roots, written
from graphopt.axes.infer import atoms_of
from graphopt.dialects import infer
from graphopt.dialects.onnx.facts import is_onnx
from graphopt.editing import has_effect, is_random, remove_dead, replace
from graphopt.graph import MODE, Graph, get_attribute, set_tensor, spec_of
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register

LEAST_BYTES: Final = 1 << 12
"""Bytes beyond which a weight of an ONNX file is looked at."""


@register
@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Compute once what is computed several times: calls of one operator with the same arguments, and equal tables.

    Two calls are equal where operator, arguments and arguments in training are, with those that are equal themselves
    counted as one (value numbering). Two buffers are equal where type, shape and every entry are; both names stay, and
    hold one tensor. Outputs are the same numbers. Takes time in proportion to the number of calls and of entries.

    Left as they are: random numbers; calls that write, and whatever shares memory with what is written; parameters, for
    those that are equal now may learn to differ; buffers that a call or training may change; and tables and calls
    without arguments that belong to different coupling groups, which could then only be pruned together.

    Weights of an ONNX file are merged where they are matrices of more than 4 KiB, for a file holds them once then.
    Vectors are not: they would save nothing, and one that several layers share can take up nothing from them.

    Args:
        trainable: leave the parameters of ONNX files alone as well.

    Source: Cocke 1970, "Global common subexpression elimination".
    """

    name: ClassVar[str] = "merge-duplicates"
    preserves: ClassVar[Preserves] = Preserves.EXACT
    needs_values: ClassVar[bool] = False

    trainable: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        merging = _Merging(graph, context, weights=is_onnx(graph) and not self.trainable)
        merging.tables()
        merging.calls()
        remove_dead(graph)
        graph.module.recompile()
        return PassResult(graph)


class _Merging:
    def __init__(self, graph: Graph, context: Context, *, weights: bool) -> None:
        self.graph = graph
        self.weights = weights
        self.context = context
        self.root_of = roots(graph.nodes)
        spoiled = {self.root_of[target] for node in graph.nodes for target in written(node)}
        self.written = {node for node in graph.nodes if self.root_of[node] in spoiled}
        self.returned = set(graph.module.graph.output_node().all_input_nodes)
        self.typing = infer(graph)
        self.groups = {group.atom: group.name for group in self.typing.groups}

    # -- tensors --

    def tables(self) -> None:
        """Let equal buffers be one tensor, and let one node read it."""
        nodes: dict[str, fx.Node] = {}
        found: dict[Hashable, list[str]] = {}
        for node in list(self.graph.module.graph.find_nodes(op="get_attr")):
            name = str(node.target)
            first = nodes.setdefault(name, node)
            if first is not node and node not in self.written:
                replace(node, first)
            elif self._is_table(node):
                found.setdefault(_contents(self.graph.tensor(name)), []).append(name)
        for alike in found.values():
            kept: list[str] = []
            for name in alike:
                twin = next((each for each in kept if self._equal(name, each)), None)
                if twin is None:
                    kept.append(name)
                elif self._may_tie(name, nodes[name], nodes[twin]) and self.context.allows(name):
                    self._merge_table(nodes[name], nodes[twin])

    def _is_table(self, node: fx.Node) -> bool:
        tensor = get_attribute(self.graph.module, str(node.target))
        if not isinstance(tensor, torch.Tensor) or node in self.written:
            return False
        if isinstance(tensor, nn.Parameter) and not (self.weights and _is_matrix(tensor)):
            return False
        if tensor.is_meta:  # nothing to compare
            return False
        return not any(MODE in user.meta for user in node.users)  # running statistics: training changes them

    def _equal(self, a: str, b: str) -> bool:
        x, y = self.graph.tensor(a), self.graph.tensor(b)
        return x.dtype is y.dtype and x.device == y.device and x.shape == y.shape and torch.equal(x, y)

    def _merge_table(self, node: fx.Node, twin: fx.Node) -> None:
        name, kept = str(node.target), str(twin.target)
        replace(node, twin)
        self.graph.module.graph.erase_node(node)
        names = self.graph.names(name)
        tensor = self.graph.tensor(kept)
        for each in names:
            set_tensor(self.graph.module, each, tensor)
            self.graph.aliases[each] = kept
        self.graph.sources.pop(name, None)
        self.context.applied(name, f"is {kept}", entries=math.prod(tensor.shape))

    # -- calls --

    def calls(self) -> None:
        """Let equal calls be one, in order, so that calls with equal arguments are found equal, too."""
        known: dict[Hashable, fx.Node] = {}
        writes: Counter[fx.Node] = Counter()
        for node in list(self.graph.nodes):
            writes.update(self.root_of[target] for target in written(node))
            if node.op != "call_function" or not self._is_pure(node):
                continue
            try:
                versions = tuple(writes[self.root_of[each]] for each in node.all_input_nodes)
                twin = known.setdefault((_number(node), versions), node)
            except TypeError:  # an argument without a hash
                continue
            if twin is node or spec_of(twin) != spec_of(node):
                continue
            if node in self.returned and twin in self.returned:
                self.context.skipped(node.name, f"it is returned, and so is {twin.name}: they must not share memory")
            elif self._may_tie(node.name, node, twin) and self.context.allows(node.name):
                replace(node, twin)
                if node in self.returned:
                    self.returned.add(twin)
                self.context.applied(node.name, f"is {twin.name}", operator=str(node.target))

    def _is_pure(self, node: fx.Node) -> bool:
        return not (node in self.written or is_random(node) or has_effect(node) or written(node))

    # -- what merging ties --

    def _may_tie(self, site: str, node: fx.Node, twin: fx.Node) -> bool:
        """Say whether one node for the readers of both leaves every coupling group as it is."""
        mine, other = (atoms_of(self.typing.values[each]) for each in (node, twin))
        changed = sorted(self.groups[atom] for atom in mine ^ other if atom in self.groups)
        if changed:
            listed = " and ".join(changed[:2])
            self.context.skipped(site, f"as {twin.name} it would tie what is free of each other: {listed}")
        return not changed


def _is_matrix(tensor: torch.Tensor) -> bool:
    return tensor.dim() > 1 and tensor.numel() * tensor.element_size() > LEAST_BYTES


def _contents(tensor: torch.Tensor) -> Hashable:
    """Return what equal tensors have in common, at the price of one pass over the entries."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    total = float(flat.double().nan_to_num().sum()) if flat.numel() else 0.0
    return tensor.dtype, tuple(tensor.shape), str(tensor.device), total


def _number(node: fx.Node) -> Hashable:
    """Return what equal calls have in common; arguments that are nodes stand for themselves."""
    return node.target, _frozen(node.args), _frozen(node.kwargs), _frozen(node.meta.get(MODE, {}))


def _frozen(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return frozenset((key, _frozen(each)) for key, each in value.items())
    if isinstance(value, torch.Tensor):  # an attribute
        return ("tensor", value.dtype, tuple(value.shape), str(value.tolist()))
    if isinstance(value, slice):
        return ("slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    # 1, 1.0 and True are equal, and different arguments.
    return value if isinstance(value, fx.Node) else (type(value), value, math.copysign(1, value) if value == 0.0 else 1)
