"""Read calls that only rearrange entries, the same in every dialect: reshapes, permutations, expansions."""

from __future__ import annotations

from typing import Final

import torch
from torch import fx

from graphopt.passes.canonicalize.identities import RESHAPING
from graphopt.passes.canonicalize.identities import permutation as aten_permutation
from graphopt.passes.onnx_calls import is_call, order_of

__all__ = ["is_expansion", "is_reshape", "permutation"]

_ONNX_RESHAPING: Final = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


def is_reshape(node: fx.Node) -> bool:
    """Say whether a call keeps all elements, in row-major order, and changes the shape."""
    return node.target in RESHAPING or is_call(node, *_ONNX_RESHAPING)


def is_expansion(node: fx.Node) -> bool:
    """Say whether a call repeats entries along dimensions of size one."""
    return node.target is torch.ops.aten.expand.default or is_call(node, "Expand")


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Return which dimension of its argument each dimension of the result is; None if the call does something else."""
    return order_of(node) if is_call(node, "Transpose") else aten_permutation(node)
