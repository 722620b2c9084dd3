"""Say what is known of a value while a model is read.

What may live here: stored tensors, values with their types at two sizes of the inputs, and small tensors as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.capture.onnx.sizes import LARGEST, Entries
from graphopt.graph import TensorSpec

Type = tuple[tuple[int, ...], torch.dtype]
"""The shape of a tensor, and the type of its entries."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its type, and its values when they are asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


@dataclass(eq=False)
class Found:
    """What is known of one value of the model.

    ``shape`` and ``probe`` are its shapes for the example inputs and for inputs of other sizes. ``entries`` are its
    numbers, where it is a small tensor of numbers that depend on sizes alone. ``make`` makes the node that yields it.
    """

    name: str
    shape: tuple[int, ...]
    probe: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], fx.Node]
    entries: Entries | None = None
    stored: Stored | None = None
    varying: frozenset[int] = frozenset()
    made: fx.Node | None = field(default=None, repr=False)

    @property
    def node(self) -> fx.Node:
        """The node that yields the value; made when first asked for."""
        if self.made is None:
            self.made = self.make()
        return self.made

    @property
    def spec(self) -> TensorSpec:
        """The value's type."""
        dynamic = tuple(
            a != b or d in self.varying for d, (a, b) in enumerate(zip(self.shape, self.probe, strict=True))
        )
        return TensorSpec(self.shape, self.dtype, dynamic)


def of_entries(entries: Entries, dtype: torch.dtype) -> Found:
    """Return a small tensor of which the numbers are known, and no node yields it yet."""
    return Found("", entries.shape, entries.shape, dtype, unmade, entries=entries)


def unmade() -> fx.Node:
    """Stand for the making of a node that is not known yet."""
    raise AssertionError("a result without a call")


def is_small(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Say whether a constant's entries are looked at while a graph is read; those of weights are not."""
    count = math.prod(shape)
    return count <= 1 or (count <= 8 and len(shape) == 1) if dtype.is_floating_point else count <= LARGEST


def entries_of(tensor: torch.Tensor) -> Entries:
    """Return the numbers of a tensor."""
    return as_entries(tensor.tolist(), tuple(tensor.shape))


def as_entries(value: Any, shape: tuple[int, ...]) -> Entries:
    """Return nested lists of numbers and sizes as an array of them."""
    made = np.empty(shape, dtype=object)
    made[...] = value
    return made


def tensor_of(entries: Entries, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of such numbers, of which none varies."""
    return torch.tensor(entries.tolist(), dtype=dtype).reshape(entries.shape)


def is_tensor(value: Any) -> bool:
    """Say whether an attribute is a tensor of onnx-graphsurgeon, whose graphs answer for any attribute."""
    return "_values" in getattr(value, "__dict__", ())
