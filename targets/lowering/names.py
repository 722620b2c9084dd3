"""Name the inputs and outputs of a graph after the signature they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from graphopt.graph import Graph


def input_names(graph: Graph) -> list[str]:
    """Return a name for each placeholder: the argument of ``forward``, then the way into it, joined by dots."""
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    info = _info(graph)
    if info is None or info.in_spec is None:
        return [node.name for node in placeholders]
    positional, keywords = info.in_spec.children()
    arguments = list(info.orig_args)
    names: list[str] = []
    for i, child in enumerate(positional.children()):
        names += _paths(child, (arguments[i] if i < len(arguments) else f"input_{i}",))
    for key, child in zip(keywords.context, keywords.children(), strict=True):
        names += _paths(child, (str(key),))
    return names if len(names) == len(placeholders) else [node.name for node in placeholders]


def output_names(graph: Graph, count: int) -> list[str]:
    """Return a name for each flattened output: its key or field, then the way into it; else its position."""
    info = _info(graph)
    if info is None or info.out_spec is None or info.out_spec.num_leaves != count:
        return ["output" if count == 1 else f"output_{i}" for i in range(count)]
    spec = info.out_spec
    if spec.is_leaf():
        return ["output"]
    keys = _keys(spec)
    names: list[str] = []
    for key, child in zip(keys, spec.children(), strict=True):
        names += _paths(child, (f"output_{key}" if isinstance(key, int) else key,))
    return names


def _info(graph: Graph) -> Any:
    codegen: Any = graph.module.graph._codegen
    return getattr(codegen, "pytree_info", None)


def _paths(spec: pytree.TreeSpec, way: tuple[str, ...]) -> Iterator[str]:
    if spec.is_leaf():
        yield ".".join(way)
        return
    for key, child in zip(_keys(spec), spec.children(), strict=True):
        yield from _paths(child, (*way, str(key)))


def _keys(spec: pytree.TreeSpec) -> Sequence[str | int]:
    """Return what the children of a container are called: keys, fields, or positions."""
    count = spec.num_children
    kind, context = spec.type, spec.context
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return list(kind._fields)
    for names in _candidates(kind, context):
        if len(names) == count and all(isinstance(name, str) for name in names):
            return list(names)
    return list(range(count))


def _candidates(kind: Any, context: Any) -> Iterator[Sequence[Any]]:
    if isinstance(context, list | tuple):
        yield context
        for part in context:
            if isinstance(part, list | tuple):
                yield part
    if hasattr(context, "_fields"):
        yield context._fields
    if isinstance(kind, type) and is_dataclass(kind):
        yield [field.name for field in fields(kind)]


def unique(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Return the names, those that occur twice (or are taken) with a number after them."""
    seen = set(taken)
    found = []
    for name in names:
        each, count = name, 1
        while each in seen:
            count += 1
            each = f"{name}_{count}"
        seen.add(each)
        found.append(each)
    return found


def placeholders(graph: Graph) -> list[fx.Node]:
    """Return the nodes of the inputs, in order."""
    return list(graph.module.graph.find_nodes(op="placeholder"))
