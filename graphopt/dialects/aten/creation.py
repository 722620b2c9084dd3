"""Operators that make tensors from sizes: constants, ranges, random values."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.axes.infer import Operator
from graphopt.dialects.aten.common import table
from graphopt.dialects.common import frozen, resize_shape, uniform, zeros_everywhere

aten = torch.ops.aten


_UNIFORM = Operator(uniform, None, resize_shape("size"))
_NULL = Operator(uniform, zeros_everywhere, resize_shape("size"))

OPERATORS: dict[Any, Operator] = {
    **table(_NULL, "zeros.default", "new_zeros.default"),
    **table(
        _UNIFORM,
        *(
            "ones.default",
            "full.default",
            "empty.memory_format",
            "new_ones.default",
            "new_full.default",
            "new_empty.default",
        ),
        *("rand.default", "randn.default"),
    ),
    **table(
        frozen("its entries are numbered"),
        *("arange.default", "arange.start", "arange.start_step", "linspace.default", "logspace.default", "eye.default"),
        *(
            "eye.m",
            "scalar_tensor.default",
            "randint.default",
            "randint.low",
            "hann_window.default",
            "tril_indices.default",
        ),
    ),
    **table(frozen("a grid of coordinates"), "meshgrid.indexing", "meshgrid.default"),
}
