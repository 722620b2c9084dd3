"""Make ONNX models from text for the tests of passes: a body in ONNX's own notation, and weights by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from graphopt.capture import capture
from graphopt.graph import Graph
from graphopt.pipeline import Pass
from graphopt.testing import Trial, try_pass


def parsed(head: str, body: str, weights: Mapping[str, Any] | None = None, *, opset: int = 20) -> onnx.ModelProto:
    """Return the model ``head { body }``, ``head`` being ``(float[N,3] x) => (float[N,3] y)``.

    ``weights`` gives each initializer's shape, filled with random numbers, or its values; they are double where the
    head says that of an input.
    """
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\ng {head} {{ {body} }}')
    random = np.random.default_rng(0)
    real: Any = np.float64 if "double[" in head else np.float32
    for name, given in (weights or {}).items():
        values = random.standard_normal(given) if isinstance(given, tuple) else np.asarray(given)
        values = values.astype(real) if values.dtype.kind == "f" else values
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def graph_of(head: str, body: str, weights: Mapping[str, Any] | None = None, *, opset: int = 20) -> Graph:
    """Return the model as a graph."""
    return capture(parsed(head, body, weights, opset=opset))


def trial(each: Pass, head: str, body: str, weights: Mapping[str, Any] | None = None, *, opset: int = 20) -> Trial:
    """Run a pass on the model."""
    return try_pass(each, graph_of(head, body, weights, opset=opset))


def calls(graph: Graph) -> list[str]:
    """Return the operators, in order."""
    return [
        str(n.target).removeprefix("onnx.") for n in graph.nodes if n.op == "call_function" and "." in str(n.target)
    ]
