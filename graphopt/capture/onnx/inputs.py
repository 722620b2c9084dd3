"""Make example inputs for an ONNX model, and say which of their dimensions vary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError

__all__ = ["Input", "given", "invented", "probes"]

BATCH: Final = 2
LENGTH: Final = 16
EXTENTS: Final = (224, 64, 256, 32, 512)
"""Sizes that are tried for the height and width of images, in order."""


LARGEST: Final = 1 << 28
"""Most entries of an example input that is made here."""


@dataclass(frozen=True)
class Input:
    """One input as the file declares it: a number a dimension, or the name of one that varies; None without a name."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str | None, ...]
    classes: int | None = None
    """How many rows the table has in which its entries are looked up, where they are."""

    @property
    def varying(self) -> tuple[int, ...]:
        """The dimensions that vary."""
        return tuple(d for d, size in enumerate(self.dims) if not isinstance(size, int))

    def __str__(self) -> str:
        return f"{self.name} [{', '.join('?' if d is None else str(d) for d in self.dims)}]"


def given(inputs: Sequence[Input], example_inputs: Any) -> list[torch.Tensor]:
    """Return the tensors that a caller gave, in the order of the model's inputs.

    Raises:
        CaptureError: they are not what the model takes.
    """
    names = [each.name for each in inputs]
    if isinstance(example_inputs, Mapping):
        if set(example_inputs) != set(names):
            raise CaptureError(f"the model's inputs are {names}; example_inputs are for {list(example_inputs)}")
        leaves = [example_inputs[name] for name in names]
    else:
        leaves = pytree.tree_leaves(example_inputs)
    if len(leaves) != len(inputs):
        raise CaptureError(f"the model takes {len(inputs)} inputs, {names}; found {len(leaves)} example inputs")
    return [_checked(each, leaf) for each, leaf in zip(inputs, leaves, strict=True)]


def _checked(declared: Input, value: Any) -> torch.Tensor:
    tensor = value.detach().clone() if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    if tensor.dtype != declared.dtype:
        raise CaptureError(
            f"input {declared.name} is declared as {_type(declared.dtype)}; the example is {_type(tensor.dtype)}"
        )
    fits = tensor.dim() == len(declared.dims) and all(
        not isinstance(size, int) or size == found for size, found in zip(declared.dims, tensor.shape, strict=True)
    )
    if not fits:
        raise CaptureError(f"input {declared} cannot be of shape {list(tensor.shape)}, as the example is")
    return tensor


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def invented(inputs: Sequence[Input]) -> Iterator[list[torch.Tensor]]:
    """Yield example inputs to try: a batch of two, 16 steps, images of the usual sizes; equal names are equal sizes."""
    spatial = any(len(each.dims) >= 4 and any(d >= 2 for d in each.varying) for each in inputs)
    tried = [(batch, extent) for extent in (EXTENTS if spatial else EXTENTS[:1]) for batch in (BATCH, 1)]
    if not any(each.varying for each in inputs):
        tried = tried[:1]
    for batch, extent in tried:
        sizes: dict[str, int] = {}
        shapes = [_shape(each, sizes, batch, extent) for each in inputs]
        for each, shape in zip(inputs, shapes, strict=True):
            if math.prod(shape) > LARGEST:
                raise CaptureError(
                    f"input {each} would have {math.prod(shape):.3g} entries in an example of shape {list(shape)}; at "
                    f"most {LARGEST} are invented: pass example_inputs"
                )
        yield [_random(each, shape) for each, shape in zip(inputs, shapes, strict=True)]


def _shape(each: Input, sizes: dict[str, int], batch: int, extent: int) -> tuple[int, ...]:
    found = []
    for dim, size in enumerate(each.dims):
        if isinstance(size, int):
            found.append(size)
            continue
        chosen = batch if dim == 0 else extent if len(each.dims) >= 4 and dim >= 2 else LENGTH
        found.append(sizes.setdefault(size, chosen) if size is not None else chosen)
    return tuple(found)


def probes(inputs: Sequence[Input], examples: Sequence[torch.Tensor], *, apart: bool) -> list[tuple[int, ...]]:
    """Return the shapes of inputs of other sizes: every dimension that varies is larger, images by a multiple of 32.

    Args:
        inputs: the inputs as declared.
        examples: the example inputs.
        apart: let dimensions that the file does not call the same grow by different amounts; batches grow alike.
    """
    growth: dict[str, int] = {}
    shapes = []
    for number, (each, example) in enumerate(zip(inputs, examples, strict=True)):
        shape = list(example.shape)
        for dim in each.varying:
            name = each.dims[dim]
            symbol = name if isinstance(name, str) else "batch" if dim == 0 else f"{dim} of {number}"
            if symbol not in growth:
                others = sum(more > 1 for more in growth.values()) if apart else 0
                spatial = len(shape) >= 4 and dim >= 2
                growth[symbol] = 1 if dim == 0 else 32 * (3 + others) if spatial else 8 * (1 + others)
            shape[dim] += growth[symbol]
        shapes.append(tuple(shape))
    return shapes


def _random(each: Input, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw a tensor, the same whenever the name and the shape are."""
    generator = torch.Generator().manual_seed(sum(map(ord, each.name)))
    if each.dtype is torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    if each.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(each.dtype)
    if each.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex64).to(each.dtype)
    if "mask" in each.name.lower():
        return torch.ones(shape, dtype=each.dtype)
    return torch.randint(0, each.classes or 2, shape, generator=generator).to(each.dtype)
