"""Compute once what depends on no input."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import fx

from graphopt.aliases import family, source, written
from graphopt.graph import OWNER, SPEC, Graph, TensorSpec, get_attribute, set_tensor

GROWTH_LIMIT: Final = 1 << 22
"""Bytes by which a folded constant may exceed the tensors it is computed from."""

SMALL: Final = 1 << 16
"""Bytes up to which a tensor may be stored twice."""


def fold_constants(graph: Graph) -> int:
    """Replace, in place, every value that follows from the graph's own tensors by that value; return how many.

    Position tables, masks, standardised weights and gathered biases become constants. Left as they are: random
    numbers; a value much larger than what it is made of (an expansion); and a mere rearrangement of a weight that is
    read elsewhere, too, so that no weight is stored twice.
    """
    constant = _constant_nodes(graph)
    computed = frozenset(constant)
    values = _evaluate(graph, constant)
    frontier = list(_frontier(graph, constant))
    folded = 0
    while frontier:
        node = frontier.pop()
        if node not in constant or node.op != "call_function":
            continue
        value = values[node]
        if not isinstance(value, torch.Tensor) or not _worth(graph, node, value, constant):
            constant.discard(node)
            frontier.extend(n for n in node.all_input_nodes if n in constant)
            continue
        _replace(graph, node, value, constant)
        folded += 1
    _drop(graph, computed)
    graph.module.graph.eliminate_dead_code()
    graph.module.recompile()
    return folded


def _drop(graph: Graph, computed: frozenset[fx.Node]) -> None:
    """Take out those of the computed nodes, writes among them, that nothing else needs any more."""
    needed: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node not in computed]
    while waiting:
        node = waiting.pop()
        if node in needed:
            continue
        needed.add(node)
        waiting += node.all_input_nodes
        if node in computed:
            waiting += [user for member in family(node) for user in member.users if member in written(user)]
    for node in reversed(list(graph.nodes)):
        if node not in needed:
            graph.module.graph.erase_node(node)


def _constant_nodes(graph: Graph) -> set[fx.Node]:
    """Return the nodes that follow from the graph's tensors alone, and are not written into by anything else."""
    spoiled: set[fx.Node] = set()
    while True:
        constant: set[fx.Node] = set()
        for node in graph.nodes:
            if node in spoiled:
                continue
            if node.op == "get_attr":
                if isinstance(get_attribute(graph.module, str(node.target)), torch.Tensor):
                    constant.add(node)
            elif node.op == "call_function" and _is_pure(node) and all(n in constant for n in node.all_input_nodes):
                constant.add(node)
        more = set(_spoiled(graph, constant)) - spoiled
        if not more:
            return constant
        spoiled |= more


def _is_pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not _holds_dynamic(node.meta.get(SPEC))


def _holds_dynamic(spec: Any) -> bool:
    if isinstance(spec, TensorSpec):
        return any(spec.dynamic)
    return any(_holds_dynamic(each) for each in spec) if isinstance(spec, tuple) else False


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


def _evaluate(graph: Graph, constant: set[fx.Node]) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node not in constant:
                continue
            if node.op == "get_attr":
                values[node] = get_attribute(graph.module, str(node.target)).detach()
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values


def _frontier(graph: Graph, constant: set[fx.Node]) -> Iterator[fx.Node]:
    for node in graph.nodes:
        if node in constant and any(user not in constant for user in node.users):
            yield node


def _worth(graph: Graph, node: fx.Node, value: torch.Tensor, constant: set[fx.Node]) -> bool:
    leaves, moved = _origin(node)
    tensors = {id(t): t for t in (get_attribute(graph.module, str(leaf.target)) for leaf in leaves)}
    size = value.numel() * value.element_size()
    if size > sum(t.numel() * t.element_size() for t in tensors.values()) + GROWTH_LIMIT:
        return False
    elsewhere = any(user not in constant for leaf in leaves for user in leaf.users)
    return not (moved and elsewhere and size > SMALL)


def _origin(node: fx.Node) -> tuple[set[fx.Node], bool]:
    """Return the tensors that a value is computed from, and whether it is one of them, rearranged."""
    leaves: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting, moved = [node], True
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        seen.add(each)
        if each.op == "get_attr":
            leaves.add(each)
        else:
            moved = moved and source(each) is not None
            waiting += each.all_input_nodes
    return leaves, moved and len(leaves) == 1


def _replace(graph: Graph, node: fx.Node, value: torch.Tensor, constant: Iterable[fx.Node]) -> None:
    leaves, moved = _origin(node)
    stem = f"{next(iter(leaves)).target}_{node.name}" if moved else f"folded_{node.name}"
    name, count = stem, 0
    while _exists(graph, name):
        count += 1
        name = f"{stem}_{count}"
    set_tensor(graph.module, name, value.clone(memory_format=torch.contiguous_format))
    with graph.module.graph.inserting_before(node):
        new = graph.module.graph.create_node("get_attr", name)
    new.meta[SPEC] = TensorSpec.of(value)
    if OWNER in node.meta:
        new.meta[OWNER] = node.meta[OWNER]
    inside = set(constant)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside, propagate_meta=False)


def _exists(graph: Graph, name: str) -> bool:
    try:
        get_attribute(graph.module, name)
    except AttributeError:
        return False
    return True
