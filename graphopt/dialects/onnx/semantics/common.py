"""Hold what the families share: types by ONNX's numbers, operands that are sizes, several results, wide precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Final

import torch
from torch import Tensor

from graphopt.dialects.onnx.types import TORCH_TYPE

__all__ = [
    "TYPES",
    "UNSIGNED",
    "Function",
    "Sizes",
    "as_tensor",
    "axis_of",
    "ints",
    "number",
    "numbers",
    "results",
    "type_of",
    "unsigned_as_signed",
    "wide",
]

Function = Callable[..., Any]
Sizes = Sequence[int] | Tensor
"""An operand that holds sizes: numbers, or a tensor where the data decide."""

TYPES: Final[dict[int, torch.dtype]] = TORCH_TYPE | {21: torch.uint8, 22: torch.int8, 25: torch.uint8, 26: torch.int8}
"""Torch's type by the number of ONNX's. Integers of four and of two bits are held in bytes, one in each."""


def type_of(code: int | torch.dtype) -> torch.dtype:
    """Return the type that an attribute asks for.

    Where torch's default is float64, as it is while a model is evaluated in float64, every floating-point type asked
    for is float64.

    Raises:
        NotImplementedError: torch has no such type.
    """
    if isinstance(code, torch.dtype):
        found = code
    elif code in TYPES:
        found = TYPES[code]
    else:
        raise NotImplementedError(f"torch has no type for number {code} of ONNX's types")
    return torch.float64 if found.is_floating_point and torch.get_default_dtype() == torch.float64 else found


def ints(sizes: Sizes | None) -> list[int] | None:
    """Return sizes as numbers.

    Raises:
        NotImplementedError: they are a tensor without values.
    """
    if sizes is None:
        return None
    # A size that varies, while a graph is exported, stays the symbol that it is.
    return [int(n) for n in _with_values(sizes).tolist()] if isinstance(sizes, Tensor) else [number(n) for n in sizes]


def numbers(values: Sequence[float] | Tensor | None) -> list[float] | None:
    """Return factors as numbers, as :func:`ints` does."""
    if values is None:
        return None
    return [float(v) for v in (_with_values(values).tolist() if isinstance(values, Tensor) else map(number, values))]


def number(value: Any) -> Any:
    """Return a single number, that may be a tensor of one.

    Raises:
        NotImplementedError: it is a tensor without values.
    """
    return _with_values(value).item() if isinstance(value, Tensor) else value


def _with_values(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise NotImplementedError("the values of a tensor decide here, and a meta tensor has none")
    return tensor


def as_tensor(value: Any, like: Tensor | None = None) -> Tensor:
    """Return an attribute's value as a tensor: a number, a numpy array, a tensor or ONNX's TensorProto."""
    device = like.device if like is not None else None
    if isinstance(value, Tensor):
        return value if device is None or value.device == device else value.to(device)
    if hasattr(value, "data_type") and hasattr(value, "dims"):
        import onnx.numpy_helper

        code, value = value.data_type, onnx.numpy_helper.to_array(value)
        if code not in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15):
            return torch.as_tensor(value.astype("float64"), device=device).to(type_of(code))
    return torch.as_tensor(value, device=device)


def axis_of(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    return axis + rank if axis < 0 else axis


def results(count: int, *values: Any) -> Any:
    """Return the first of the values where one is asked for, a tuple of the first ``count`` otherwise."""
    return values[0] if count <= 1 else values[:count]


def wide(x: Tensor, stash_type: int = 1) -> Tensor:
    """Return a tensor in the precision a norm computes in: half precision becomes float32, unless told otherwise."""
    return x.float() if stash_type == 1 and x.dtype in (torch.float16, torch.bfloat16) else x


UNSIGNED: Final = (torch.uint16, torch.uint32, torch.uint64)
"""Types that torch stores and hardly computes in."""


def unsigned_as_signed(function: Function) -> Function:
    """Compute in int64 what torch does not compute in its unsigned types of more than eight bits.

    Sums and products come out right modulo the type's range. What depends on the order of numbers from 2**63 on does
    not.
    """

    @wraps(function)
    def computed(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
        unsigned = next((t.dtype for t in tensors if t.dtype in UNSIGNED), None)
        if unsigned is None:
            return function(*args, **kwargs)
        found = function(*(_signed(a) for a in args), **{name: _signed(a) for name, a in kwargs.items()})
        if isinstance(found, tuple):
            return tuple(f.to(unsigned) if f.dtype == torch.int64 else f for f in found)
        return found.to(unsigned) if found.dtype == torch.int64 else found

    return computed


def _signed(value: Any) -> Any:
    if isinstance(value, list):
        return [_signed(v) for v in value]
    return value.to(torch.int64) if isinstance(value, Tensor) and value.dtype in UNSIGNED else value
