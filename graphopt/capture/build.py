"""Rebuild an exported program as a module that trains: parameters by name, ATen operators, nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from graphopt.errors import CaptureError
from graphopt.graph import OWNER, SPEC, Spec, TensorSpec, TraceModule, set_tensor

aten = torch.ops.aten
higher_order = torch.ops.higher_order

DROPPED: Final = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch._check,
    }
)
"""Assertions of the export: they state what held for the example, and would refuse other batches."""

LIFTED: Final = frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR})
MUTATIONS: Final = frozenset({OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION})


class Specs:
    """Describe fake values; sizes that depend on the inputs get the value they have for the example inputs."""

    def __init__(self, symbols: Mapping[Any, int] | None = None) -> None:
        """Take ``symbols``, the value of each symbol of the shape environment that is not its own hint."""
        self._symbols = dict(symbols or {})
        self._known: dict[Any, int | float | bool] = {}

    def of(self, value: Any) -> Spec:
        """Describe a value of a node's ``meta["val"]``."""
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided:
                return None
            shape: list[int] = []
            dynamic: list[bool] = []
            for size in value.shape:
                known = self.number(size)
                shape.append(int(known))
                dynamic.append(not isinstance(size, int))
            return TensorSpec(tuple(shape), value.dtype, tuple(dynamic))
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.number(value)
        if isinstance(value, list | tuple):
            return tuple(self.of(v) for v in value)
        return value if isinstance(value, int | float | bool) else None

    def number(self, value: Any) -> int | float | bool:
        """Return a number behind a size."""
        if isinstance(value, int | float | bool):
            return value
        expression = value.node.expr
        known = self._known.get(expression)
        if known is None:
            known = self._known[expression] = self._evaluate(value, expression)
        return known

    def _evaluate(self, value: Any, expression: Any) -> int | float | bool:
        if self._symbols and expression.free_symbols <= self._symbols.keys():
            return value.node.pytype(expression.subs(self._symbols))
        hint = value.node.hint
        if hint is None:
            raise CaptureError(
                f"the size {expression} depends on the data, so the graph has no size to work with: "
                "replace the operation that selects a data-dependent number of entries"
            )
        return value.node.pytype(hint)


@dataclass
class Built:
    """What :func:`build` makes: the module, the inputs it was specialised to, and sentences for the report."""

    module: TraceModule
    notes: list[str] = field(default_factory=list)


def build(
    program: ExportedProgram, tensors: Mapping[str, torch.Tensor], own: Callable[[torch.Tensor], torch.Tensor], specs: Specs
) -> Built:
    """Rebuild ``program`` on ``tensors``, the graph's own, by fully qualified name.

    Constants of the program that are not among them are made with ``own`` and become buffers that no
    ``state_dict`` holds.
    """
    builder = _Builder(program, specs)
    graph = builder.build()
    module = TraceModule(nn.Module(), fx.Graph(), "TraceModule")
    module.eval()
    for name, tensor in tensors.items():
        set_tensor(module, name, tensor)
    for name in builder.lifted:
        if name not in tensors:
            path, _, last = name.rpartition(".")
            value = program.constants.get(name, program.state_dict.get(name))
            set_tensor(module, name, own(value))
            module.get_submodule(path)._non_persistent_buffers_set.add(last)
    for name, child in builder.bodies.items():
        module.add_module(name, child)
    module.graph = graph
    return Built(module, builder.notes)


