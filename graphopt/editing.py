"""Edit a graph: insert calls, let readers read something else, add tensors, take out what nobody needs.

What may live here: the few steps of which every rewriting pass is made. Which step is right where is for the passes to
say; which indices a tensor keeps is for ``rewrite``.

    weight = add_tensor(graph, "conv.weight.folded", value)
    new = insert(graph, node, aten.conv2d.default, (x, read(graph, weight, node), bias), like=node)
    replace(node, new)
    remove_dead(graph)

Every step leaves types and owners right, and names nodes and tensors the same whenever the steps are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn

from graphopt.aliases import roots, written
from graphopt.dialects.onnx.operators import Op
from graphopt.graph import OWNER, SPEC, Call, Graph, Source, Spec, TensorSpec, find_attribute, set_tensor, spec_of

__all__ = [
    "Removed",
    "add_tensor",
    "copied",
    "fresh_name",
    "has_effect",
    "insert",
    "is_random",
    "read",
    "readers",
    "remove_dead",
    "remove_tensor",
    "replace",
    "replace_tensor",
]

RANDOM: Final = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Operators of ONNX that draw random numbers, whatever their arguments."""

_SAME: Final[Any] = object()
"""Stands for "the type of the node it is like"."""


# -- nodes --


def insert(
    graph: Graph,
    before: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: fx.Node,
    spec: Spec = _SAME,
) -> fx.Node:
    """Insert the call of ``target`` in front of ``before`` and return it; no one reads it yet.

    Args:
        graph: the graph to edit.
        before: the node that runs next.
        target: the operator.
        args: its arguments, nodes among them.
        kwargs: those given by name.
        like: the node whose part the call takes: its owner is the call's, and so is its type where no other is given.
        spec: what the call yields.
    """
    with graph.module.graph.inserting_before(before):
        new: fx.Node = graph.module.graph.call_function(target, args, dict(kwargs or {}))
    new.meta[SPEC] = spec_of(like) if spec is _SAME else spec
    if OWNER in like.meta:
        new.meta[OWNER] = like.meta[OWNER]
    return new


