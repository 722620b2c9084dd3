"""Read example inputs: as the caller gave them, or as the model itself describes them; and which dimensions vary."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError, unknown_name

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one call."""

Dynamic = Mapping[int, frozenset[int]]
"""Dimensions that may vary from call to call, by position of the tensor among the leaves of :data:`Inputs`."""

BATCH: Final = "batch"

HOW_TO_PASS: Final = (
    "pass example_inputs: a tuple of positional inputs, a dict of keyword inputs, or a pair (tuple, dict) of both"
)


def normalise(example_inputs: Any) -> Inputs:
    """Return ``(args, kwargs)``.

    A mapping holds keyword inputs; a pair of a tuple (or list) and a mapping holds both kinds; any other tuple or list
    holds positional inputs; a tensor alone is the one positional input. A model whose only two positional inputs are
    a tuple and a mapping is therefore written ``((the_tuple, the_mapping), {})``.

    Raises:
        CaptureError: if it is none of these.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), _keywords(example_inputs)
    if isinstance(example_inputs, list | tuple):
        if (
            len(example_inputs) == 2
            and isinstance(example_inputs[0], list | tuple)
            and isinstance(example_inputs[1], Mapping)
        ):
            return tuple(example_inputs[0]), _keywords(example_inputs[1])
        return tuple(example_inputs), {}
    raise CaptureError(f"example_inputs is a {type(example_inputs).__name__}: {HOW_TO_PASS}")


def _keywords(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    wrong = [key for key in mapping if not isinstance(key, str)]
    if wrong:
        raise CaptureError(
            f"example_inputs holds a mapping with the key {wrong[0]!r}, which names no argument: {HOW_TO_PASS}"
        )
    return dict(mapping)


def leaf_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Name every leaf of ``inputs``: the argument of ``forward``, then the way into it, joined by dots."""
    positional = _positional_names(model.forward, len(inputs[0]))
    names = []
    paths: list[tuple[tuple[Any, ...], Any]] = pytree.tree_flatten_with_path(inputs)[0]
    for (kind, argument, *way), _ in paths:
        first = positional[argument.idx] if kind.idx == 0 else argument.key
        names.append(".".join([first, *(pytree.keystr((step,)).strip("[].'\"") for step in way)]))
    return names


def _positional_names(forward: Any, count: int) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}.{i}" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < count:
        raise CaptureError(
            f"example_inputs holds {count} positional inputs; forward takes {len(names)}: {', '.join(names)}"
        )
    return names[:count]


def dynamic_dimensions(dynamic: Any, names: list[str], inputs: Inputs) -> Dynamic:
    """Return which dimensions of which leaves vary.

    Args:
        dynamic: ``"batch"``: dimension 0 of every tensor. A mapping ``{input: {dimension: name}}`` (or ``{input:
            [dimension, …]}``): these besides; ``{input: None}``: none of this input. ``None``: none at all. An input
            is named as by :func:`leaf_names`; the name of one that holds several tensors stands for all of them.
            Dimensions of one name must be of one size.
        names: the names of the leaves.
        inputs: the example inputs.

    Raises:
        CaptureError: if an input or a dimension does not exist, or a name stands for two sizes.
    """
    if dynamic is None:
        return {}
    leaves = pytree.tree_leaves(inputs)
    found: dict[int, set[int]] = {
        i: {0} for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0
    }
    if isinstance(dynamic, Mapping):
        sizes: dict[str, tuple[int, str]] = {}
        for name, dimensions in dynamic.items():
            positions = [i for i in found if names[i] == name or names[i].startswith(f"{name}.")]
            if not positions:
                raise CaptureError("dynamic: " + unknown_name("tensor input", str(name), [names[i] for i in found]))
            for position in positions:
                if dimensions is None:
                    found[position] = set()
                    continue
                for dimension, label in _labelled(name, dimensions).items():
                    found[position].add(_checked(name, dimension, label, leaves[position], sizes))
    elif dynamic != BATCH:
        raise CaptureError(f"dynamic must be 'batch', None or {{input: {{dimension: name}}}}; found {dynamic!r}")
    return {position: frozenset(dimensions) for position, dimensions in found.items()}


