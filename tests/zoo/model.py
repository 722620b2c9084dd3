"""Describe one model of the zoo: how it is built, what it is fed, and how both get their random values.

A builder imports its library only when it is called, so importing the zoo costs nothing.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tests.torchvision_ops import declare_missing_operators

from .randomise import calibrate, randomise

__all__ = ["Arguments", "ZooModel", "cast", "in_float64", "quiet"]


class Arguments(NamedTuple):
    """Hold what a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class ZooModel:
    """Describe one model: a constructor and its example inputs, in a small and in a native size.

    The small size keeps the architecture (for vision models from timm and torchvision also every width and the depth)
    and shrinks what makes a forward pass slow: resolution, and for language models width, depth and vocabulary.
    The native size is what a benchmark wants. Every model takes a batch of any size and exports as such: the first
    dimension of every tensor input is the batch.

    Attributes:
        name: The key in `ZOO`.
        family: Which kind of architecture it is: "convnet", "vision-transformer", "language", "multimodal" or "dense".
        construct: Makes the module; the argument says whether in its native size. Its weights are overwritten.
        example: Makes the inputs: whether in native size, how many in the batch, and where randomness comes from.
    """

    name: str
    family: str
    construct: Callable[[bool], nn.Module]
    example: Callable[[bool, int, torch.Generator], Arguments]

    def build(self, *, native: bool = False, seed: int = 0) -> nn.Module:
        """Build the module with random weights, in eval mode and float32; the same whenever the seed is."""
        declare_missing_operators()
        with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            with _WithoutRandomInit():
                module = self.construct(native).eval()
            randomise(module, seed)
            calibrate(module, *self.inputs(native=native, batch=1 if native else 2, seed=seed), seed=seed)
            # LeViT and EfficientFormer keep what they computed from their weights until they are put in train mode.
            module.train().eval()
        return module

    def inputs(self, *, native: bool = False, batch: int = 2, seed: int = 1) -> Arguments:
        """Make example inputs; the same whenever the seed is."""
        return self.example(native, batch, torch.Generator().manual_seed(seed))


class _WithoutRandomInit(TorchFunctionMode):
    """Skip the drawing of initial weights, which `randomise` overwrites: most of the time it takes to build."""

    _skipped = frozenset({Tensor.uniform_, Tensor.normal_, Tensor.erfinv_})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._skipped and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


class _Float64(TorchFunctionMode):
    """Turn every request for float32 into one for float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        if func is torch._grouped_mm:  # has no float64 kernel; transformers exports this operator in its place
            return torch.ops.transformers.grouped_mm_fallback(*args[:2], (kwargs or {})["offs"])
        args, kwargs = pytree.tree_map(_widen, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute in float64 also where a model asks for float32.

    Root-mean-square norms, rotary embeddings, softmaxes and state-space scans of Hugging Face models cast to float32
    whatever the model's type is, which would blur a comparison at 1e-10. Run or export a float64 model inside.
    """
    with _Float64():
        yield


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors of a nested structure, and leave everything else as it is."""

    def leaf(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return pytree.tree_map(leaf, tree)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log messages that the model libraries emit, for as long as the context lasts."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
