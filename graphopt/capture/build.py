"""Rebuild an exported program as a module that trains: tensors by name, ATen operators, and nothing else."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind
from torch.fx.graph import _PyTreeInfo
from torch.utils import _pytree as pytree

from graphopt.capture.autocast import Region, casts
from graphopt.capture.inputs import Inputs
from graphopt.errors import CaptureError
from graphopt.graph import FIXED, OWNER, SPEC, Spec, TensorSpec, TraceCodeGen, TraceModule, find_attribute, set_tensor

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
    }
)
"""Assertions: they state what held for the example inputs, and would refuse other batches, types and devices."""

_LIFTED: Final = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_MUTATED: Final = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION)


class Specs:
    """Describe the fake values of an exported program.

    Sizes that depend on the inputs get the value they have for the example inputs: the graph may have been exported on
    a wider batch.
    """

    def __init__(self, program: ExportedProgram, inputs: Inputs) -> None:
        """Read the value of every symbol from ``inputs``, with which the program can be called."""
        self._symbols: dict[Any, int] = {}
        self._known: dict[Any, int | float | bool] = {}
        self.measured = False
        """Whether a size depends on the data, so that only a run shows its value."""
        for node, value in zip(user_inputs(program), pytree.tree_leaves(inputs), strict=True):
            fake = node.meta.get("val")
            if isinstance(fake, torch.Tensor) and isinstance(value, torch.Tensor):
                size: Any
                for size, given in zip(fake.shape, value.shape, strict=True):
                    if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                        self._symbols.setdefault(size.node.expr, given)

    def of(self, value: Any) -> Spec:
        """Describe a value of ``node.meta["val"]``."""
        if isinstance(value, torch.Tensor):
            shape = tuple(int(self.number(size)) for size in value.shape)
            return TensorSpec(shape, value.dtype, tuple(varies(size) for size in value.shape))
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.number(value)
        if isinstance(value, list | tuple):
            return tuple(self.of(each) for each in value)
        return value if isinstance(value, int | float | bool) else None

    def number(self, value: Any) -> int | float | bool:
        """Return the number behind a size."""
        if isinstance(value, int | float | bool):
            return value
        expression = value.node.expr
        known = self._known.get(expression)
        if known is None:
            known = self._known[expression] = self._evaluate(value, expression)
        return known

    def _evaluate(self, value: Any, expression: Any) -> int | float | bool:
        if expression.free_symbols <= self._symbols.keys():
            return value.node.pytype(expression.subs(self._symbols))  # type: ignore[no-any-return]
        hint = value.node.hint if value.node.has_hint() else None
        if hint is None:
            self.measured = True
            return value.node.pytype(1)  # type: ignore[no-any-return]
        return value.node.pytype(hint)  # type: ignore[no-any-return]


def varies(size: Any) -> bool:
    """Say whether a traced size may vary; one that was narrowed down to a number still has the type of a symbol."""
    return not isinstance(size, int) and not size.node.expr.is_number


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """Return the placeholders of the inputs a caller passes, in the order of their leaves."""
    placeholders = program.graph.find_nodes(op="placeholder")
    specs = program.graph_signature.input_specs
    return [node for node, spec in zip(placeholders, specs, strict=True) if spec.kind is InputKind.USER_INPUT]


@dataclass
class Built:
    """What :func:`build` makes."""

    module: TraceModule
    owner_types: dict[fx.Node, str] = field(default_factory=dict)
    """Qualified class name of the module that called each operator."""


def build(
    program: ExportedProgram,
    tensors: Mapping[str, torch.Tensor],
    transient: frozenset[str],
    own: Callable[[torch.Tensor], torch.Tensor],
    inputs: Inputs,
) -> Built:
    """Rebuild ``program``.

    Regions without gradients become ordinary operators whose results are detached, regions under autocast ordinary
    operators with explicit casts. Assertions and dead code go. Writes in place stay, in order.

    Args:
        program: the exported program.
        tensors: the graph's own tensors by fully qualified name; all are registered, whether read or not.
        transient: names of those that no ``state_dict`` holds.
        own: makes the graph's own of a constant of the program; constants become transient buffers.
        inputs: the example inputs.

    Raises:
        CaptureError: if the program holds what cannot be rebuilt.
    """
    specs = Specs(program, inputs)
    builder = _Builder(program, specs)
    graph = builder.build()
    module = TraceModule(nn.Module(), fx.Graph())
    read = {node.target for node in graph.find_nodes(op="get_attr")}
    constants = {name: own(value) for name, value in builder.constants.items() if name in read and name not in tensors}
    for name, tensor in {**tensors, **constants}.items():
        _check_name(module, name)
        set_tensor(module, name, tensor)
    for name in {*transient, *constants}:
        path, _, last = name.rpartition(".")
        module.get_submodule(path)._non_persistent_buffers_set.add(last)
    for name, body in builder.bodies.items():
        module.add_module(name, body)
    module.graph = graph
    module.train(False)
    if specs.measured:
        hollow = next((name for name in read if find_attribute(module, str(name)).is_meta), None)
        if hollow is not None:
            raise CaptureError(
                f"the model makes sizes from the values of tensors, which only a run shows, but {hollow} "
                "has no values: load the weights, or leave this part out of forward"
            )
        _measure(module, inputs)
    return Built(module, {node: kind for node, kind in builder.owner_types.items() if node in set(graph.nodes)})


def _check_name(module: nn.Module, name: str) -> None:
    first = name.partition(".")[0]
    if (
        first not in module._modules
        and first not in module._parameters
        and first not in module._buffers
        and hasattr(module, first)
    ):
        raise CaptureError(
            f"the model's attribute {first!r}, of the tensor {name}, is one that torch.fx reserves: rename it"
        )


def _measure(module: TraceModule, inputs: Inputs) -> None:
    """Run the graph once and read the sizes that depend on data; on a copy, since a graph may write to its buffers."""

    class Measure(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta[SPEC] = _measured(n.meta.get(SPEC), result)
            return result

    duplicate = copy.deepcopy(module)
    with torch.no_grad():
        Measure(duplicate).run(*pytree.tree_leaves(inputs), enable_io_processing=False)
    for node, measured in zip(module.graph.nodes, duplicate.graph.nodes, strict=True):
        node.meta[SPEC] = measured.meta.get(SPEC)


def _measured(spec: Spec, value: Any) -> Spec:
    if isinstance(spec, TensorSpec) and isinstance(value, torch.Tensor):
        return spec.resized(tuple(value.shape))
    if isinstance(spec, tuple) and isinstance(value, list | tuple):
        return tuple(_measured(each, found) for each, found in zip(spec, value, strict=True))
    return value if isinstance(value, int | float | bool) else spec


class _Builder:
    """Copy nodes into a new graph; ``values`` maps each node of the program to what stands for it there."""

    def __init__(self, program: ExportedProgram, specs: Specs) -> None:
        self.program = program
        self.specs = specs
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self.bodies: dict[str, nn.Module] = {}
        self.owner_types: dict[fx.Node, str] = {}
        self.tracked: set[fx.Node] = set()
        """Nodes whose values may need a gradient."""

    def build(self) -> fx.Graph:
        program = self.program
        placeholders = program.graph.find_nodes(op="placeholder")
        inputs = dict(zip(placeholders, program.graph_signature.input_specs, strict=True))
        values: dict[fx.Node, Any] = {}
        attributes: dict[str, fx.Node] = {}
        for node, spec in inputs.items():
            if spec.kind is InputKind.USER_INPUT:
                values[node] = self._placeholder(node, spec)
        for node, spec in inputs.items():
            if spec.kind is not InputKind.USER_INPUT:
                values[node] = self._attribute(node, spec)
                attributes[str(spec.target)] = values[node]
        results = self._emit(program.graph_module, values, None)
        outputs = []
        for value, output in zip(results, program.graph_signature.output_specs, strict=True):
            if output.kind is OutputKind.USER_OUTPUT:
                outputs.append(value)
            elif output.kind in _MUTATED:
                named = {old.name: new for old, new in values.items() if old.op == "placeholder"}
                written = attributes.get(str(output.target)) or named[str(output.target)]
                self._new(aten.copy_.default, (written, value), written)
            else:
                raise CaptureError(
                    f"the exported program returns a {output.kind.name.lower()}, which cannot be captured: "
                    "export the model for inference"
                )
        self.graph.output(tuple(outputs))
        self.graph.set_codegen(self._codegen())
        self.graph.eliminate_dead_code(_has_effect)
        return self.graph

    def _placeholder(self, node: fx.Node, spec: InputSpec) -> fx.Node:
        new = self.graph.placeholder(node.name)
        value = node.meta.get("val")
        new.meta[SPEC] = self.specs.of(value)
        if isinstance(spec.arg, ConstantArgument):
            new.meta[FIXED] = spec.arg.value
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            self.tracked.add(new)
        return new

    def _attribute(self, node: fx.Node, spec: InputSpec) -> fx.Node:
        if spec.kind not in _LIFTED or spec.target is None:
            raise CaptureError(
                f"the exported program takes a {spec.kind.name.lower()} ({spec.target or node.name}), which cannot be "
                "captured: keep custom objects and side-effect tokens out of forward"
            )
        new = self.graph.create_node("get_attr", spec.target)
        new.meta[SPEC] = self.specs.of(node.meta.get("val"))
        if spec.kind is InputKind.PARAMETER:
            self.tracked.add(new)
        elif spec.target in self.program.constants:
            self.constants[spec.target] = self.program.constants[spec.target]
        return new

    def _codegen(self) -> TraceCodeGen:
        call, signature = self.program.call_spec, self.program.module_call_graph[0].signature
        if call.in_spec is None:
            raise CaptureError("the exported program does not say how its inputs are nested: export the model again")
        names = list((signature.forward_arg_names if signature else None) or ())
        if not names:
            positional, keywords = call.in_spec.children()
            names = [f"arg_{i}" for i in range(positional.num_children)] + list(keywords.context)
        return TraceCodeGen(_PyTreeInfo(names, call.in_spec, call.out_spec))

    def _emit(self, owner: nn.Module, values: dict[fx.Node, Any], region: Region | None) -> Sequence[Any]:
        """Copy the nodes of one graph module that are not in ``values`` yet; return what it returns."""
        graph: fx.Graph = owner.graph  # type: ignore[assignment]
        for node in graph.nodes:
            if node in values:
                continue
            if node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            if node.op == "get_attr":
                values[node] = getattr(owner, str(node.target))
            elif node.op != "call_function":
                raise CaptureError(f"node {node.name} of the exported program is a {node.op}: export the model again")
            elif node.target not in DROPPED:
                values[node] = self._call(node, values, region)
        raise CaptureError("the exported program returns nothing")

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], region: Region | None) -> Any:
        if node.target is operator.getitem and isinstance(values[node.args[0]], tuple):  # type: ignore[index]
            return values[node.args[0]][node.args[1]]  # type: ignore[index]
        if node.target is higher_order.wrap_with_set_grad_enabled:
            enabled, body, *operands = node.args
            operands = fx.map_arg(operands, values.__getitem__)
            if enabled:
                return self._inline(values[body], operands, region)  # type: ignore[index]
            return self._without_gradient(values[body], operands, region)  # type: ignore[index]
        if node.target is higher_order.wrap_with_autocast:
            device, dtype, enabled, _cache, body, *operands = node.args
            operands = fx.map_arg(operands, values.__getitem__)
            return self._inline(values[body], operands, (device, dtype) if enabled else None)  # type: ignore[arg-type, index]
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self._operand(n, values))
        if region is not None and isinstance(node.target, torch._ops.OpOverload):
            args, kwargs = self._cast(node, args, kwargs, region)
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        new.meta[SPEC] = self.specs.of(node.meta.get("val"))
        self._trace_gradient(new)
        if stack := node.meta.get("nn_module_stack"):
            owner, kind = next(reversed(stack.values()))
            new.meta[OWNER] = owner
            self.owner_types[new] = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        return new

    def _operand(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Return what stands for ``node``; the body of a higher-order operator, or a constant, gets a name."""
        value = values[node]
        if isinstance(value, nn.Module):
            name = f"body_{len(self.bodies)}"
            self.bodies[name] = value
        elif isinstance(value, torch.Tensor):
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
        else:
            return value
        values[node] = self.graph.create_node("get_attr", name)
        values[node].meta[SPEC] = self.specs.of(value)
        return values[node]

    def _inline(self, body: Any, operands: Sequence[Any], region: Region | None) -> tuple[Any, ...]:
        inner: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        return tuple(self._emit(body, inner, region))

    def _without_gradient(self, body: Any, operands: Sequence[Any], region: Region | None) -> tuple[Any, ...]:
        # Where nothing is written in place, cutting the results is enough. A write would make what it writes to (a
        # running average, say) depend on parameters, so there the operands are cut; they still share their memory.
        if any(_has_effect(node) for node in body.graph.nodes if node.op == "call_function"):
            return self._inline(body, [self._detached(operand) for operand in operands], region)
        return tuple(self._detached(result) for result in self._inline(body, operands, region))

    def _detached(self, value: Any) -> Any:
        return self._new(aten.detach.default, (value,), value) if value in self.tracked else value

    def _cast(self, node: fx.Node, args: Any, kwargs: Any, region: Region) -> tuple[Any, Any]:
        result = next((v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)), None)
        if result is None:
            return args, kwargs
        found = casts(node.target, args, kwargs, result.device, region)
        if found is None:
            raise CaptureError(
                f"{node.target} (node {node.name}) runs under torch.autocast, in a way that explicit casts cannot "
                "express: capture the model without autocast inside forward"
            )
        cast: dict[fx.Node, fx.Node] = {}
        for operand, dtype in found.items():
            cast[operand] = self._new(aten.to.dtype, (operand, dtype), operand)
            spec = operand.meta[SPEC]
            cast[operand].meta[SPEC] = TensorSpec(spec.shape, dtype, spec.dynamic)
        return fx.map_arg((args, kwargs), lambda n: cast.get(n, n))

    def _new(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        new = self.graph.call_function(target, args)
        new.meta.update({key: like.meta[key] for key in (SPEC, OWNER) if key in like.meta})
        if target is not aten.detach.default:
            self._trace_gradient(new)
        return new

    def _trace_gradient(self, new: fx.Node) -> None:
        if any(node in self.tracked for node in new.all_input_nodes) and _differentiable(new.meta.get(SPEC)):
            self.tracked.add(new)


def _differentiable(spec: Spec) -> bool:
    if isinstance(spec, tuple):
        return any(_differentiable(each) for each in spec)
    return isinstance(spec, TensorSpec) and (spec.dtype.is_floating_point or spec.dtype.is_complex)


def _has_effect(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return (schema is not None and bool(schema.is_mutable)) or isinstance(node.target, torch._ops.HigherOrderOperator)