def _labelled(name: str, dimensions: Any) -> dict[int, str | None]:
    if isinstance(dimensions, Mapping):
        return dict(dimensions)
    if isinstance(dimensions, Iterable) and not isinstance(dimensions, str):
        return dict.fromkeys(dimensions)
    raise CaptureError(
        f"dynamic[{name!r}] must be {{dimension: name}}, a list of dimensions or None; found {dimensions!r}"
    )


def _checked(
    name: str, dimension: Any, label: str | None, leaf: torch.Tensor, sizes: dict[str, tuple[int, str]]
) -> int:
    if not isinstance(dimension, int) or not -leaf.dim() <= dimension < leaf.dim():
        raise CaptureError(f"dynamic[{name!r}] names dimension {dimension!r}; the tensor has {leaf.dim()} dimensions")
    where = f"dimension {dimension % leaf.dim()} of {name}"
    if label is not None:
        size, first = sizes.setdefault(label, (leaf.shape[dimension], where))
        if size != leaf.shape[dimension]:
            raise CaptureError(
                f"dynamic gives the name {label!r} to {first}, of size {size}, and to {where}, of size "
                f"{leaf.shape[dimension]}: make the example sizes equal, or give two names"
            )
    return dimension % leaf.dim()


def widen(inputs: Inputs, dynamic: Dynamic, size: int = 3) -> Inputs:
    """Repeat every dynamic dimension of size 1 to ``size``: an export takes the sizes 0 and 1 for constants."""
    leaves, spec = pytree.tree_flatten(inputs)
    for position, dimensions in dynamic.items():
        leaf = leaves[position]
        repeats = [size if d in dimensions and leaf.shape[d] == 1 else 1 for d in range(leaf.dim())]
        leaves[position] = leaf.repeat(repeats) if size in repeats else leaf
    return pytree.tree_unflatten(leaves, spec)  # type: ignore[no-any-return]


def find_inputs(model: nn.Module) -> Inputs:
    """Return the example inputs that a model describes: Lightning, timm and Hugging Face models do.

    Raises:
        CaptureError: if the model says nothing that its ``forward`` takes; the message says how to pass inputs.
    """
    for describe in (_from_lightning, _from_hugging_face, _from_timm):
        inputs = describe(model)
        if inputs is not None:
            leaves, spec = pytree.tree_flatten(inputs)
            return pytree.tree_unflatten([_like(model, leaf) for leaf in leaves], spec)  # type: ignore[no-any-return]
    try:
        takes = f"{type(model).__name__}.forward{inspect.signature(model.forward)}"
    except (TypeError, ValueError):
        takes = type(model).__name__
    raise CaptureError(
        f"{takes} has no example inputs, and the model does not describe any (Lightning's example_input_array, timm's "
        f"default_cfg and Hugging Face's dummy_inputs are understood): {HOW_TO_PASS}"
    )


def _like(model: nn.Module, leaf: Any) -> Any:
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if not isinstance(leaf, torch.Tensor) or weight is None:
        return leaf
    device = leaf.device if weight.is_meta else weight.device
    return leaf.to(device=device, dtype=weight.dtype if leaf.is_floating_point() else leaf.dtype)


def _from_lightning(model: nn.Module) -> Inputs | None:
    array = getattr(model, "example_input_array", None)
    return None if array is None else normalise(array)


def _from_timm(model: nn.Module) -> Inputs | None:
    described = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(described, Mapping) or not described.get("input_size"):
        return None
    channels, height, width = described["input_size"]
    first = described.get("first_conv")
    if isinstance(first, str):
        weight = dict(model.named_parameters()).get(f"{first}.weight")
        channels = weight.shape[1] if weight is not None else channels
    # A model made for another resolution says so in its patch embedding only.
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = size if isinstance(size, tuple) and len(size) == 2 else (height, width)
    return (torch.zeros(1, channels, height, width),), {}


def _from_hugging_face(model: nn.Module) -> Inputs | None:
    config = getattr(model, "config", None)
    accepted = inspect.signature(model.forward).parameters
    if getattr(model, "main_input_name", None) == "pixel_values" and "pixel_values" in accepted:
        config = getattr(config, "vision_config", config)
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if isinstance(size, int | list | tuple):
            height, width = (size, size) if isinstance(size, int) else size
            return (), {"pixel_values": torch.zeros(1, channels, height, width)}
    dummies = getattr(model, "dummy_inputs", None)
    if not isinstance(dummies, Mapping):
        return None
    kept = {name: value for name, value in dummies.items() if name in accepted}
    return ((), kept) if kept else None