class _Builder:
    def __init__(self, program: ExportedProgram, specs: Specs) -> None:
        self.program = program
        self.specs = specs
        self.graph = fx.Graph()
        self.lifted: list[str] = []
        self.bodies: dict[str, nn.Module] = {}
        self.notes: list[str] = []

    def build(self) -> fx.Graph:
        program = self.program
        values: dict[fx.Node, Any] = {}
        attributes: dict[str, fx.Node] = {}
        inputs = dict(zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True))
        # Placeholders come first in any graph; the tensors that were lifted to inputs are read after them.
        for node, spec in sorted(inputs.items(), key=lambda item: item[1].kind is not InputKind.USER_INPUT):
            if spec.kind is InputKind.USER_INPUT:
                new = self.graph.placeholder(node.name)
            elif spec.kind in LIFTED and spec.target is not None:
                self.lifted.append(spec.target)
                if not node.users:
                    continue
                new = self.graph.create_node("get_attr", spec.target)
                attributes[spec.target] = new
            else:
                raise CaptureError(f"input {node.name} of the exported program is a {spec.kind.name}; only tensors are supported")
            values[node] = new
            new.meta[SPEC] = self.specs.of(node.meta.get("val"))
        results = self._emit(program.graph_module, values, inputs)
        outputs = []
        for value, spec in zip(results, program.graph_signature.output_specs, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                outputs.append(value)
            elif spec.kind in MUTATIONS:
                target = attributes.get(spec.target) if spec.target else None
                if target is None:
                    target = next(new for old, new in values.items() if old.name == spec.target)
                copied = self.graph.call_function(aten.copy_.default, (target, value))
                copied.meta[SPEC] = target.meta[SPEC]
            else:
                raise CaptureError(f"the exported program returns a {spec.kind.name}, which is not supported: export for inference")
        self.graph.output(tuple(outputs))
        self.graph.set_codegen(self._codegen())
        self.graph.eliminate_dead_code(_has_effect)
        return self.graph

    def _codegen(self) -> _PyTreeCodeGen:
        program = self.program
        in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
        signature = program.module_call_graph[0].signature
        names = list(signature.forward_arg_names or ()) if signature else []
        if not names:
            positional, keywords = in_spec.children()
            names = [f"arg_{i}" for i in range(positional.num_children)] + list(keywords.context)
        return _PyTreeCodeGen(_PyTreeInfo(names, in_spec, out_spec))

    def _emit(self, owner: nn.Module, values: dict[fx.Node, Any], skip: Mapping[fx.Node, Any]) -> Sequence[Any]:
        for node in owner.graph.nodes:  # type: ignore[union-attr]
            if node in skip:
                continue
            if node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)  # type: ignore[no-any-return]
            if node.op == "get_attr":
                values[node] = getattr(owner, node.target)
            elif node.op == "call_function":
                if node.target not in DROPPED:
                    values[node] = self._call(node, values)
            else:
                raise CaptureError(f"node {node.name} of the exported program is a {node.op}; export the model again")
        raise CaptureError("the exported program has no output")

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.target is operator.getitem and isinstance(values[node.args[0]], list | tuple):
            return values[node.args[0]][node.args[1]]
        if node.target is higher_order.wrap_with_set_grad_enabled:
            enabled, body, *operands = node.args
            return self._inline(values[body], fx.map_arg(operands, values.__getitem__), detached=not enabled)
        if node.target is higher_order.wrap_with_autocast and not node.args[2]:
            body, *operands = node.args[4:]
            return self._inline(values[body], fx.map_arg(operands, values.__getitem__), detached=False)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self._operand(n, values))
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        self._describe(new, node)
        return new

    def _operand(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        value = values[node]
        if not isinstance(value, nn.Module):
            return value
        name = f"body_{len(self.bodies)}"
        self.bodies[name] = value
        values[node] = self.graph.create_node("get_attr", name)
        return values[node]

    def _inline(self, body: Any, operands: Sequence[Any], *, detached: bool) -> tuple[Any, ...]:
        inner = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        results = self._emit(body, inner, dict(inner))
        return tuple(self._detach(value) if detached else value for value in results)

    def _detach(self, value: Any) -> Any:
        spec = value.meta.get(SPEC) if isinstance(value, fx.Node) else None
        if not isinstance(spec, TensorSpec) or not (spec.dtype.is_floating_point or spec.dtype.is_complex):
            return value
        new = self.graph.call_function(aten.detach.default, (value,))
        new.meta.update(value.meta)
        return new

    def _describe(self, new: fx.Node, old: fx.Node) -> None:
        new.meta[SPEC] = self.specs.of(old.meta.get("val"))
        stack = old.meta.get("nn_module_stack")
        if stack:
            new.meta[OWNER] = next(reversed(stack.values()))[0]


def _has_effect(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
