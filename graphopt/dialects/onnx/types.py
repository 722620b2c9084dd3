"""Translate between the element types of ONNX and of torch."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

__all__ = ["ONNX_TYPE", "TORCH_TYPE", "Filling"]

TORCH_TYPE: Final[dict[int, torch.dtype]] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
}
"""The type of torch by the number that ``TensorProto.DataType`` gives it; strings and half bytes have none."""

ONNX_TYPE: Final[dict[torch.dtype, int]] = {dtype: number for number, dtype in TORCH_TYPE.items()}
"""The number of a type of torch in ``TensorProto.DataType``."""


class Filling(NamedTuple):
    """One number of an element type, which ONNX gives as a tensor of one entry: what fills a ConstantOfShape.

    As a tuple of plain values it can stand in the code that ``torch.fx`` generates, which a tensor cannot.
    """

    number: float
    type: int

    @property
    def dtype(self) -> torch.dtype:
        """The type of torch."""
        return TORCH_TYPE[self.type]
