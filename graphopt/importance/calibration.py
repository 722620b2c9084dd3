"""Read calibration data and run a model on it.

What may live here: the forms a batch can have, and the default loss. Nothing here knows groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

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
    is a tuple, list or mapping, or the model takes a single positional input.

    Raises:
        PipelineError: a batch is of another type.
    """
    positional = len(graph.example_inputs[0])
    for index, item in enumerate(calibration):
        if isinstance(item, tuple | list) and len(item) == 2 and _stands_alone(item[0], positional):
            yield _batch(item[0], item[1], index)
        else:
            yield _batch(item, None, index)


def _stands_alone(inputs: Any, positional: int) -> bool:
    return isinstance(inputs, tuple | list | Mapping) or positional == 1


def _batch(inputs: Any, labels: Any, index: int) -> Batch:
    if isinstance(inputs, Tensor):
        return Batch((inputs,), {}, labels)
    if isinstance(inputs, Mapping):
        return Batch((), dict(inputs), labels)
    if isinstance(inputs, tuple | list):
        return Batch(tuple(inputs), {}, labels)
    raise PipelineError(
        f"batch {index} of the calibration data is of type {type(inputs).__name__}; give a tensor, a tuple of "
        "positional inputs or a dict of keyword inputs, or a pair of one of these and labels"
    )


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
