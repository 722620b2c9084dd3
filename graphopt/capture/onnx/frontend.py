"""Read an ONNX model: from a file, a ``ModelProto``, or a graph of onnx-graphsurgeon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.graph import _PyTreeInfo
from torch.utils import _pytree as pytree

from graphopt.capture.onnx import inputs as examples
from graphopt.capture.onnx.apart import take_apart
from graphopt.capture.onnx.build import Builder
from graphopt.capture.onnx.files import OnnxFile, load
from graphopt.capture.onnx.inputs import Input
from graphopt.capture.onnx.operands import FAILURES, MisfitError
from graphopt.capture.onnx.values import Stored
from graphopt.dialects.onnx.facts import ONNX, Facts
from graphopt.dialects.onnx.surgeon import graphsurgeon, quiet
from graphopt.dialects.onnx.types import TORCH_TYPE
from graphopt.errors import CaptureError, UnsupportedOperatorError
from graphopt.graph import Graph, TraceCodeGen, without_collection

if TYPE_CHECKING:
    import onnx

__all__ = ["is_onnx", "read"]


def is_onnx(model: Any) -> bool:
    """Say whether a model is one of ONNX, without importing ONNX."""
    if isinstance(model, str | Path):
        return Path(model).suffix.lower() == ".onnx"
    return type(model).__name__ in ("ModelProto", "Graph") and type(model).__module__.partition(".")[0] in (
        "onnx",
        "onnx_graphsurgeon",
    )


@without_collection()
def read(model: Any, example_inputs: Any = None, dynamic: str | Mapping[str, Any] | None = "batch") -> Graph:
    """Read an ONNX model into a graph of ONNX operators; it is not changed.

    Which dimensions vary is what the file says: those that have no number there. Their sizes in the graph are those of
    the example inputs; without any, a batch of two, images of 224 × 224, 16 steps of anything else.

    Args:
        model: the path of an ``.onnx`` file, an ``onnx.ModelProto``, or an ``onnx_graphsurgeon.Graph``.
        example_inputs: tensors in the order of the model's inputs, or by their names. Not needed for most models.
        dynamic: None where nothing varies from call to call whatever the file says.

    Raises:
        CaptureError: it is no model that can be read; the message says what to do.
        UnsupportedOperatorError: an operator is not known.
        MissingDependencyError: onnx or onnx-graphsurgeon is not installed.
    """
    gs = graphsurgeon()
    with quiet():
        reader = _Reader(load(gs.export_onnx(model) if isinstance(model, gs.Graph) else model))
    if example_inputs is not None:
        return reader.graph(examples.given(reader.inputs, example_inputs), vary=dynamic is not None)
    failure: MisfitError | None = None
    for tensors in examples.invented(reader.inputs):
        try:
            return reader.graph(tensors, vary=dynamic is not None)
        except MisfitError as error:
            failure = failure or error
    raise CaptureError(
        f"{reader.where}: {failure}. The inputs are {', '.join(map(str, reader.inputs))}: pass example_inputs that fit"
    )


@dataclass
class _Reader:
    file: OnnxFile

    def __post_init__(self) -> None:
        self.where = str(self.file.path or "the ONNX model")
        self.model = graphsurgeon().import_onnx(self.file.model)
        self.metadata = {
            node.output[0]: {entry.key: entry.value for entry in node.metadata_props}
            for node in self.file.model.graph.node
            if node.metadata_props and node.output
        }
        self.inputs = [self._input(value) for value in self.file.model.graph.input]

    def _input(self, value: onnx.ValueInfoProto) -> Input:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or kind.elem_type not in TORCH_TYPE or not kind.HasField("shape"):
            raise CaptureError(
                f"{self.where}: input {value.name} must be a tensor of numbers with a known number of dimensions"
            )
        dims = tuple(
            int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim
        )
        return Input(value.name, TORCH_TYPE[kind.elem_type], dims, self._classes(value.name))

    def _classes(self, name: str) -> int | None:
        """Return how many rows the smallest table has in which an input's entries are looked up."""
        protos = {t.name: t for t in self.file.model.graph.initializer}
        rows = [
            protos[node.input[0]].dims[0]
            for node in self.file.model.graph.node
            if node.op_type == "Gather"
            and len(node.input) > 1
            and node.input[1] == name
            and node.input[0] in protos
            and protos[node.input[0]].dims
        ]
        return min(rows, default=None)

    def graph(self, tensors: Sequence[torch.Tensor], *, vary: bool) -> Graph:
        """Build the graph for these example inputs; with dimensions that vary, as far as the model runs at other sizes.

        Raises:
            MisfitError: it does not run at the sizes of these inputs.
        """
        notes = list(self.file.notes)
        try:
            builder = self._varying(tensors) if vary else self._built(tensors, None)
        except MisfitError as error:
            if not error.probe:
                raise
            varying = [f"{d} of {each.name}" for each in self.inputs for d in each.varying]
            notes.append(
                f"the file says that dimensions may vary ({', '.join(varying)}), and does not run at other sizes than "
                f"{[list(t.shape) for t in tensors]}: {error}"
            )
            builder = self._built(tensors, None)
        return self._finished(builder, tensors, notes)

    def _varying(self, tensors: Sequence[torch.Tensor]) -> Builder:
        """Build with dimensions that vary: each by itself, or all alike where the model wants it so."""
        try:
            return self._built(tensors, examples.probes(self.inputs, tensors, apart=True), apart=True)
        except MisfitError as error:
            if not error.probe:
                raise
            return self._built(tensors, examples.probes(self.inputs, tensors, apart=False))

    def _built(
        self, tensors: Sequence[torch.Tensor], probes: Sequence[tuple[int, ...]] | None, *, apart: bool = False
    ) -> Builder:
        builder = Builder(self._stored, self.metadata, apart=apart)
        for position, (each, tensor) in enumerate(zip(self.inputs, tensors, strict=True)):
            shape = tuple(tensor.shape) if probes is None else probes[position]
            builder.input(each.name, tensor, shape, () if probes is None else each.varying)
        try:
            for node in self.model.nodes:
                self._add(builder, node)
            outputs = tuple(builder.value(each).node for each in self.model.outputs)
        except (CaptureError, UnsupportedOperatorError) as error:
            raise type(error)(f"{self.where}: {error}") from error
        builder.graph.output(outputs)
        return builder

    def _add(self, builder: Builder, node: Any) -> None:
        try:
            builder.add(node)
        except FAILURES as error:
            found = " ".join(f"{type(error).__name__}: {error}".split())
            raise CaptureError(
                f"node {node.name!r} ({node.op}) cannot be read ({found}): its attributes or operands are not those of "
                "the operator; export the model again, or report it if it runs elsewhere"
            ) from error

    def _stored(self, constant: Any) -> Stored:
        lazy = constant._values
        proto = getattr(lazy, "tensor", None)
        if proto is None:  # an array, of a graph that was made in Python
            tensor = torch.from_numpy(constant.values)
            return Stored(constant.name, tuple(tensor.shape), tensor.dtype, lambda: tensor)
        if proto.data_type not in TORCH_TYPE:
            raise UnsupportedOperatorError(
                f"the tensor {constant.name} has a type that torch has not (number {proto.data_type} of TensorProto)"
            )
        return Stored(constant.name, tuple(proto.dims), TORCH_TYPE[proto.data_type], lambda: self.file.tensor(proto))

    def _finished(self, builder: Builder, tensors: Sequence[torch.Tensor], notes: list[str]) -> Graph:
        module = builder.module
        _remove_unread(builder)
        builder.parameters()
        names = [node.name for node in module.graph.find_nodes(op="placeholder")]
        in_spec = pytree.tree_structure((tuple(tensors), {}))
        count = len(self.model.outputs)
        out_spec = pytree.tree_structure((0,) * count if count > 1 else 0)
        module.graph.set_codegen(TraceCodeGen(_PyTreeInfo(names, in_spec, out_spec)))
        type(module).__name__ = "OnnxModel"
        module.train(False)
        module.recompile()
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = (tuple(tensors), {})
        facts = Facts.of(self.file.model, builder.names)
        module.meta.update({"example_inputs": inputs, "notes": list(notes), "training": False, ONNX: facts})
        graph = Graph(module, inputs, {}, notes)
        take_apart(graph)
        return graph


def _remove_unread(builder: Builder) -> None:
    """Take out what no result needs; an input stays."""
    for node in reversed(builder.graph.nodes):
        if not node.users and node.op in ("call_function", "get_attr"):
            builder.graph.erase_node(node)
