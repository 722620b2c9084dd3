"""Say what each ONNX operator computes, as a function of torch tensors.

What may live here: one function an operator, by family. A function takes the operator's inputs by position, in the
order of the schema, and its attributes by name, both as :mod:`~graphopt.dialects.onnx.operators` describes them. It
must run on meta tensors, so that shapes can be propagated without values, in float64 whatever its inputs' type, and
backwards wherever the operator has a gradient. It writes into no argument.

Where the values of an operand decide a shape (NonZero, a Reshape to a tensor's values), a meta tensor gives no answer:
NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any, Final

__all__ = ["FAMILIES", "semantics_of"]

FAMILIES: Final = (
    "attention",
    "contraction",
    "creation",
    "elementwise",
    "indexing",
    "losses",
    "normalisation",
    "quantization",
    "recurrent",
    "reduction",
    "resizing",
    "sampling",
    "sequences",
    "shape",
    "signal",
    "spatial",
)
"""The modules of this package that hold a ``TABLE``: what an operator computes, by its key."""


@cache
def semantics_of(key: str) -> Callable[..., Any]:
    """Return what the operator of that :attr:`~graphopt.dialects.onnx.operators.Op.key` computes.

    What no family describes is left to ONNX Runtime, see :mod:`~graphopt.dialects.onnx.semantics.runtime`.
    """
    found = _table().get(key)
    if found is not None:
        return found
    from graphopt.dialects.onnx.semantics import runtime

    return partial(runtime.call, key)


@cache
def _table() -> dict[str, Callable[..., Any]]:
    merged: dict[str, Callable[..., Any]] = {}
    for family in FAMILIES:
        for key, function in import_module(f"{__name__}.{family}").TABLE.items():
            if key in merged:
                raise ValueError(f"{key}: described twice, the second time in {family}.py")
            merged[key] = function
    return merged
