"""Tell the kinds of model apart and capture each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.capture import modes
from graphopt.capture.build import Specs, build
from graphopt.capture.export import run_export, structural_copy
from graphopt.capture.inputs import normalise, widen
from graphopt.capture.tensors import Owner
from graphopt.errors import CaptureError
from graphopt.graph import Graph


def capture(model: Any, example_inputs: Any = None, *, dynamic: Any = "batch") -> Graph:
    """Turn a model into a graph."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"cannot capture a {type(model).__name__}")
    inputs = normalise(example_inputs)
    dims: dict[int, set[int]] = {
        i: {0} for i, leaf in enumerate(pytree.tree_leaves(inputs)) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0
    }
    duplicate = structural_copy(model).eval()
    args, kwargs = widen(inputs, dims)
    program = run_export(duplicate, args, kwargs, dims)
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    owner = Owner([*named.values(), *(c for c in program.constants.values() if isinstance(c, torch.Tensor))])
    tensors = {name: owner.own(tensor) for name, tensor in named.items()}
    built = build(program, tensors, owner.own, Specs(_symbols(program, inputs)))
    module = built.module
    for name, part in model.named_modules(remove_duplicate=False):
        if part._non_persistent_buffers_set:
            for each in part._non_persistent_buffers_set:
                if part._buffers.get(each) is not None:
                    module.get_submodule(name)._non_persistent_buffers_set.add(each)
    notes = [*built.notes, *modes.mark(module, duplicate)]
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    canonical = {id(tensors[name]): name for name in tensors if name in used}
    aliases = {name: canonical[id(t)] for name, t in tensors.items() if canonical.get(id(t), name) != name}
    module.meta["example_inputs"] = inputs
    return Graph(module, inputs, aliases, notes)


def _symbols(program: torch.export.ExportedProgram, inputs: Any) -> Mapping[Any, int]:
    symbols: dict[Any, int] = {}
    placeholders = program.graph.find_nodes(op="placeholder")
    leaves = pytree.tree_leaves(inputs)
    for node, leaf in zip(placeholders[len(placeholders) - len(leaves) :], leaves, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for traced, size in zip(value.shape, leaf.shape, strict=True):
                if isinstance(traced, torch.SymInt) and traced.node.expr.is_Symbol:
                    symbols.setdefault(traced.node.expr, size)
    return symbols
