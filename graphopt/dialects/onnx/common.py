"""What the families of the ONNX dialect share: entries of several operators, and constants among the operands."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from graphopt.axes.infer import Axes, Operator, Typer, Value
from graphopt.dialects.common import specs_of
from graphopt.dialects.onnx.operators import MICROSOFT
from graphopt.graph import SPEC, Call, TensorSpec, find_attribute, spec_of

BY_DATA: Final = "a size depends on data"
"""Why axes are frozen where an operand that is usually a list of sizes is a tensor."""


def table(operator: Operator, *keys: str) -> dict[str, Operator]:
    """Return entries that give all these operators one meaning."""
    return dict.fromkeys(keys, operator)


def microsoft(operator: Operator, *names: str) -> dict[str, Operator]:
    """Return entries for operators that ONNX Runtime adds."""
    return {f"{MICROSOFT}.{name}": operator for name in names}


def constant(value: Any) -> torch.Tensor | None:
    """Return the values of an operand that is a tensor of the file and no parameter, where they are in memory."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    module = value.graph.owning_module
    found = find_attribute(module, str(value.target)) if module is not None else None
    if not isinstance(found, torch.Tensor) or isinstance(found, torch.nn.Parameter) or found.is_meta:
        return None
    return found


def is_zero(value: Any) -> bool:
    """Say whether an operand is a constant of zeros."""
    found = constant(value)
    return found is not None and found.numel() <= MOST_LOOKED_AT and not bool(found.any())


def is_positive(value: Any) -> bool:
    """Say whether an operand is a constant of positive numbers."""
    found = constant(value)
    return found is not None and found.numel() <= MOST_LOOKED_AT and bool((found > 0).all())


MOST_LOOKED_AT: Final = 4096
"""How many entries a constant may have whose values are looked at."""


def is_given(value: Any) -> bool:
    """Say whether a list of sizes is known as numbers, not as a tensor."""
    return not isinstance(value, fx.Node)


def rank_of(value: Any) -> int:
    """Return the number of dimensions of a tensor operand."""
    spec = value.meta[SPEC]
    assert isinstance(spec, TensorSpec)
    return len(spec.shape)


def results(call: Call, *axes: Axes) -> Value:
    """Return the axes of the first result where the call yields one tensor, those of as many as it yields otherwise."""
    return list(axes[: len(specs_of(call))]) if isinstance(spec_of(call.node), tuple) else axes[0]


def vector(t: Typer, value: Any, axis: Any) -> None:
    """Tie a vector of one entry an index with an axis; a single entry serves all of them."""
    if isinstance(value, fx.Node) and t[value] and t[value][0].size == axis.size:
        t.unify(t[value][0], axis)
