"""Run ``torch.export`` on a copy that shares the model's tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy the modules and everything they hold but tensors, which are shared."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in _held(model)})


def _held(model: nn.Module) -> Iterator[torch.Tensor]:
    for part in model.modules():
        for value in vars(part).values():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, torch.Tensor):
                    yield leaf


def run_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Mapping[int, set[int]]
) -> ExportedProgram:
    """Export ``model``, which must be in evaluation mode; ``dynamic`` is keyed by position among the input's leaves."""
    shapes = ShapesCollection()
    for position, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
        if dynamic.get(position):
            shapes[leaf] = {d: Dim.AUTO for d in dynamic[position]}
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(model, args, kwargs), strict=False)