def copied(graph: Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    """Repeat the call ``node`` in front of ``before``, with all that is known of it; return the copy."""
    with graph.module.graph.inserting_before(before):
        new: fx.Node = graph.module.graph.node_copy(node, lambda each: each)
    new.meta = dict(node.meta)
    return new


def read(graph: Graph, name: str, before: fx.Node) -> fx.Node:
    """Return a node that reads the tensor ``name`` and runs in front of ``before``: the one there is, or a new one."""
    name = graph.aliases.get(name, name)
    for node in graph.module.graph.find_nodes(op="get_attr", target=name):
        if node < before:
            return node  # type: ignore[no-any-return]
    with graph.module.graph.inserting_before(before):
        new: fx.Node = graph.module.graph.create_node("get_attr", name)
    new.meta[SPEC] = TensorSpec.of(graph.tensor(name))
    if OWNER in before.meta:
        new.meta[OWNER] = before.meta[OWNER]
    return new


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let everything that reads ``old`` read ``new``; ``old`` stays, unread."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new, propagate_meta=False)


def readers(graph: Graph, name: str) -> list[fx.Node]:
    """Return the nodes that read the tensor ``name``, in order, each once."""
    name = graph.aliases.get(name, name)
    found: dict[fx.Node, None] = {}
    for node in graph.module.graph.find_nodes(op="get_attr", target=name):
        found.update(dict.fromkeys(node.users))
    return sorted(found)


def is_random(node: fx.Node) -> bool:
    """Say whether the call draws random numbers."""
    if isinstance(node.target, Op):
        return _draws(node, node.target)
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _draws(node: fx.Node, target: Op) -> bool:
    if target.key == "Dropout":
        return Call(node)["training_mode"] not in (None, False, 0)
    return target.key in RANDOM


def has_effect(node: fx.Node) -> bool:
    """Say whether the node does something besides yielding its value, other than writing into its arguments.

    Inputs and outputs belong to the signature. An operator that yields nothing is an assertion or another act; the
    body of a higher-order operator may hold anything.
    """
    if node.op != "call_function":
        return node.op != "get_attr"
    schema = getattr(node.target, "_schema", None)
    return isinstance(node.target, torch._ops.HigherOrderOperator) or (schema is not None and not schema.returns)


@dataclass(frozen=True)
class Removed:
    """Name what :func:`remove_dead` took out."""

    nodes: tuple[str, ...]
    tensors: tuple[str, ...]


def remove_dead(graph: Graph) -> Removed:
    """Take out every node that no output and no effect needs, and the tensors that only such nodes read.

    A write into memory is needed where that memory outlives the call (an input, a tensor of the model), or where
    something needed shares it. A tensor that the graph never read (a head that this call does not use) stays, for it
    is the caller's; inputs stay, for they belong to the signature. Takes time in proportion to the graph's size.
    """
    needed = _needed(graph)
    read_before = {node.target for node in graph.module.graph.find_nodes(op="get_attr")}
    dead = [node for node in graph.nodes if node not in needed]
    for node in reversed(dead):
        graph.module.graph.erase_node(node)
    left = {node.target for node in graph.module.graph.find_nodes(op="get_attr")}
    unread = [name for name in sorted(map(str, read_before - left)) if find_tensor(graph, name) is not None]
    for name in unread:
        remove_tensor(graph, name)
    if dead:
        graph.module.recompile()
    return Removed(tuple(node.name for node in dead), tuple(unread))


def _needed(graph: Graph) -> set[fx.Node]:
    root_of = roots(graph.nodes)
    writes: dict[fx.Node, list[fx.Node]] = {}
    waiting: list[fx.Node] = []
    for node in graph.nodes:
        targets = written(node)
        for target in targets:
            writes.setdefault(root_of[target], []).append(node)
        if has_effect(node) or any(root_of[target].op in ("placeholder", "get_attr") for target in targets):
            waiting.append(node)
    needed: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
            waiting += writes.pop(root_of[node], [])
    return needed


# -- tensors --


def find_tensor(graph: Graph, name: str) -> torch.Tensor | None:
    """Return the tensor of that name, or None where there is none (the body of an operator has a name, too)."""
    found = find_attribute(graph.module, name)
    return found if isinstance(found, torch.Tensor) else None


def fresh_name(graph: Graph, stem: str) -> str:
    """Return a name for a new tensor: ``stem``, or that with the first number at which it is free."""
    path = stem.split(".")
    for depth in range(1, len(path)):
        part = find_attribute(graph.module, ".".join(path[:depth]))
        if part is not None and not isinstance(part, nn.Module):  # a tensor has no parts of its own
            return fresh_name(graph, ".".join([*path[: depth - 1], "_".join(path[depth - 1 :])]))
    name, count = stem, 0
    while find_attribute(graph.module, name) is not None:
        count += 1
        name = f"{stem}_{count}"
    return name


def add_tensor(
    graph: Graph,
    stem: str,
    tensor: torch.Tensor,
    *,
    persistent: bool = True,
    sources: Mapping[int, tuple[Source, ...]] | None = None,
) -> str:
    """Register a new tensor under a fresh name and return that name; a node reads it once :func:`read` makes one.

    Args:
        graph: the graph to edit.
        stem: the name wished for.
        tensor: a parameter, or a tensor that becomes a buffer.
        persistent: whether the ``state_dict`` holds it; says nothing of a parameter, which always is.
        sources: which positions of the input model's tensors its positions stand for, by dimension.
    """
    name = fresh_name(graph, stem)
    set_tensor(graph.module, name, tensor)
    if not persistent and not isinstance(tensor, nn.Parameter):
        path, _, last = name.rpartition(".")
        graph.module.get_submodule(path)._non_persistent_buffers_set.add(last)
    if sources is not None:
        graph.sources[name] = dict(sources)
    return name


def replace_tensor(
    graph: Graph, name: str, tensor: torch.Tensor, *, sources: Mapping[int, tuple[Source, ...]] | None = None
) -> None:
    """Put ``tensor`` in place of the tensor ``name``, for all its readers and under all its names.

    A parameter is followed by a parameter, with or without a gradient as before. ``sources`` adds to what is known of
    the dimensions it names.
    """
    name = graph.aliases.get(name, name)
    before = graph.tensor(name)
    if isinstance(before, nn.Parameter) and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor.detach(), requires_grad=before.requires_grad)
    graph.set_tensor(name, tensor)
    for node in graph.module.graph.find_nodes(op="get_attr", target=name):
        node.meta[SPEC] = TensorSpec.of(tensor)
    if sources is not None:
        graph.sources[name] = {**graph.sources.get(name, {}), **sources}


def remove_tensor(graph: Graph, name: str) -> None:
    """Take the tensor ``name`` off the model, under all its names; nothing may read it any more."""
    name = graph.aliases.get(name, name)
    for each in graph.names(name):
        path, _, last = each.rpartition(".")
        module = graph.module.get_submodule(path)
        module._parameters.pop(last, None)
        module._buffers.pop(last, None)
        module._non_persistent_buffers_set.discard(last)
        graph.aliases.pop(each, None)
    graph.sources.pop(name, None)
