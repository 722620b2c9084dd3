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
from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.operators import Op
from graphopt.editing import add_tensor, find_tensor, is_random, read, remove_dead
from graphopt.graph import MODE, Graph, Source, Sources, Spec, TensorSpec, spec_of
from graphopt.passes.onnx_calls import is_call
from graphopt.passes.shapes import is_reshape, permutation
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import plural

__all__ = ["FoldConstants", "Folding"]

GROWTH_LIMIT: Final = 1 << 22
"""Bytes by which a folded constant may exceed the tensors it is computed from."""

SMALL: Final = 1 << 16
"""Bytes up to which a tensor may be stored twice."""

QUANTIZING: Final = frozenset(
    {
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QuantizeLinear",
        "com.microsoft.DequantizeLinear",
        "com.microsoft.QuantizeLinear",
    }
)
"""Operators of ONNX that say how weights are held, and by which runtimes know quantized layers."""

REPEATING: Final = ("ConstantOfShape", "Expand", "EyeLike", "OneHot", "Range", "Tile")
"""Operators of ONNX whose results hold more numbers than they are made of."""

POINTWISE: Final = ("Add", "Cast", "Div", "Identity", "Mul", "Neg", "Sub")
"""Operators of ONNX that leave every entry at its place, or spread an operand along dimensions of size one."""


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

    A tensor made of parameters stands for what they stand for as far as its dimensions are theirs, whole: permuted,
    reshaped, cast, scaled. What is made in other ways stands for no tensor of the input model any more: fold that after
    pruning.

    In an ONNX file, where the result of an operation on weights is a weight itself, it stays a parameter. What is
    written quantized stays so, and what repeats numbers, or holds them in a wider type, stays computed where the file
    would grow by more than 64 KiB.

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
        is_known = isinstance(node.target, torch._ops.OpOverload) or (
            isinstance(node.target, Op) and node.target.key not in QUANTIZING
        )
        if not is_known or is_random(node) or _holds_dynamic(spec_of(node)):
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
        sizes = {leaf.target: _bytes(spec_of(leaf)) for leaf in leaves if not self._stays(leaf, constant)}
        size, given = _bytes(spec), sum(sizes.values())
        elsewhere = [user for leaf in leaves for user in leaf.users if user not in constant]
        if moved and elsewhere and (size > SMALL or any(map(self._is_weight, leaves))):
            (leaf,) = leaves
            return f"{size} bytes of {leaf.target}, which {elsewhere[0].name} reads, too, would be stored twice"
        if size > given + self._limit(node, moved):
            return f"{size} bytes would be stored in place of the {given} that they are computed from"
        return None

    def _stays(self, leaf: fx.Node, constant: set[fx.Node]) -> bool:
        """Say whether a tensor is written into a file whatever becomes of it here: something else reads it."""
        return is_onnx(self.graph) and any(user not in constant for user in leaf.users)

    def _is_weight(self, leaf: fx.Node) -> bool:
        """Say whether a tensor of a file is a weight that its readers share, and learn together."""
        tensor = find_tensor(self.graph, str(leaf.target))
        return is_onnx(self.graph) and isinstance(tensor, nn.Parameter) and tensor.dim() > 1

    def _limit(self, node: fx.Node, moved: bool) -> int:
        """Return the bytes by which a value may exceed what it is computed from."""
        repeats = any(is_call(each, *REPEATING) for each in _behind(node))
        return SMALL if is_onnx(self.graph) and (moved or repeats) else GROWTH_LIMIT

    # -- the edit --

    def _replace(self, node: fx.Node, value: torch.Tensor, constant: set[fx.Node]) -> None:
        leaves, moved = _origin(node)
        names = sorted(str(leaf.target) for leaf in leaves)
        stem = f"{names[0]}_{node.name}" if moved and names else f"folded_{node.name}"
        persistent = any(name in self._state for name in names)
        own = value.clone(memory_format=torch.contiguous_format)
        if is_onnx(self.graph) and own.is_floating_point() and own.numel() > 1:
            parts = [self.graph.tensor(name) for name in names]
            if any(isinstance(part, nn.Parameter) for part in parts):
                own = nn.Parameter(own, requires_grad=any(part.requires_grad for part in parts))
        name = add_tensor(self.graph, stem, own, persistent=persistent, sources=traced(self.graph, node))
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
    return leaves, len(leaves) == 1 and all(
        each in leaves or source(each) is not None or is_call(each, "Transpose", "Cast") for each in behind
    )


def traced(graph: Graph, node: fx.Node) -> Sources:
    """Return what the dimensions of a computed tensor stand for, where they are whole dimensions of stored ones."""
    spec = spec_of(node)
    if not isinstance(spec, TensorSpec):
        return {}
    if node.op == "get_attr":
        return {dim: graph.stands_for(str(node.target), dim) for dim in range(len(spec.shape))}
    order = permutation(node)
    if order is not None:
        known = traced(graph, node.args[0])  # type: ignore[arg-type]
        return {dim: known[old] for dim, old in enumerate(order) if old in known}
    if is_reshape(node):
        return _reshaped(graph, node.args[0], spec)
    if not is_call(node, *POINTWISE):
        return {}
    found: dict[int, tuple[Source, ...]] = {}
    for each in node.args:
        own = spec_of(each) if isinstance(each, fx.Node) else None
        if isinstance(own, TensorSpec):
            for dim, sources in traced(graph, each).items():  # type: ignore[arg-type]
                place = dim + len(spec.shape) - len(own.shape)
                if own.shape[dim] == spec.shape[place]:
                    found[place] = (*found.get(place, ()), *sources)
    return found


def _reshaped(graph: Graph, x: Any, spec: TensorSpec) -> Sources:
    own = spec_of(x)
    if not isinstance(own, TensorSpec):
        return {}
    known, found = traced(graph, x), {}
    for dim, size in enumerate(spec.shape):
        inner = math.prod(spec.shape[dim + 1 :])
        for old, sources in known.items():
            if size > 1 and own.shape[old] == size and math.prod(own.shape[old + 1 :]) == inner:
                found[dim] = sources
    return found


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
            try:
                values[node] = node.target(*args, **kwargs)
            except (NotImplementedError, RuntimeError):
                if not isinstance(node.target, Op):
                    raise
                # A type that this machine does not compute in: its runtime may.
                kept -= {each for each in kept if node in _behind(each)}
                return _evaluate(graph, constant, [each for each in wanted if each in kept])
            for each in node.all_input_nodes:
                uses[each] -= 1
                if not uses[each] and each not in kept:
                    del values[each]
    return {node: values[node] for node in wanted if isinstance(values[node], torch.Tensor)}
