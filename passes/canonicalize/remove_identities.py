"""Take out calls that compute nothing."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.aliases import written
from graphopt.dialects.onnx.operators import Op
from graphopt.editing import insert, remove_dead, replace
from graphopt.graph import Call, Graph
from graphopt.passes.canonicalize.identities import LAYOUT, RULES, Facts, Instead, Kept, Rule, Same
from graphopt.passes.canonicalize.memory import Memory
from graphopt.passes.canonicalize.onnx_identities import rule_of
from graphopt.passes.onnx_calls import constant
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import plural

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Take out calls that compute nothing, join calls that undo or repeat each other, and drop dead code.

    Dropout in evaluation; copies and changes of layout that nobody can notice; casts to the type a value has, and casts
    on the way that lose nothing; x + 0, 1 x, x^1; padding by 0, slices of everything, concatenations of one tensor;
    expansions, reshapes and permutations to what a value is; resampling and pooling by 1; f(f(x)) of a projection f.
    Chains of reshapes keep the last shape, chains of permutations become one. Then go the calls that nothing needs any
    more, and the tensors that only those read; a tensor that the graph never read stays with the caller's state.

    Of operators of ONNX, also: bounds within bounds, expansions that broadcasting does by itself, and the replacement
    of what is not a number after a softmax of scores and masks that are finite (of scores that are not, the results
    differ: zeros before, not numbers after).

    Outputs are the same numbers, except where a matrix product sums in another order because its operand lies
    otherwise in memory. A call stays where a write in place, or a caller that writes into a result, could tell.

    Args:
        trainable: keep what acts in training only: dropout with p > 0, and calls that stop gradients.
    """

    name: ClassVar[str] = "remove-identities"
    preserves: ClassVar[Preserves] = Preserves.EXACT
    needs_values: ClassVar[bool] = False

    trainable: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        dead = remove_dead(graph)
        if dead.nodes:
            what = f"took out {plural(len(dead.nodes), 'node')} that nothing needs"
            context.applied("dead code", what, nodes=list(dead.nodes), tensors=list(dead.tensors))
        allows = cache(context.allows)
        while True:
            facts = Facts(
                self.trainable,
                _one_device(graph),
                partial(constant, graph, parameters=not self.trainable),
            )
            sweep = _Sweep(graph, facts, context, allows)
            if not sweep.run():
                break
            remove_dead(graph)
        for site, reason in sweep.refused.items():
            context.skipped(site, reason)
        graph.module.recompile()
        return PassResult(graph)


class _Sweep:
    """Go over the graph once, in order, so that a call sees its arguments already simplified."""

    def __init__(self, graph: Graph, facts: Facts, context: Context, allows: Callable[[str], bool]) -> None:
        self.graph = graph
        self.facts = facts
        self.context = context
        self.allows = allows
        self.memory = Memory(graph)
        self.rigid = self._rigid()
        self.refused: dict[str, str] = {}

    def run(self) -> int:
        """Return how many calls were simplified."""
        done = 0
        loosened = False
        for node in list(self.graph.nodes):
            rule = (RULES.get(node.target) or rule_of(node)) if node.op == "call_function" else None
            if rule is None:
                continue
            found = self._found(rule, node)
            if found is None:
                continue
            reason = found.reason if isinstance(found, Kept) else self._why_not(node, found)
            if reason is not None:
                self.refused[node.name] = reason
                continue
            assert not isinstance(found, Kept)
            if not self.allows(node.name):
                continue
            self._apply(node, found)
            loosened = loosened or (isinstance(found, Same) and found.layout)
            done += 1
        if loosened:
            self._loosen()
        return done

    def _found(self, rule: Rule, node: fx.Node) -> Same | Instead | Kept | None:
        found = rule(Call(node), self.facts)
        if node.target is operator.getitem and found is None and (other := rule_of(node)) is not None:
            found = other(Call(node), self.facts)
        return found

    def _apply(self, node: fx.Node, found: Same | Instead) -> None:
        if isinstance(found, Same):
            new = found.value
            self.memory.join(node, new)
        else:
            new = insert(self.graph, node, found.target, found.args, found.kwargs, like=node)
            self.memory.insert(new, node)
        replace(node, new)
        if written(node):  # and changes nothing by it
            self.graph.module.graph.erase_node(node)
        self.context.applied(node.name, found.what, operator=str(node.target))

    def _why_not(self, node: fx.Node, found: Same | Instead) -> str | None:
        through = found.through
        value = found.value if isinstance(found, Same) else found.args[0]
        if through is not None and isinstance(value, fx.Node):  # of ONNX's operators, which take lists, none writes
            for each in (through, value):
                writer = self.memory.writer_between(each, through, node)
                if writer is not None:
                    return f"{writer.name} writes into {each.name} before {node.name} reads it"
        if isinstance(found, Instead):
            writer = self.memory.writer_after(node, node)
            return f"{writer.name} writes through it" if writer is not None else None
        if found.layout and (reason := self._why_layout(node)) is not None:
            return reason
        return self.memory.why_not(node, value)

    def _why_layout(self, node: fx.Node) -> str | None:
        """Say why a call that arranges memory must stay."""
        if len(node.users) > 1:
            return f"each of its {len(node.users)} readers would arrange the memory for itself"
        if self.memory.is_returned(node):
            return "it is returned, and its caller may rely on the layout"
        return self.rigid

    def _rigid(self) -> str | None:
        """Say what in the graph reads how memory is laid out, if anything does."""
        for node in self.graph.nodes:
            if node.op != "call_function" or not hasattr(node.target, "_schema"):
                continue
            if isinstance(node.target, Op):
                continue
            if node.target in LAYOUT or node.target.namespace not in ("aten", "prims"):
                return f"{node.name} ({node.target}) reads how memory is laid out"
            if node.target is aten.view.default and (writer := self.memory.writer_after(node, node)) is not None:
                return f"{node.name} must stay a view, for {writer.name} writes through it"
        return None

    def _loosen(self) -> None:
        """Let views become copies where a value does not lie in memory any more as it did."""
        for node in self.graph.module.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default


def _one_device(graph: Graph) -> bool:
    """Say whether all tensors live on one device, so that a move to a device changes nothing."""
    found: Counter[torch.device] = Counter(tensor.device for tensor in graph.module.parameters())
    found.update(tensor.device for tensor in graph.module.buffers())
    found.update(leaf.device for leaf in pytree.tree_leaves(graph.example_inputs) if isinstance(leaf, torch.Tensor))
    for node in graph.nodes:
        values = (*node.args, *node.kwargs.values())
        found.update(torch.device(value) for value in values if isinstance(value, torch.device))
    return len(found) <= 1
