"""Find which tensor of an exported file is which parameter of the module, so that their plans can be compared.

Exporters keep most names, but not of the weights that they transpose; those are found by their values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.axes.groups import Group
from graphopt.axes.infer import Typing
from graphopt.plan import Plan

__all__ = ["Origin", "origins", "signatures"]


@dataclass(frozen=True)
class Origin:
    """A tensor of the module, and for each dimension of the file's tensor the one it was there."""

    name: str
    dims: tuple[int, ...]


def origins(of_file: Mapping[str, Tensor], of_module: Mapping[str, Tensor]) -> dict[str, Origin]:
    """Find each tensor of the file in the module: by its name and shape, or by its values, transposed or not."""
    by_values: dict[tuple[tuple[int, ...], bytes], Origin] = {}
    for name, tensor in of_module.items():
        ways = [tuple(range(tensor.dim()))] + ([(1, 0)] if tensor.dim() == 2 else [])
        for dims in ways:
            by_values.setdefault(_values(tensor.permute(dims)), Origin(name, dims))
    found: dict[str, Origin] = {}
    for name, tensor in of_file.items():
        if not tensor.is_floating_point() or tensor.numel() <= 1:
            continue
        if name in of_module and of_module[name].shape == tensor.shape:
            found[name] = Origin(name, tuple(range(tensor.dim())))
        elif (origin := by_values.get(_values(tensor))) is not None:
            found[name] = origin
    return found


def _values(tensor: Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.detach().to(torch.float32).contiguous().numpy().tobytes()


Signature = frozenset[tuple[str, int, tuple[int, ...]]]
"""What goes with an index of a group: tensors' dimensions, and the positions there, of the module."""


def signatures(typing: Typing, known: Mapping[str, Origin]) -> dict[str, tuple[Signature, ...]]:
    """Say of each group what goes with its first and with its last index; groups of unknown tensors are left out."""
    found = {
        group.name: tuple(_signature(typing, group, [i], known) for i in (0, group.size - 1)) for group in typing.groups
    }
    return {name: both for name, both in found.items() if both[0]}


def _signature(typing: Typing, group: Group, gone: Sequence[int], known: Mapping[str, Origin]) -> Signature:
    kept = np.setdiff1d(np.arange(group.size), gone)
    plan = Plan.direct(typing, {group.atom: kept})
    places = set()
    for name, dims in plan.keep.items():
        for dim, indices in dims.items():
            if name in known:
                positions = np.setdiff1d(np.arange(plan.shapes[name][dim]), indices)
                places.add((known[name].name, known[name].dims[dim], tuple(positions.tolist())))
    return frozenset(places)
