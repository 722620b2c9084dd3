"""Write a graph of the ONNX dialect as a model: operators and names as the file had them, sizes as tensors again.

What may live here: the way from ``torch.fx`` back to onnx-graphsurgeon. Nothing here changes what a graph computes.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from graphopt.dialects.onnx.facts import ONNX, facts_of
from graphopt.dialects.onnx.operators import DOMAIN, NUMBERS, SIZES, Op
from graphopt.dialects.onnx.surgeon import graphsurgeon, quiet
from graphopt.dialects.onnx.types import ONNX_TYPE, Filling
from graphopt.errors import LoweringError
from graphopt.graph import SPEC, Call, Graph, TensorSpec, tensor_spec

if TYPE_CHECKING:
    import onnx

__all__ = ["Written", "to_graphsurgeon", "to_proto", "write"]

COMMON_IR_VERSION: Final = 10
"""The version of the format that any runtime in use reads, and that has all types of tensors written here."""

SYM_SIZE: Final = torch.ops.aten.sym_size.int

_ARITHMETIC: Final[dict[Any, str]] = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.mod: "Mod",
    operator.neg: "Neg",
    builtins.max: "Max",
    builtins.min: "Min",
}
_ROUNDING: Final[dict[Any, str | None]] = {math.floor: "Floor", math.ceil: "Ceil", int: None}

_REAL_SIZES: Final = frozenset({("Resize", "roi"), ("Resize", "scales"), ("Upsample", "scales")})
"""Lists that hold real numbers."""
_WHOLE: Final = frozenset({"Split", "BatchNormalization"})
"""Operators whose results are all named, read or not; in training mode ONNX Runtime writes to those of a batch norm."""
_ONE_ENTRY: Final = frozenset({("TopK", "K")})
"""Single numbers that stand in a tensor of one dimension."""


@dataclass(frozen=True)
class Written:
    """A graph as an ONNX model.

    ``skeleton`` is the model without its weights, and ``weights`` holds those, by the names of initializers, in the
    order of first use. ``inputs`` and ``outputs`` are the names by position.
    """

    skeleton: onnx.ModelProto
    weights: dict[str, torch.Tensor]
    inputs: dict[int, str]
    outputs: dict[int, str]
    notes: list[str] = field(default_factory=list)


def write(graph: Graph, *, metadata: Mapping[str, str] | None = None) -> Written:
    """Write ``graph``, which is not changed; the same graph gives the same model.

    Args:
        graph: a graph of the ONNX dialect.
        metadata: entries to add to the model's ``metadata_props``.

    Raises:
        LoweringError: the operator sets that the file declares do not have what the graph holds.
    """
    with quiet():
        writer = _Writer(graph)
        skeleton = writer.gs.export_onnx(writer.graphsurgeon(), do_type_check=False)
    facts = facts_of(graph)
    for key, value in facts.producer.items():
        setattr(skeleton, key, value)
    skeleton.ir_version = _ir_version(facts.ir_version, skeleton)
    entries = {**facts.metadata, **(metadata or {})}
    for key in sorted(entries):
        skeleton.metadata_props.add(key=key, value=entries[key])
    inputs = {i: value.name for i, value in enumerate(facts.inputs)}
    outputs = {i: value.name for i, value in enumerate(facts.outputs)}
    return Written(skeleton, writer.weights, inputs, outputs, [])


def _ir_version(declared: int, model: onnx.ModelProto) -> int:
    """Return the version of the format to write: the file's, or a lower one where the operator sets allow it.

    Programs that write ONNX declare the newest version that they know, which runtimes refuse that are a little older,
    whatever is in the file.
    """
    import onnx.helper

    needed = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    return min(declared, max(needed, COMMON_IR_VERSION))


def to_proto(graph: Graph, *, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """Return the graph as one ``ModelProto`` that holds its weights."""
    import onnx

    written = write(graph, metadata=metadata)
    for name, tensor in written.weights.items():
        proto = onnx.TensorProto(name=name, data_type=ONNX_TYPE[tensor.dtype], dims=list(tensor.shape))
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        proto.raw_data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        written.skeleton.graph.initializer.append(proto)
    return written.skeleton


def to_graphsurgeon(graph: Graph) -> Any:
    """Return the graph as an ``onnx_graphsurgeon.Graph``, with its weights."""
    writer = _Writer(graph)
    held = writer.graphsurgeon()
    for name, tensor in writer.weights.items():
        writer.variables[name].to_constant(tensor.detach().cpu().numpy())
    return held


class _Writer:
    def __init__(self, graph: Graph) -> None:
        self.gs = graphsurgeon("writing an ONNX model")
        self.graph = graph
        self.facts = facts_of(graph)
        self.weights: dict[str, torch.Tensor] = {}
        self.nodes: list[Any] = []
        self.variables: dict[str, Any] = {}
        self.values: dict[fx.Node, Any] = {}
        self.held: dict[str, Any] = {}
        self.names: set[str] = {""}
        self.node_names: set[str] = {""}
        self.constants: dict[tuple[torch.dtype, tuple[int, ...], tuple[Any, ...]], Any] = {}
        self.numbers: dict[fx.Node, Any] = {}
        self.shapes: dict[Any, Any] = {}

    def graphsurgeon(self) -> Any:
        outputs = self._outputs()
        inputs = []
        placeholders = self.graph.module.graph.find_nodes(op="placeholder")
        for node, declared in zip(placeholders, self.facts.inputs, strict=True):
            self.values[node] = self._declared(declared, tensor_spec(node))
            inputs.append(self.values[node])
        for value in self.facts.outputs:
            self.names.add(value.name)
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self.values[node] = self._weight(node)
            elif node.op == "call_function":
                self._call(node, outputs)
        results = [self._result(node, position, outputs) for position, node in enumerate(self._returned())]
        return self.gs.Graph(
            nodes=self.nodes,
            inputs=inputs,
            outputs=results,
            name=self.facts.graph_name,
            opset=self.facts.opset,
            import_domains=self._domains(),
            producer_name=str(self.facts.producer.get("producer_name", "")),
            producer_version=str(self.facts.producer.get("producer_version", "")),
            ir_version=self.facts.ir_version,
        )

    def _domains(self) -> list[Any]:
        import onnx.helper

        used = {node.domain or "" for node in self.nodes}
        opsets = {**dict.fromkeys(sorted(used), 1), **self.facts.opsets}
        return [onnx.helper.make_opsetid(domain, version) for domain, version in sorted(opsets.items())]

    def _returned(self) -> list[fx.Node]:
        returned = self.graph.module.graph.output_node().args[0]
        return list(returned) if isinstance(returned, list | tuple) else [returned]  # type: ignore[list-item, arg-type]

    def _outputs(self) -> dict[fx.Node, str]:
        """Return the nodes whose result takes the name of one of the model's.

        An input or a tensor of the model that is a result, and a second result that is the same, get an Identity.
        """
        found: dict[fx.Node, str] = {}
        for node, value in zip(self._returned(), self.facts.outputs, strict=True):
            if node.op == "call_function":
                found.setdefault(node, value.name)
        return found

    def _declared(self, value: Any, spec: TensorSpec) -> Any:
        self.names.add(value.name)
        dims = None if value.dims is None else [d if d is not None else "" for d in value.dims]
        made = self.gs.Variable(value.name, dtype=ONNX_TYPE[spec.dtype], shape=dims)
        self.variables[value.name] = made
        return made

    def _result(self, node: fx.Node, position: int, outputs: Mapping[fx.Node, str]) -> Any:
        declared = self.facts.outputs[position]
        spec = tensor_spec(node)
        if outputs.get(node) == declared.name:
            value = self.values[node]
        else:
            value = self._declared(declared, spec)
            self._node("Identity", [self.values[node]], [value], name=f"{declared.name}_identity")
        value.dtype = ONNX_TYPE[spec.dtype]
        value.shape = self._dims(declared, spec)
        return value

    def _dims(self, declared: Any, spec: TensorSpec) -> list[Any]:
        names = declared.dims
        if names is None or len(names) != len(spec.shape):  # the checker of onnx wants a shape of every output
            names = (None,) * len(spec.shape)
        dims = zip(names, spec.shape, spec.dynamic, strict=True)
        return [name if varies and isinstance(name, str) else "" if varies else n for name, n, varies in dims]

    # -- tensors --

    def _fresh(self, name: str) -> str:
        wanted, count = name, 0
        while wanted in self.names:
            count += 1
            wanted = f"{name}_{count}"
        self.names.add(wanted)
        return wanted

    def _weight(self, node: fx.Node) -> Any:
        path = self.graph.aliases.get(str(node.target), str(node.target))
        if path not in self.held:
            name = self._fresh(self.facts.names.get(path, path))
            self.weights[name] = self.graph.tensor(path).detach()
            self.held[path] = self.variables[name] = self.gs.Variable(name)
        return self.held[path]

    def constant(self, entries: Sequence[Any], dtype: torch.dtype, *, scalar: bool = False) -> Any:
        """Return a tensor of numbers; the same one for the same numbers."""
        shape = () if scalar else (len(entries),)
        key = (dtype, shape, tuple(map(_distinct, entries)))
        found = self.constants.get(key)
        if found is None:
            name = self._fresh(f"constant_{len(self.constants)}")
            self.weights[name] = torch.tensor(entries, dtype=dtype).reshape(shape)
            found = self.variables[name] = self.constants[key] = self.gs.Variable(name)
        return found

    # -- nodes --

    def _node(self, name_of_op: str, inputs: list[Any], outputs: list[Any], *, name: str, **attributes: Any) -> None:
        self.nodes.append(self.gs.Node(name_of_op, self._node_name(name), attributes, inputs, outputs))

    def _node_name(self, name: str) -> str:
        wanted, count = name, 0
        while wanted in self.node_names:
            count += 1
            wanted = f"{name}_{count}"
        self.node_names.add(wanted)
        return wanted

    def _helper(self, operation: str, *inputs: Any, stem: str, **attributes: Any) -> Any:
        """Add a node that computes with sizes and return its result."""
        result = self.gs.Variable(self._fresh(f"{stem}_{operation.lower()}"))
        self._node(operation, list(inputs), [result], name=result.name, **attributes)
        return result

    def _call(self, node: fx.Node, outputs: Mapping[fx.Node, str]) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            self.values[node] = self.values[source][index]  # type: ignore[index]
            if node in outputs:
                self.values[node].name = outputs[node]
            return
        if not isinstance(node.target, Op):
            if node.target is SYM_SIZE or node.target in _ARITHMETIC or node.target in _NUMBERS:
                return  # made when it is needed
            raise LoweringError(f"{node.name} calls {node.target}, which is no operator of ONNX")
        target: Op = node.target
        schema = _schema(target, self.facts.opsets.get(target.domain, 1), node)
        inputs, attributes = self._arguments(node, target, schema)
        name, names = node.meta.get(ONNX, ("", ()))
        results = self._results(node, names, outputs)
        held = self.gs.Node(
            target.name,
            self._node_name(name or node.name),
            attributes,
            inputs,
            results if isinstance(results, list) else [results],
            domain=target.domain or None,
        )
        self.nodes.append(held)
        self.values[node] = results

    def _results(self, node: fx.Node, names: Sequence[str], outputs: Mapping[fx.Node, str]) -> Any:
        spec = node.meta[SPEC]
        if not isinstance(spec, tuple):
            if node in outputs:
                return self.gs.Variable(outputs[node])
            return self.gs.Variable(self._fresh(names[0] if len(names) == 1 else node.name))
        used = {user.args[1] for user in node.users if user.target is operator.getitem}
        known = list(names) + [f"{node.name}_{i}" for i in range(len(names), len(spec))]
        all_named = isinstance(node.target, Op) and node.target.key in _WHOLE
        return [
            self.gs.Variable(self._fresh(known[i])) if all_named or i in used else self.gs.Variable.empty()
            for i in range(len(spec))
        ]

    def _arguments(self, node: fx.Node, target: Op, schema: Any) -> tuple[list[Any], dict[str, Any]]:
        call = Call(node)
        inputs: list[Any] = []
        attributes: dict[str, Any] = {}
        for parameter in target.schema.arguments:
            name = parameter.name
            value = call[name]
            if parameter.kind == "attribute":
                if name in node.kwargs and name != "outputs":
                    self._attribute(attributes, node, schema, name, value)
            elif parameter.kind == "variadic":
                inputs += [self.values[each] for each in value or ()]
            elif schema is not None and name in schema.attributes and value is not None:
                attributes[name] = self._as_attribute(node, value)
            else:
                inputs.append(self.gs.Variable.empty() if value is None else self._operand(node, target, name, value))
        while inputs and inputs[-1].is_empty():
            inputs.pop()
        return inputs, attributes

    def _attribute(self, attributes: dict[str, Any], node: fx.Node, schema: Any, name: str, value: Any) -> None:
        if schema is not None and name not in schema.attributes:
            if name == "num_outputs" and node.target.key == "Split":  # type: ignore[union-attr]
                return
            raise LoweringError(
                f"{node.name} ({node.target}) needs the attribute {name!r}, which the operator does not have in opset "
                f"{self.facts.opset}: convert the file to a newer opset first"
            )
        if value is None:
            return
        if isinstance(value, Filling):
            import onnx.helper
            from onnx_graphsurgeon.ir.tensor import LazyValues

            numbers: Any = [value.number]
            value = onnx.helper.make_tensor(name, value.type, [1], numbers)
            value = self.gs.Constant(name, LazyValues(value))
        elif isinstance(value, list | tuple):
            if not value:
                return
            value = list(value)
        elif schema is not None and schema.attributes[name].type == schema.attributes[name].type.FLOAT:
            value = float(value)
        if name == "num_outputs" and node.args[1:] and node.args[1] is not None:
            return  # the sizes say it
        attributes[name] = value

    def _as_attribute(self, node: fx.Node, value: Any) -> Any:
        entries = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(entry, fx.Node) for entry in entries):
            raise LoweringError(
                f"{node.name} ({node.target}) has sizes that vary, which opset {self.facts.opset} cannot express: "
                "convert the file to a newer opset first"
            )
        return list(value) if isinstance(value, list | tuple) else value

    def _operand(self, node: fx.Node, target: Op, name: str, value: Any) -> Any:
        if isinstance(value, fx.Node) and not isinstance(value.meta.get(SPEC), int | float | bool):
            return self.values[value]
        if isinstance(value, list | tuple) and name in SIZES.get(target.name, ()):
            real = (target.name, name) in _REAL_SIZES
            entries = _short_shape(node, value) if target.name == "Reshape" else value
            return self._sizes(entries, torch.float32 if real else torch.int64, node.name)
        if name in NUMBERS.get(target.name, ()) and target.domain == DOMAIN:
            dtype = _number_type(node, target.name, name)
            scalar = (target.name, name) not in _ONE_ENTRY
            if not isinstance(value, fx.Node):
                return self.constant([value], dtype, scalar=scalar)
            found = self._number(value, node.name)
            if scalar:
                found = self._helper("Squeeze", found, self.constant([0], torch.int64), stem=node.name)
            if dtype is not torch.int64:
                found = self._helper("Cast", found, stem=node.name, to=ONNX_TYPE[dtype])
            return found
        raise LoweringError(f"{node.name} ({node.target}): {value!r} cannot stand as {name}")

    # -- sizes --

    def _sizes(self, entries: Sequence[Any], dtype: torch.dtype, stem: str) -> Any:
        """Return a tensor of sizes, of which some may vary: constants and numbers one after the other."""
        if not any(isinstance(entry, fx.Node) for entry in entries):
            return self.constant(entries, dtype)
        key = (dtype, *entries)
        if key not in self.shapes:
            parts = [self._run(run, stem) for run in _runs(entries, partial=self.facts.opset >= 15)]
            found = parts[0] if len(parts) == 1 else self._helper("Concat", *parts, stem=stem, axis=0)
            self.shapes[key] = (
                found if dtype is torch.int64 else self._helper("Cast", found, stem=stem, to=ONNX_TYPE[dtype])
            )
        return self.shapes[key]

    def _run(self, run: list[Any], stem: str) -> Any:
        """Return neighbouring entries as one tensor: numbers, a size, or sizes of successive dimensions of a value."""
        if not isinstance(run[0], fx.Node):
            return self.constant(run, torch.int64)
        if len(run) == 1:
            return self._number(run[0], stem)
        source, start = _extent_of(run[0])
        key = (source, start, len(run))
        if key not in self.shapes:
            rank = len(tensor_spec(source).shape)
            bounds = {} if len(run) == rank else {"start": start, "end": start + len(run)}
            self.shapes[key] = self._helper("Shape", self.values[source], stem=stem, **bounds)
        return self.shapes[key]

    def _number(self, value: Any, stem: str) -> Any:
        """Return a number as a tensor of one int64 entry."""
        if not isinstance(value, fx.Node):
            return self.constant([value], torch.int64)
        found = self.numbers.get(value)
        if found is None:
            found = self.numbers[value] = self._computed(value, stem)
        return found

    def _computed(self, node: fx.Node, stem: str) -> Any:
        if node.target is SYM_SIZE:
            return self._extent(node.args[0], node.args[1], stem)
        if node.target in _ARITHMETIC:
            return self._helper(_ARITHMETIC[node.target], *(self._number(a, stem) for a in node.args), stem=stem)
        made = _NUMBERS.get(node.target)
        if made is None:
            raise LoweringError(f"{node.name} computes a size with {node.target}, which cannot be written to ONNX")
        return made(self, node, stem)

    def _extent(self, source: Any, dim: Any, stem: str) -> Any:
        rank = len(tensor_spec(source).shape)
        if self.facts.opset >= 15:
            return self._helper("Shape", self.values[source], stem=stem, start=dim % rank, end=dim % rank + 1)
        if source not in self.shapes:
            self.shapes[source] = self._helper("Shape", self.values[source], stem=stem)
        return self._helper("Gather", self.shapes[source], self.constant([dim % rank], torch.int64), stem=stem, axis=0)

    def real(self, value: Any, stem: str) -> Any:
        """Return a number as a tensor of one float64 entry."""
        if isinstance(value, fx.Node):
            if value.target is operator.truediv:
                return self._helper("Div", *(self.real(a, stem) for a in value.args), stem=stem)
            if value.target in _ARITHMETIC and isinstance(value.meta.get(SPEC), float):
                return self._helper(_ARITHMETIC[value.target], *(self.real(a, stem) for a in value.args), stem=stem)
            return self._helper("Cast", self._number(value, stem), stem=stem, to=ONNX_TYPE[torch.float64])
        return self.constant([float(value)], torch.float64)

    def rounded(self, node: fx.Node, stem: str) -> Any:
        """Round a real number to an integer."""
        found = self.real(node.args[0], stem)
        rounding = _ROUNDING[node.target]
        if rounding is not None:
            found = self._helper(rounding, found, stem=stem)
        return self._helper("Cast", found, stem=stem, to=ONNX_TYPE[torch.int64])

    def floor_divided(self, node: fx.Node, stem: str) -> Any:
        """Divide sizes; ONNX cuts off where Python rounds down, which is the same where nothing is negative."""
        a, b = (self._number(value, stem) for value in node.args)
        if _may_be_negative(node.args[0]):
            remainder = self._helper("Mod", a, b, stem=stem)
            a = self._helper("Sub", a, remainder, stem=stem)
        return self._helper("Div", a, b, stem=stem)


def _short_shape(node: fx.Node, entries: Sequence[Any]) -> list[Any]:
    """Write the shape of a Reshape without sizes that vary, as far as possible: 0 copies a dimension, -1 is the rest.

    Two entries that vary beyond those copied cannot both be left.
    """
    call = Call(node)
    if call["allowzero"] or not any(isinstance(entry, fx.Node) for entry in entries):
        return list(entries)
    found = [0 if _is_size_of(entry, call["data"], i) else entry for i, entry in enumerate(entries)]
    varying = [i for i, entry in enumerate(found) if isinstance(entry, fx.Node)]
    if len(varying) == 1 and -1 not in found:
        found[varying[0]] = -1
    return found


def _is_size_of(entry: Any, source: Any, dim: int) -> bool:
    if not isinstance(entry, fx.Node) or entry.target is not SYM_SIZE or entry.args[0] is not source:
        return False
    rank = len(tensor_spec(source).shape)
    return dim < rank and _extent_of(entry)[1] % rank == dim


def _extent_of(size: fx.Node) -> tuple[fx.Node, int]:
    """Return of which value a node yields the size, and of which dimension."""
    source, dim = size.args
    return source, dim  # type: ignore[return-value]


def _runs(entries: Sequence[Any], *, partial: bool) -> Iterator[list[Any]]:
    """Yield neighbouring entries that one tensor can hold; ``partial`` where an operator gives part of a shape."""
    run: list[Any] = []
    for entry in entries:
        if run and not _continues(run, entry, partial):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _continues(run: Sequence[Any], entry: Any, partial: bool) -> bool:
    last = run[-1]
    if not isinstance(last, fx.Node) or not isinstance(entry, fx.Node):
        return not isinstance(last, fx.Node) and not isinstance(entry, fx.Node)
    if not partial or last.target is not SYM_SIZE or entry.target is not SYM_SIZE:
        return False
    (value, dim), (other, next_dim) = _extent_of(last), _extent_of(entry)
    return value is other and next_dim == dim + 1


def _may_be_negative(value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return bool(value < 0)
    if value.target in (operator.sub, operator.neg):
        return True
    return value.target is not SYM_SIZE and any(_may_be_negative(a) for a in value.args)


_NUMBERS: Final[dict[Any, Callable[[_Writer, fx.Node, str], Any]]] = {
    operator.floordiv: _Writer.floor_divided,
    operator.truediv: lambda writer, node, stem: writer._helper(
        "Cast", writer.real(node, stem), stem=stem, to=ONNX_TYPE[torch.int64]
    ),
    **dict.fromkeys(_ROUNDING, _Writer.rounded),
}


def _distinct(value: Any) -> Any:
    """Tell apart what Python holds to be equal: -0.0 and 0.0, and not-a-number from itself not."""
    return value.hex() if isinstance(value, float) else value


def _schema(target: Op, opset: int, node: fx.Node) -> Any:
    """Return the operator's schema in this version of its set; None for what ONNX has no schema of."""
    if target.domain != DOMAIN:
        return None
    import onnx.defs

    try:
        return onnx.defs.get_schema(target.name, opset, DOMAIN)
    except onnx.defs.SchemaError:
        if onnx.defs.has(target.name, DOMAIN):
            raise LoweringError(
                f"{node.name} is a {target.name}, which opset {opset} does not have: convert the file to a newer opset "
                "first"
            ) from None
        return None


def _number_type(node: fx.Node, operation: str, name: str) -> torch.dtype:
    if operation == "Range":
        return tensor_spec(node).dtype
    if operation in ("Clip", "Pad"):
        return Call(node).spec(Call(node).node.target._schema.arguments[0].name).dtype  # type: ignore[union-attr]
    if operation == "Dropout":
        return torch.bool if name == "training_mode" else torch.float32
    return torch.int64
