"""Fall back on PyTorch's own ONNX exporter for graphs with an operator that has no translation here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from graphopt.errors import LoweringError
from graphopt.graph import FIXED, SPEC, Graph, TensorSpec
from graphopt.targets.base import require
from graphopt.targets.lowering import names
from graphopt.targets.lowering.emitter import OPSET
from graphopt.targets.lowering.fold import fold_constants
from graphopt.targets.lowering.translate import Translated, set_properties
from graphopt.targets.program import quiet, to_program

if TYPE_CHECKING:
    import onnx

aten = torch.ops.aten

ADVICE: Final = (
    "write the operator in terms of others in the model's code, keep it out of the exported part, or use the target "
    "'torch', which takes every operator"
)


def export(graph: Graph, reason: str) -> Translated:
    """Export ``graph`` with ``torch.onnx``.

    Args:
        graph: is not changed.
        reason: why it was not translated, naming node and operator.

    Raises:
        LoweringError: if it cannot be exported either; says ``reason``.
        MissingDependencyError: if ``onnxscript``, which the exporter needs, is not installed.
    """
    require("onnxscript", extra="onnx", purpose="exporting operators that graphopt does not translate itself")
    ready = graph.clone()
    fold_constants(ready)
    for node in ready.nodes:
        # The exporter lays tensors out anew, so that a view may not be one any more.
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    ready.module.recompile()
    try:
        program = to_program(ready)
        with quiet():
            exported = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False, opset_version=OPSET)
        assert exported is not None
        model = exported.model_proto
    except Exception as error:  # the exporter raises whatever its functions raise
        raise LoweringError(
            f"{reason}; PyTorch's exporter failed, too ({_innermost(error)}). To get an ONNX file, {ADVICE}"
        ) from error
    note = f"{reason}: the file was made by torch.onnx instead"
    return _split(graph, model, note)


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first[:200]}"


def _split(graph: Graph, model: onnx.ModelProto, note: str) -> Translated:
    """Separate the weights, and give inputs and outputs the names that a translation would."""
    from onnx import numpy_helper

    nodes = names.placeholders(graph)
    tensors = [i for i, n in enumerate(nodes) if isinstance(n.meta.get(SPEC), TensorSpec) and FIXED not in n.meta]
    chosen = names.unique(names.input_names(graph))
    results = _flat(graph.module.graph.output_node().args[0])
    kept = [i for i, result in enumerate(results) if isinstance(result, torch.fx.Node)]
    if len(model.graph.input) != len(tensors) or len(model.graph.output) != len(kept):
        raise LoweringError(
            f"torch.onnx made {len(model.graph.input)} inputs of {len(tensors)} and "
            f"{len(model.graph.output)} outputs of {len(kept)}: {note}. To get an ONNX file, {ADVICE}"
        )
    inputs = {i: chosen[i] for i in tensors}
    wanted = names.unique(names.output_names(graph, len(results)), list(inputs.values()))
    outputs = {i: wanted[i] for i in kept}
    _rename(model, dict(zip((v.name for v in model.graph.input), inputs.values(), strict=True)))
    _rename(model, dict(zip((v.name for v in model.graph.output), outputs.values(), strict=True)))
    weights = {}
    for proto in model.graph.initializer:
        array = numpy_helper.to_array(proto)
        weights[proto.name] = torch.from_numpy(array.copy()) if array.ndim else torch.tensor(array[()])
    del model.graph.initializer[:]
    set_properties(model)
    return Translated(model, weights, inputs, outputs, [note])


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in _flat(each)]
    return [value]


def _rename(model: onnx.ModelProto, new: dict[str, str]) -> None:
    """Rename values; whatever has a wanted name already makes way."""
    new = {old: name for old, name in new.items() if old != name}
    present = {value.name for value in (*model.graph.input, *model.graph.value_info, *model.graph.initializer)}
    present |= {name for node in model.graph.node for name in node.output}
    for name in new.values():
        if name in present and name not in new:
            aside = name
            while aside in present or aside in new.values():
                aside += "_"
            new[name] = aside
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        value.name = new.get(value.name, value.name)
    for node in _nodes(model.graph):
        for place in (node.input, node.output):
            for i, name in enumerate(place):
                place[i] = new.get(name, name)


def _nodes(graph: onnx.GraphProto) -> list[Any]:
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                found += _nodes(body)
    return found
