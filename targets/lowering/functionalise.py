"""Replace calls that write into their arguments by calls that return new values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.aliases import NO_WRITES, family, memory, source, written
from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import SPEC, Call, Graph, TensorSpec, tensor_spec
from graphopt.sweep import flatten_inputs

aten = torch.ops.aten


def functionalise(graph: Graph) -> list[str]:
    """Rewrite every write in place; return a sentence for each that changed one of the model's own tensors.

    Who reads the tensor later reads the new value. If it was a view, the new value is written back into what it is a
    view of, and other views that are read later are taken anew. A model's own tensors (a counter, a cache) do not
    change from call to call any more: an ONNX graph has no state.

    Raises:
        UnsupportedOperatorError: if a write goes through a view that cannot be undone (an expansion).
    """
    notes = []
    owners: dict[fx.Node, int] | None = None
    for node in list(graph.nodes):
        if node.target in NO_WRITES:
            node.target = aten.detach.default
        targets = written(node)
        if not targets:
            continue
        if len(targets) > 1:
            raise UnsupportedOperatorError(f"{node.target}, which writes into several tensors")
        target = targets[0]
        order = {each: i for i, each in enumerate(graph.nodes)}
        before = [m for m in family(target) if m is not target and order[m] < order[node]]
        others = [m for m in before if _read_after(m, node, order)]
        if others and owners is None:
            # Only memory itself can tell whether a reshape or a conversion copied.
            owners = memory(graph, flatten_inputs(graph.module, *graph.example_inputs))
        new = _functional(graph, node)
        _rewrite_readers(graph, node, target, new, others, {} if owners is None else owners, order)
        start = _root(target)
        if start.op in ("get_attr", "placeholder"):
            what = f"the model's tensor {start.target}" if start.op == "get_attr" else f"the input {start.name}"
            notes.append(f"{node.name} writes into {what}; the file computes with the new value and does not keep it")
    graph.module.graph.eliminate_dead_code()
    graph.module.recompile()
    return notes


def _root(node: fx.Node) -> fx.Node:
    while (before := source(node)) is not None:
        node = before
    return node


def _read_after(node: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    return any(order[user] > order[write] for user in node.users)


def _functional(graph: Graph, node: fx.Node) -> fx.Node:
    """Insert the call that returns what ``node`` would have written."""
    target: Any = node.target
    name = target._schema.name.split("::")[1]
    overload = target._overloadname
    special: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
        "zero_": lambda: (aten.zeros_like.default, node.args[:1]),
    }
    if name in special:
        operator_, args = special[name]()
        kwargs = {}
    else:
        stem = name[:-1] if name.endswith("_") else name
        stem = f"__{stem[3:]}" if stem.startswith("__i") else stem
        packet = getattr(aten, stem, None)
        if packet is None or overload not in packet.overloads():
            raise UnsupportedOperatorError(f"{node.target}, which has no form that returns its result")
        operator_, args, kwargs = getattr(packet, overload), node.args, node.kwargs
    with graph.module.graph.inserting_before(node):
        new: fx.Node = graph.module.graph.call_function(operator_, args, dict(kwargs))
    new.meta.update(node.meta)
    return new


def _rewrite_readers(
    graph: Graph,
    node: fx.Node,
    target: fx.Node,
    new: fx.Node,
    others: list[fx.Node],
    owners: dict[fx.Node, int],
    order: dict[fx.Node, int],
) -> None:
    """Let everyone who reads the written memory after ``node`` read the new value, and take ``node`` out."""
    sharing = [m for m in others if owners.get(m) == owners.get(target) and isinstance(m.meta.get(SPEC), TensorSpec)]
    replaced = {target: new}
    if target in owners:
        owners[new] = owners[target]
    if sharing:
        # All of them become views of one new value, so that later writes through any of them reach the others.
        whole, value = _write_back(graph, node, target, new, owners)
        replaced = {whole: value}
        for member in sorted([*sharing, target], key=order.__getitem__):
            owners[_take_again(graph, node, member, replaced)] = owners[member]

    def later(user: fx.Node) -> bool:
        return order.get(user, -1) > order[node]

    node.replace_all_uses_with(replaced[target], propagate_meta=False)
    for old in (target, *sharing):
        old.replace_all_uses_with(replaced[old], delete_user_cb=later, propagate_meta=False)
    graph.module.graph.erase_node(node)


def _write_back(
    graph: Graph, node: fx.Node, target: fx.Node, new: fx.Node, owners: dict[fx.Node, int]
) -> tuple[fx.Node, fx.Node]:
    """Climb from ``target`` to the value whose memory it lies in; return that value, and what it is after the write."""
    view, value = target, new
    while (before := source(view)) is not None:
        part = not isinstance(before.meta.get(SPEC), TensorSpec)
        whole = source(before) if part else before
        if whole is None or owners.get(whole) != owners.get(target):
            break
        undone = _undo_part(view, before, whole, value) if part else _undo(view, whole, value)
        value = _insert(graph, node, *undone, like=whole)
        owners[value] = owners[whole]
        view = whole
    return view, value


def _insert(graph: Graph, before: fx.Node, target: Any, args: tuple[Any, ...], *, like: fx.Node) -> fx.Node:
    with graph.module.graph.inserting_before(before):
        new: fx.Node = graph.module.graph.call_function(target, args)
    new.meta[SPEC] = like.meta[SPEC]
    return new


def _undo(view: fx.Node, whole: fx.Node, value: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """Return the call that puts ``value``, the new ``view``, back into ``whole``."""
    call = Call(view)
    spec = tensor_spec(whole)
    rank = len(spec.shape)
    target = view.target
    if target in (aten.slice.Tensor,):
        return aten.slice_scatter.default, (whole, value, call["dim"], call["start"], call["end"], call["step"])
    if target is aten.select.int:
        return aten.select_scatter.default, (whole, value, call["dim"], call["index"])
    if target is aten.transpose.int:
        return aten.transpose.int, (value, call["dim0"], call["dim1"])
    if target is aten.t.default:
        return aten.t.default, (value,)
    if target is aten.permute.default:
        dims = [d % rank for d in call["dims"]]
        return aten.permute.default, (value, [dims.index(d) for d in range(rank)])
    if tensor_spec(view).shape == spec.shape or _is_reshaping(target):
        return aten.reshape_as.default, (value, whole)
    raise UnsupportedOperatorError(f"a write through {view.name}, a view by {target}, which cannot be undone")


def _is_reshaping(target: Any) -> bool:
    return target in (
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.view_as.default,
        aten.reshape_as.default,
    )


def _undo_part(item: fx.Node, parts: fx.Node, whole: fx.Node, value: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """Return the call that puts the new value of one part of a split back into ``whole``."""
    call, position = Call(parts), item.args[1]
    assert isinstance(position, int)
    dim = call["dim"] % len(tensor_spec(whole).shape)
    if parts.target is aten.unbind.int:
        return aten.select_scatter.default, (whole, value, dim, position)
    sizes = [tensor.shape[dim] for tensor in parts.meta[SPEC]]
    if any(tensor.dynamic[dim] for tensor in parts.meta[SPEC]):
        raise UnsupportedOperatorError(
            f"a write into {item.name}, a part of a dimension whose size depends on the inputs"
        )
    start = sum(sizes[:position])
    return aten.slice_scatter.default, (whole, value, dim, start, start + sizes[position], 1)


def _take_again(graph: Graph, node: fx.Node, member: fx.Node, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    """Repeat the views that lead from a value that was replaced to ``member``."""
    if member in replaced:
        return replaced[member]
    before = source(member)
    if before is None:
        return member
    again = _take_again(graph, node, before, replaced)
    with graph.module.graph.inserting_before(node):
        new = graph.module.graph.node_copy(member, lambda n: again if n is before else n)
    new.meta.update(member.meta)
    if member.target is not operator.getitem:
        new.meta[SPEC] = member.meta[SPEC]
    replaced[member] = new
    return new
