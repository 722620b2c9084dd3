"""Operators that make a tensor of sizes, numbers or nothing: constants, ranges, shapes."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import TYPES, Function, Sizes, as_tensor, ints, number, type_of
from graphopt.dialects.onnx.types import Filling

__all__ = ["TABLE"]


def _constant(
    *,
    value: Any = None,
    value_float: float | None = None,
    value_floats: Any = None,
    value_int: int | None = None,
    value_ints: Any = None,
    **others: Any,
) -> Tensor:
    if value is not None:
        return as_tensor(value)
    if value_float is not None or value_floats is not None:
        return torch.tensor(value_float if value_floats is None else list(value_floats), dtype=type_of(1))
    if value_int is not None or value_ints is not None:
        return torch.tensor(value_int if value_ints is None else list(value_ints), dtype=torch.int64)
    raise NotImplementedError(f"Constant: torch holds neither sparse tensors nor text; given is {sorted(others)}")


def _constant_of_shape(shape: Sizes, *, value: Any = None) -> Tensor:
    device = shape.device if isinstance(shape, Tensor) else None
    if isinstance(value, Filling):
        filling = torch.tensor(value.number, dtype=type_of(value.type))
    else:
        filling = torch.zeros(1, dtype=type_of(1)) if value is None else as_tensor(value)
    return filling.to(device).reshape(()).expand(ints(shape) or []).clone()


def _shape(data: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(data.shape)[start:end], dtype=torch.int64, device=data.device)


def _size(data: Tensor) -> Tensor:
    return torch.tensor(data.numel(), dtype=torch.int64, device=data.device)


def _range(start: Any, limit: Any, delta: Any, *, stash_type: int = 1) -> Tensor:
    """Count from ``start`` up to ``limit``, which is left out."""
    given = next((v for v in (start, limit, delta) if isinstance(v, Tensor)), None)
    first, last, step = (number(v) for v in (start, limit, delta))
    exact = all(isinstance(v, int) for v in (first, last, step))
    dtype = given.dtype if given is not None else torch.int64 if exact else torch.get_default_dtype()
    count = max(-((first - last) // step) if exact else math.ceil((last - first) / step), 0)
    steps = torch.arange(count, dtype=dtype, device=given.device if given is not None else None)
    found: Tensor = steps * step + first
    return found


def _eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    rows, columns = x.shape
    at = torch.arange(columns, device=x.device) - torch.arange(rows, device=x.device).unsqueeze(1)
    return (at == k).to(x.dtype if dtype is None else type_of(dtype))


def _random_uniform(
    *, shape: Any, dtype: int = 1, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> Tensor:
    return _draw(list(shape), type_of(dtype), seed).mul_(high - low).add_(low)


def _random_normal(
    *, shape: Any, dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    return _draw(list(shape), type_of(dtype), seed, normal=True).mul_(scale).add_(mean)


def _random_uniform_like(x: Tensor, *, dtype: int | None = None, **attributes: Any) -> Tensor:
    found = _random_uniform(shape=x.shape, dtype=1, **attributes)
    return found.to(x.device, x.dtype if dtype is None else type_of(dtype))


def _random_normal_like(x: Tensor, *, dtype: int | None = None, **attributes: Any) -> Tensor:
    found = _random_normal(shape=x.shape, dtype=1, **attributes)
    return found.to(x.device, x.dtype if dtype is None else type_of(dtype))


def _bernoulli(x: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    drawn = _draw(list(x.shape), torch.float32, seed).to(x.device)
    return (drawn < x).to(x.dtype if dtype is None else type_of(dtype))


def _multinomial(x: Tensor, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Draw classes by unnormalised log-probabilities (batch, classes)."""
    totals = x.exp().cumsum(-1)
    drawn = _draw([x.shape[0], sample_size], totals.dtype, seed).to(x.device) * totals[:, -1:]
    return torch.searchsorted(totals, drawn).to(type_of(dtype))


def _draw(shape: list[int], dtype: torch.dtype, seed: float | None, *, normal: bool = False) -> Tensor:
    """Return random numbers; a seed always gives the same ones, though not those of another runtime."""
    generator = None if seed is None else torch.Generator().manual_seed(int(seed))
    draw = torch.randn if normal else torch.rand
    return draw(shape, dtype=dtype, generator=generator)


def _bit_cast(x: Tensor, *, to: int) -> Tensor:
    """Return the same bits as another type of the same width."""
    return (x.to(torch.uint8) if x.dtype == torch.bool else x).view(_STORED[to]).to(TYPES[to])


_STORED: Final = TYPES | {9: torch.uint8}
"""Types as their bits are held: truth values in bytes."""


TABLE: Final[dict[str, Function]] = {
    "Bernoulli": _bernoulli,
    "BitCast": _bit_cast,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "EyeLike": _eye_like,
    "Multinomial": _multinomial,
    "RandomNormal": _random_normal,
    "RandomNormalLike": _random_normal_like,
    "RandomUniform": _random_uniform,
    "RandomUniformLike": _random_uniform_like,
    "Range": _range,
    "Shape": _shape,
    "Size": _size,
}
