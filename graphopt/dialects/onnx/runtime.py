"""Run graphs of the ONNX dialect in ONNX Runtime, in the model's own precision and without its graph optimizations.

What may live here: making a session of a graph, and feeding it. Where ONNX Runtime is not installed, has no kernel, or
the weights exceed what one message holds, the graph's own interpreter serves: :func:`outputs` returns None.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from graphopt.dialects.onnx.facts import facts_of
from graphopt.dialects.onnx.write import to_proto
from graphopt.errors import LoweringError
from graphopt.graph import Graph

__all__ = ["available", "outputs", "session"]

LIMIT: Final = 1 << 30
"""Bytes of weights above which a graph is interpreted instead: a session would hold them a second and a third time."""


def available() -> bool:
    """Say whether ONNX Runtime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def outputs(graph: Graph, inputs: Sequence[Any]) -> list[torch.Tensor] | None:
    """Run a graph on its flattened inputs and return its results; None where ONNX Runtime cannot."""
    if not available() or graph.hollow:
        return None
    if any(isinstance(value, torch.Tensor) and value.dtype not in _NUMPY for value in inputs):
        return None
    if sum(tensor.numel() * tensor.element_size() for tensor in graph.tensors().values()) > LIMIT:
        return None
    import onnxruntime

    failures = tuple(getattr(onnxruntime.capi.onnxruntime_pybind11_state, name) for name in _FAILURES)
    try:
        held = session(graph)
        feeds = {name: _array(value) for name, value in zip(held.names, inputs, strict=True)}
        found = held.session.run(held.results, feeds)
    except LoweringError:
        return None
    except failures:
        return None
    return [torch.from_numpy(np.array(array)) for array in found]


_NUMPY: Final = frozenset(
    {torch.float16, torch.float32, torch.float64, torch.bool}
    | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)
_FAILURES: Final = ("Fail", "InvalidArgument", "InvalidGraph", "NotImplemented", "RuntimeException")


class _Session:
    def __init__(self, session: Any, names: list[str], results: list[str]) -> None:
        self.session = session
        self.names = names
        self.results = results


def session(graph: Graph) -> Any:
    """Make a session of a graph; its kernels run the operators one by one, as they are written."""
    import onnxruntime

    model = to_proto(graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    facts = facts_of(graph)
    return _Session(made, [each.name for each in facts.inputs], [each.name for each in facts.outputs])


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
