"""Say what each ONNX operator computes, as a function of torch tensors.

What may live here: one function an operator, by family. A function takes the operator's inputs by position, under the
names of the schema, and its attributes by name, both as :mod:`~graphopt.dialects.onnx.operators` describes them. It
must run on meta tensors, so that shapes can be propagated without values, in float64 whatever its inputs' type, and
backwards wherever the operator has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

__all__ = ["semantics_of"]


@cache
def semantics_of(key: str) -> Callable[..., Any]:
    """Return what the operator of that :attr:`~graphopt.dialects.onnx.operators.Op.key` computes.

    Raises:
        NotImplementedError: it is not described here.
    """
    raise NotImplementedError(key)
