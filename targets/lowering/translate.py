"""Walk over a graph and translate every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import FIXED, SPEC, Call, Graph, TensorSpec, get_attribute
from graphopt.targets.lowering import (
    contraction,
    creation,
    elementwise,
    indexing,
    names,
    normalisation,
    reduction,
    shape,
    spatial,
    symbols,
)
from graphopt.targets.lowering.emitter import IR_VERSION, OPSET, Emitter, onnx_type, scalar_type
from graphopt.targets.lowering.fold import fold_constants
from graphopt.targets.lowering.functionalise import functionalise

if TYPE_CHECKING:
    import onnx

_FAMILIES = (elementwise, contraction, normalisation, reduction, shape, indexing, creation, spatial, symbols)


def _merge() -> dict[Any, Callable[[Emitter, Call], Any]]:
    merged: dict[Any, Callable[[Emitter, Call], Any]] = {}
    for family in _FAMILIES:
        for target, translation in family.TRANSLATIONS.items():
            if target in merged:
                raise ValueError(f"{target} has two translations to ONNX; keep the one in {family.__name__}")
            merged[target] = translation
    return merged


TRANSLATIONS: Mapping[Any, Callable[[Emitter, Call], Any]] = _merge()
"""The translation of every operator that has one, by the operator."""


@dataclass
class Translated:
    """A graph in ONNX.

    ``skeleton`` is the model without its weights, and ``weights`` holds those, by the names of initializers.
    ``inputs`` maps the position of a graph input to its name; inputs that are no tensors have none. ``outputs`` does
    so for the flattened outputs; what is no tensor or number known only at run time has none.
    """

    skeleton: onnx.ModelProto
    weights: dict[str, torch.Tensor]
    inputs: dict[int, str]
    outputs: dict[int, str]
    notes: list[str] = field(default_factory=list)


def untranslated(graph: Graph) -> dict[str, str]:
    """Return every operator without a translation, with the name of the first node that calls it."""
    known = {*TRANSLATIONS, *symbols.NUMBERS, *contraction.late_translations()}
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in known:
            found.setdefault(str(node.target), node.name)
        elif node.op in ("call_module", "call_method"):
            found.setdefault(f"{node.op} {node.target}", node.name)
    return found


def translate(graph: Graph) -> Translated:
    """Translate ``graph``, which is not changed.

    Raises:
        UnsupportedOperatorError: if an operator, or the way it is used, has no translation; names it and the node.
    """
    graph = graph.clone()
    graph.module.eval()
    fold_constants(graph)
    notes = functionalise(graph)
    missing = untranslated(graph)
    if missing:
        each = ", ".join(f"{operator} (node {node})" for operator, node in missing.items())
        raise UnsupportedOperatorError(f"no translation to ONNX for {each}")
    emitter = Emitter(graph)
    inputs, described = _inputs(graph, emitter)
    output = graph.module.graph.output_node()
    results = _flat(output.args[0])
    wanted = names.unique(names.output_names(graph, len(results)), list(inputs.values()))
    for name in wanted:
        emitter.reserve(name)
    _translate_nodes(graph, emitter)
    outputs = _name_outputs(emitter, results, wanted, set(inputs.values()))
    skeleton = _assemble(graph, emitter, described, [(outputs[i], results[i]) for i in sorted(outputs)])
    used = {name for node in emitter.nodes for name in node.input} | set(outputs.values())
    weights = {name: tensor for name, tensor in emitter.constants.items() if name in used}
    return Translated(skeleton, weights, inputs, outputs, notes)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in _flat(each)]
    return [value]


def _inputs(graph: Graph, e: Emitter) -> tuple[dict[int, str], list[Any]]:
    from onnx import helper

    nodes = names.placeholders(graph)
    chosen = names.unique(names.input_names(graph))
    tensors = [n for n in nodes if isinstance(n.meta.get(SPEC), TensorSpec) and FIXED not in n.meta]
    firsts = {n.meta[SPEC].shape[0] for n in tensors if n.meta[SPEC].dynamic and n.meta[SPEC].dynamic[0]}
    found: dict[int, str] = {}
    described = []
    for position, (node, name) in enumerate(zip(nodes, chosen, strict=True)):
        if node not in tensors:
            e.values[node] = node.meta.get(FIXED, node.meta.get(SPEC))
            continue
        spec = node.meta[SPEC]
        found[position] = e.values[node] = e.reserve(name)
        sizes: list[int | str] = list(spec.shape)
        for dim, dynamic in enumerate(spec.dynamic):
            if dynamic:
                sizes[dim] = "batch" if dim == 0 and len(firsts) == 1 else f"{name}_{dim}"
        described.append(helper.make_tensor_value_info(name, onnx_type(spec.dtype), sizes))
    return found, described


def _translate_nodes(graph: Graph, e: Emitter) -> None:
    table = {**TRANSLATIONS, **contraction.late_translations()}
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_function"):
            continue
        e.begin(node)
        try:
            if node.op == "get_attr":
                e.values[node] = _weight(graph, e, node)
            elif node.target in symbols.NUMBERS:
                e.values[node] = symbols.NUMBERS[node.target](e, node)
            else:
                e.values[node] = table[node.target](e, Call(node))
        except UnsupportedOperatorError as error:
            raise UnsupportedOperatorError(
                f"node {node.name} ({node.target}) has no translation to ONNX: {error}"
            ) from error


def _weight(graph: Graph, e: Emitter, node: fx.Node) -> str:
    value = get_attribute(graph.module, str(node.target))
    if not isinstance(value, torch.Tensor):
        raise UnsupportedOperatorError("the body of a higher-order operator")
    return e.weight(value, str(node.target))


def _name_outputs(e: Emitter, results: list[Any], wanted: list[str], inputs: set[str]) -> dict[int, str]:
    """Give the outputs their names, and return those by position; drops calls that nothing reads."""
    from onnx import helper

    renamed: dict[str, str] = {}
    found: dict[int, str] = {}
    copies = []
    for position, (result, name) in enumerate(zip(results, wanted, strict=True)):
        value = e.values[result] if isinstance(result, fx.Node) else None
        if not isinstance(value, str):
            continue
        e.begin(result)
        if not isinstance(result.meta.get(SPEC), TensorSpec):
            value = e("Squeeze", value)
        if value in e.constants or value in inputs or value in renamed:
            copies.append(helper.make_node("Identity", [renamed.get(value, value)], [name], name=f"{name}/Identity"))
        else:
            renamed[value] = name
        found[position] = name
    needed = set(found.values()) | set(renamed) | {name for node in copies for name in node.input}
    kept = []
    for node in reversed(e.nodes):
        if any(name in needed for name in node.output):
            needed.update(node.input)
            kept.append(node)
    for node in kept:
        for place in (node.input, node.output):
            for i, name in enumerate(place):
                if name in renamed:
                    place[i] = renamed[name]
    e.nodes = [*reversed(kept), *copies]
    for node_, value in e.values.items():
        if isinstance(value, str) and value in renamed:
            e.values[node_] = renamed[value]
    return found


def _assemble(graph: Graph, e: Emitter, inputs: list[Any], outputs: list[tuple[str, fx.Node]]) -> onnx.ModelProto:
    from onnx import helper

    produced = {name for node in e.nodes for name in node.output}
    final = {name for name, _ in outputs}
    known = {}
    for node, value in e.values.items():
        if isinstance(value, str) and value in produced and value not in final:
            known[value] = _described(value, node, number=[1])
    body = helper.make_graph(
        e.nodes,
        type(graph.module).__name__,
        inputs,
        [_described(name, node, number=[]) for name, node in outputs],
        value_info=list(known.values()),
    )
    model = helper.make_model(
        body,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="graphopt",
        producer_version=_version(),
    )
    set_properties(model)
    return model


def set_properties(model: onnx.ModelProto) -> None:
    """Say in the file which version of graphopt wrote it."""
    from onnx import helper

    helper.set_model_props(model, {"graphopt.version": _version()})


def _described(name: str, node: fx.Node, *, number: list[int]) -> Any:
    """Describe a value; ``number`` is the shape in which a symbolic number stands here."""
    from onnx import helper

    spec = node.meta.get(SPEC)
    if not isinstance(spec, TensorSpec):
        return helper.make_tensor_value_info(name, onnx_type(scalar_type(spec)), number)
    sizes = [None if dynamic else size for size, dynamic in zip(spec.shape, spec.dynamic, strict=True)]
    return helper.make_tensor_value_info(name, onnx_type(spec.dtype), sizes)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("graphopt")
    except PackageNotFoundError:
        return "unknown"
