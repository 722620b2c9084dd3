"""Make typed graphs by hand, for cases no model has."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from graphopt.axes.algebra import Atom, Axis, leaves
from graphopt.axes.groups import Group, Place
from graphopt.axes.infer import Axes, Typing
from graphopt.graph import Graph, TensorSpec, TraceModule, set_tensor

__all__ = ["typing_of"]


def typing_of(
    tensors: Mapping[str, tuple[Tensor, Axes]],
    macs: Sequence[Sequence[Axis]] = (),
    normalised: Sequence[Axis] = (),
    results: Sequence[Axes] = (),
) -> Typing:
    """Make a typed graph that reads these tensors, multiplies these many times and allocates these results.

    Every unfrozen atom in a parameter is a group, named after its first place, and numbered where several share it.
    `normalised` ones are said to be normalised over. Each result is made by one node in turn and read by the next.
    """
    module = nn.Module()
    for name, (tensor, _) in tensors.items():
        set_tensor(module, name, tensor)
    graph = fx.Graph()
    values: dict[fx.Node, Axes] = {}
    typed = {name: axes for name, (_, axes) in tensors.items()}
    for name, (tensor, axes) in tensors.items():
        node = graph.get_attr(name)
        node.meta["spec"] = TensorSpec.of(tensor)
        values[node] = axes
    last: fx.Node | None = None
    for axes in results:
        last = graph.call_function(torch.relu, () if last is None else (last,))
        last.meta["spec"] = TensorSpec(tuple(a.size for a in axes), torch.float32, (False,) * len(axes))
        values[last] = axes
    counted = {graph.call_function(torch.mm): [tuple(axes)] for axes in macs}
    graph.output(None)
    places: dict[Atom, list[Place]] = {}
    for name, axes in typed.items():
        for dim, axis in enumerate(axes):
            for atom in dict.fromkeys(leaves(axis)):
                if atom.frozen is None:
                    places.setdefault(atom, []).append(Place(name, dim, axis))
    groups: list[Group] = []
    for atom, found in places.items():
        namesakes = sum(g.places[0] == found[0] for g in groups)
        name = f"{found[0]}#{namesakes}" if namesakes else str(found[0])
        groups.append(Group(name, atom, atom.size, tuple(found), ("norm",) if atom in normalised else ()))
    held = TraceModule(module, fx.Graph())
    for name, (tensor, _) in tensors.items():
        set_tensor(held, name, tensor)
    held._graph = graph  # not `held.graph`, which would compile what is never run
    traced = Graph(held, ((), {}))
    return Typing(traced, typed, dict(values), counted, {}, groups, [], {}, {})
