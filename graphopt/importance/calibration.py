"""Read calibration data and run a model on it.

What may live here: the forms a batch can have, and the default loss. Nothing here knows groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

from graphopt.dialects.onnx.facts import facts_of, is_onnx
from graphopt.errors import PipelineError
from graphopt.graph import Graph

__all__ = ["Batch", "Loss", "batches", "classification_loss"]

Loss = Callable[[Any, Any], Tensor]
"""Makes a scalar tensor of the model's outputs and the batch's labels, which are None where a batch has none."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Hold what the model is called with, and the labels if the batch has any."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any = None


def batches(calibration: Iterable[Any], graph: Graph) -> Iterator[Batch]:
    """Yield the batches of the data in one form.

    A batch is what the model takes: a tensor, a tuple or list of positional inputs, or a mapping of keyword inputs; or
    a pair of that and labels. A pair is taken for `(inputs, labels)` where its first entry alone can be the inputs: it
    is a tuple, list or mapping, or the model takes a single positional input. NumPy arrays stand for tensors. The
    inputs of an ONNX model come in the order of the file, or in a mapping by the file's names.

    Raises:
        PipelineError: a batch is of another type, or does not have the inputs of the ONNX file.
    """
    positional = len(graph.example_inputs[0])
    named = [value.name for value in facts_of(graph).inputs] if is_onnx(graph) else None
    for index, item in enumerate(calibration):
        if isinstance(item, tuple | list) and len(item) == 2 and _stands_alone(item[0], positional):
            inputs, labels = item
        else:
            inputs, labels = item, None
        batch = _batch(inputs, labels, index)
        yield batch if named is None else _in_order(batch, named, graph, index)


def _stands_alone(inputs: Any, positional: int) -> bool:
    return isinstance(inputs, tuple | list | Mapping) or positional == 1


def _batch(inputs: Any, labels: Any, index: int) -> Batch:
    if isinstance(inputs, Tensor | np.ndarray):
        return Batch((_tensor(inputs, index),), {}, labels)
    if isinstance(inputs, Mapping):
        return Batch((), {name: _tensor(value, index) for name, value in inputs.items()}, labels)
    if isinstance(inputs, tuple | list):
        return Batch(tuple(_tensor(value, index) for value in inputs), {}, labels)
    raise PipelineError(
        f"batch {index} of the calibration data is of type {type(inputs).__name__}; give a tensor, a tuple of "
        "positional inputs or a dict of keyword inputs, or a pair of one of these and labels"
    )


def _tensor(value: Any, index: int) -> Any:
    """Return a tensor for an array; anything else is what it is."""
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(np.require(value, requirements=("C", "W")))
    except TypeError as error:
        raise PipelineError(
            f"batch {index} of the calibration data holds an array of {value.dtype}, which is no type of tensors"
        ) from error


def _in_order(batch: Batch, names: Sequence[str], graph: Graph, index: int) -> Batch:
    """Return a batch with the inputs of an ONNX model in the order of the file, each of its type."""
    where = f"batch {index} of the calibration data"
    takes = f"the model takes {', '.join(names)}"
    if batch.kwargs:
        if set(batch.kwargs) != set(names):
            raise PipelineError(f"{where} has {', '.join(batch.kwargs)}; {takes}: give each by its name in the file")
        batch = Batch(tuple(batch.kwargs[name] for name in names), {}, batch.labels)
    if len(batch.args) != len(names):
        raise PipelineError(f"{where} has {len(batch.args)} inputs; {takes}: give all of them, in this order")
    for name, value, example in zip(names, batch.args, graph.example_inputs[0], strict=True):
        if not isinstance(value, Tensor):
            raise PipelineError(f"{where} has a {type(value).__name__} for {name}: give a tensor or a NumPy array")
        if value.dtype is not example.dtype:
            found, wanted = (str(t.dtype).removeprefix("torch.") for t in (value, example))
            raise PipelineError(f"{where} has {found} for {name}, which the file declares as {wanted}: convert it")
    return batch


def classification_loss(outputs: Any, labels: Any) -> Tensor:
    """Return the cross entropy of the model's first floating-point output, classes along its dimension 1.

    Raises:
        PipelineError: there are no labels, or the outputs hold no floating-point tensor.
    """
    if labels is None:
        raise PipelineError(
            "the default loss is cross entropy and needs labels: give calibration data as (inputs, labels), or a loss "
            "of your own that takes (outputs, labels)"
        )
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return cross_entropy(leaf, torch.as_tensor(labels, device=leaf.device))
    raise PipelineError("the model returns no floating-point tensor for cross entropy; give a loss of your own")
