"""Read example inputs: as given, with which dimensions dynamic, and as the export sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def normalise(example_inputs: Any) -> Inputs:
    """Return ``(args, kwargs)``: a mapping is keywords, a pair of tuple and mapping is both, all else positional."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, list | tuple):
        if (
            len(example_inputs) == 2
            and isinstance(example_inputs[0], list | tuple)
            and isinstance(example_inputs[1], Mapping)
        ):
            return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise CaptureError(
        f"example_inputs must be a tensor, a tuple of positional inputs, a dict of keyword inputs, or a pair "
        f"(tuple, dict) of both; found {type(example_inputs).__name__}"
    )


def widen(inputs: Inputs, dynamic: Mapping[int, set[int]], batch: int = 3) -> Inputs:
    """Repeat every dynamic dimension of size 1, which export would take for a constant."""
    leaves, spec = pytree.tree_flatten(inputs)
    for position, dimensions in dynamic.items():
        leaf = leaves[position]
        repeats = [batch if d in dimensions and leaf.shape[d] == 1 else 1 for d in range(leaf.dim())]
        leaves[position] = leaf.repeat(repeats) if max(repeats) > 1 else leaf
    return pytree.tree_unflatten(leaves, spec)  # type: ignore[no-any-return]
