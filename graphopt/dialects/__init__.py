"""Say, operator by operator, which axis rule applies and how size-bearing arguments follow a pruning.

What may live here: :func:`infer`, which knows every dialect, a package for each of them, and what they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.axes.infer import Operator, Typing
from graphopt.axes.infer import infer as _infer
from graphopt.dialects import aten, onnx
from graphopt.dialects.onnx.facts import is_onnx
from graphopt.graph import Graph

__all__ = ["infer"]


def infer(graph: Graph, extra: Mapping[Any, Operator] | None = None) -> Typing:
    """Infer the axes of every value of a graph, whichever dialect it is in.

    ``extra`` adds or replaces operators, for custom kernels.
    """
    if not is_onnx(graph):
        return aten.infer(graph, extra)
    # Sizes are computed by ATen's operators in an ONNX graph, too.
    return _infer(graph, {**aten.OPERATORS, **onnx.OPERATORS, **(extra or {})})
