"""Operators that make tensors from sizes: constants, ranges, random values."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.axes.infer import Atoms, Operator, Resizer, Typer, Value, Zeros
from graphopt.dialects.aten.common import opaque, operands, table
from graphopt.graph import Call

aten = torch.ops.aten


def _uniform(t: Typer, call: Call) -> Value:
    """Type a tensor of equal (or equally distributed) entries: a static axis follows whatever it meets."""
    spec = call.out
    return tuple(
        t.fixed(n, "a dynamic size") if dynamic else t.fresh(n)
        for n, dynamic in zip(spec.shape, spec.dynamic, strict=True)
    )


def _resize_uniform(r: Resizer, call: Call) -> None:
    call["size"] = r.entries(call, call["size"], r.axes(call.node))


def _zeros_everywhere(z: Zeros, call: Call) -> Atoms:
    return z.atoms(call.node)


def _ordered(t: Typer, call: Call) -> Value:
    """Type a tensor whose entries differ by position: every axis is frozen."""
    why = "its entries are numbered"
    for node in operands(call):
        for axis in t[node]:
            t.freeze(axis, why)
    return opaque(t, call, why)


def _mesh(t: Typer, call: Call) -> Value:
    for node in call["tensors"]:
        for axis in t[node]:
            t.freeze(axis, "a grid of coordinates")
    return opaque(t, call, "a grid of coordinates")


_UNIFORM = Operator(_uniform, None, _resize_uniform)
_NULL = Operator(_uniform, _zeros_everywhere, _resize_uniform)

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
        Operator(_ordered),
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
    **table(Operator(_mesh), "meshgrid.indexing", "meshgrid.default"),
}
