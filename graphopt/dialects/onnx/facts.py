"""Keep what an ONNX file says besides its operators and tensors, so that it can be said again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn

from graphopt.graph import Graph

__all__ = ["ONNX", "Facts", "facts_of", "is_onnx"]

ONNX: Final = "onnx"
"""Key of :class:`Facts` in the ``meta`` of a module; in that of a node, what the file calls it and its results."""


@dataclass(frozen=True)
class Value:
    """An input or a result of the model: its name, and for each dimension a number or the name of what varies."""

    name: str
    dims: tuple[int | str | None, ...] | None
    doc: str = ""


@dataclass(frozen=True)
class Facts:
    """What an ONNX file says of itself.

    Attributes:
        opsets: The version of each operator set, by domain.
        ir_version: The version of the format.
        graph_name: The name of the graph.
        inputs: The model's inputs, in order.
        outputs: The model's results, in order.
        names: What the file calls a tensor, by its name in the graph, where the two differ.
        metadata: The file's own ``metadata_props``.
        producer: Name and version of the program that made it, model version, domain, and description.
    """

    opsets: Mapping[str, int]
    ir_version: int
    graph_name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    producer: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, names: Mapping[str, str]) -> Facts:
        """Read them off a ``ModelProto``."""
        initializers = {each.name for each in model.graph.initializer}
        return cls(
            opsets={_domain(each.domain): each.version for each in model.opset_import},
            ir_version=model.ir_version,
            graph_name=model.graph.name,
            inputs=tuple(_value(each) for each in model.graph.input if each.name not in initializers),
            outputs=tuple(_value(each) for each in model.graph.output),
            names=dict(names),
            metadata={each.key: each.value for each in model.metadata_props},
            producer={
                key: getattr(model, key)
                for key in ("producer_name", "producer_version", "domain", "model_version", "doc_string")
            },
        )

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return self.opsets[""]


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _value(proto: Any) -> Value:
    kind = proto.type.tensor_type
    if not proto.type.HasField("tensor_type") or not kind.HasField("shape"):
        return Value(proto.name, None, proto.doc_string)
    dims = tuple(int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim)
    return Value(proto.name, dims, proto.doc_string)


def is_onnx(model: Graph | nn.Module) -> bool:
    """Say whether a graph, or the module in one, is of the ONNX dialect."""
    module = model.module if isinstance(model, Graph) else model
    return ONNX in getattr(module, "meta", ())


def facts_of(graph: Graph) -> Facts:
    """Return what the file said that a graph of the ONNX dialect was read from."""
    found: Facts = graph.module.meta[ONNX]
    return found
