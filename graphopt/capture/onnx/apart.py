"""Give each reader its own copy of what an exporter shared only because it is equal.

Torch's exporters hold the ones and zeros of all norms without weights in one initializer, and compute a first state of
zeros once for all layers. Indices of a shared tensor can only go for all of its readers, so every such norm and every
such layer would have to lose the same ones.
"""

from __future__ import annotations

from typing import Final

from torch import fx, nn

from graphopt.dialects.onnx.facts import ONNX
from graphopt.dialects.onnx.operators import Op
from graphopt.editing import add_tensor, copied, read
from graphopt.graph import Call, Graph, get_attribute

__all__ = ["take_apart"]

MOST_ENTRIES: Final = 1 << 16
"""How many entries a tensor may have that is looked at, and copied."""


def take_apart(graph: Graph) -> None:
    """Copy, for every reader but the first, tensors whose entries are all equal, and expansions of one number.

    A tensor under a dotted name is a module's own: a model that uses it twice means to share it, and it stays one.
    """
    changed = False
    for node in list(graph.nodes):
        users = list(node.users)
        if len(users) < 2 or any(user.op != "call_function" for user in users):
            continue
        if _is_filled(node):
            for user in users[1:]:
                twin = copied(graph, node, user)
                twin.meta.pop(ONNX, None)
                user.replace_input_with(node, twin)
                changed = True
        elif node.op == "get_attr" and _is_uniform(graph, str(node.target)):
            tensor = graph.tensor(str(node.target))
            for user in users[1:]:
                own = (
                    nn.Parameter(tensor.detach(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else tensor
                )
                name = add_tensor(graph, str(node.target), own, sources={})
                user.replace_input_with(node, read(graph, name, user))
                changed = True
    if changed:
        graph.module.recompile()


def _is_filled(node: fx.Node) -> bool:
    """Say whether a node repeats one number of the file."""
    if not isinstance(node.target, Op) or node.target.key not in ("Expand", "ConstantOfShape"):
        return False
    if node.target.key == "ConstantOfShape":
        return not isinstance(Call(node)["input"], fx.Node)
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr" or isinstance(Call(node)["shape"], fx.Node):
        return False
    module = node.graph.owning_module
    tensor = get_attribute(module, str(source.target)) if module is not None else None
    return tensor is not None and tensor.numel() == 1 and not isinstance(tensor, nn.Parameter)


def _is_uniform(graph: Graph, name: str) -> bool:
    tensor = graph.tensor(name)
    if "." in name or tensor.is_meta or not tensor.is_floating_point() or not 1 < tensor.numel() <= MOST_ENTRIES:
        return False
    return bool((tensor == tensor.reshape(-1)[0]).all())
