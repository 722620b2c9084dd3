"""Build a graph of ONNX operators from a model that onnx-graphsurgeon holds.

What may live here: the walk over the model's nodes, which gives every value its type for two sizes of the inputs, takes
arithmetic on sizes out of the graph, and copies the rest.

A dimension varies where its size for the example inputs differs from that for inputs of other sizes. Sizes come from
running each operator on tensors without values, so a model of any size is read in little time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import fx, nn

from graphopt.capture.onnx.naming import attribute_name, identifier, owner_of, parents
from graphopt.capture.onnx.operands import (
    FAILURES,
    LARGEST_VALUE,
    MisfitError,
    as_argument,
    hashable,
    is_small_result,
    result_type,
    varying_dims,
    with_outputs,
    without_values,
)
from graphopt.capture.onnx.sizes import LARGEST, Size, UndecidedError, evaluated, has_size
from graphopt.capture.onnx.values import (
    Found,
    Stored,
    Type,
    as_entries,
    entries_of,
    is_small,
    is_tensor,
    of_entries,
    tensor_of,
    unmade,
)
from graphopt.dialects.onnx.facts import ONNX
from graphopt.dialects.onnx.operators import DOMAIN, Op, op
from graphopt.dialects.onnx.quantized import WEIGHTS
from graphopt.dialects.onnx.types import ONNX_TYPE, Filling
from graphopt.errors import CaptureError, UnsupportedOperatorError
from graphopt.graph import OWNER, SPEC, TensorSpec, TraceModule, set_tensor

__all__ = ["Builder"]

FIXED_OPERANDS: Final[dict[str, tuple[str, ...]]] = {
    "BatchNormalization": ("input_mean", "input_var"),
    "Div": ("B",),
    "Pow": ("Y",),
    "Mod": ("A", "B"),
    "Max": ("data_0",),
    "Min": ("data_0",),
    "Where": ("condition",),
    "QuantizeLinear": ("y_scale", "y_zero_point"),
    "DequantizeLinear": ("x_scale",),
    "Gather": ("indices",),
    "GridSample": ("grid",),
    "RotaryEmbedding": ("cos_cache", "sin_cache"),
}
"""Operands that are no weights although they are constants: setting them to zero would not take a channel away."""


class Builder:
    """Build the graph of one model, node by node.

    Args:
        stored: gives the stored tensor behind a constant of onnx-graphsurgeon.
        metadata: what the file says of the node that makes a value, by that value's name.
        apart: dimensions that may differ do so at the two sizes of the inputs; so those that never do are the same.
    """

    def __init__(
        self, stored: Callable[[Any], Stored], metadata: Mapping[str, Mapping[str, str]], *, apart: bool = False
    ) -> None:
        self.module = TraceModule(nn.Module(), fx.Graph())
        self.graph: fx.Graph = self.module.graph
        self.values: dict[str, Found] = {}
        self.names: dict[str, str] = {}
        """What the file calls a tensor of the graph, where that differs from its name there."""
        self.uses: dict[str, list[tuple[str, str]]] = {}
        """Which operators read a stored tensor, and as what."""
        self._stored = stored
        self._apart = apart
        self._metadata = metadata
        self._known: dict[Any, tuple[Type, ...]] = {}
        self._last: fx.Node | None = None
        self._whole_weights: set[str] = set()
        self._sizes: dict[tuple[fx.Node, int], Size] = {}
        self._parts: set[str] = set()
        self._taken: set[str] = set()

    # -- values --

    def input(self, name: str, tensor: torch.Tensor, probe: tuple[int, ...], varying: Sequence[int]) -> None:
        """Add an input of the model."""
        node = self.graph.placeholder(identifier(name))
        node.target = node.name  # the generated code binds the target, which need not be unique as the name is
        found = Found(name, tuple(tensor.shape), probe, tensor.dtype, lambda: node, varying=frozenset(varying))
        node.meta.update({SPEC: found.spec, ONNX: (name, (name,))})
        self.values[name] = found

    def value(self, tensor: Any) -> Found:
        """Return what is known of a tensor of onnx-graphsurgeon."""
        found = self.values.get(tensor.name)
        if found is None:
            if not hasattr(tensor, "_values"):
                raise CaptureError(f"no node makes the value {tensor.name!r}: the file is broken; export it again")
            found = self.values[tensor.name] = self._constant(self._stored(tensor))
        return found

    def _constant(self, stored: Stored) -> Found:
        def make() -> fx.Node:
            return self._attribute(stored.name, stored.load())

        found = Found(stored.name, stored.shape, stored.shape, stored.dtype, make, stored=stored)
        if is_small(stored.shape, stored.dtype):
            found.entries = entries_of(stored.load())
        return found

    def _attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Add a tensor to the module, and a node that reads it in front of all calls; in the order of first use."""
        path = self._fresh(name)
        set_tensor(self.module, path, tensor)
        if self._last is None:
            insertion = self.graph.inserting_before(next(iter(self.graph.nodes), None))
        else:
            insertion = self.graph.inserting_after(self._last)
        with insertion:
            node = self._last = self.graph.create_node("get_attr", path)
        if node.name == "self":
            node._rename("self_")  # the code reads tensors from self
        node.meta[SPEC] = TensorSpec.of(tensor)
        return node

    def _fresh(self, name: str) -> str:
        """Return a name under which the module can hold a tensor: the file's own wherever that is possible."""
        parts = [part for part in name.split(".") if part] or ["tensor"]
        parts = [attribute_name(part) for part in parts]
        path = ".".join(parts)
        while path in self._taken or path in self._parts or any(p in self._taken for p in parents(path)):
            path = f"{path.replace('.', '_')}_"
        self._taken.add(path)
        self._parts.update(parents(path))
        if path != name:
            self.names[path] = name
        return path

    # -- nodes --

    def add(self, node: Any) -> None:
        """Add one node of the model."""
        if node.op == "Constant" and node.domain in (None, "", "ai.onnx"):
            self._add_constant(node)
            return
        if node.op == "If" and not node.domain and self._follow_branch(node):
            return
        target = self._target(node)
        inputs = [None if each.is_empty() else self.value(each) for each in node.inputs]
        names = [each.name for each in node.outputs]
        while names and not names[-1]:
            names.pop()
        operands, attributes = self._bound(node, target, inputs)
        results = self._computed_sizes(node, target, operands, attributes, len(names))
        emit = _Once(lambda: self._emit(node, target, operands, attributes, names))
        if results is None:
            results = emit().results
        else:
            for index, result in enumerate(results):
                result.make = self._maker(result, emit, index)
        for name, result in zip(names, results, strict=False):
            if name:
                result.name = name
                self.values[name] = result

    def _maker(self, result: Found, emit: _Once, index: int) -> Callable[[], fx.Node]:
        def make() -> fx.Node:
            if result.entries is not None and not has_size(result.entries):
                return self._attribute(result.name, tensor_of(result.entries, result.dtype))
            return emit().results[index].node

        return make

    def _follow_branch(self, node: Any) -> bool:
        """Add the nodes of the branch that is always taken, where the condition is a constant."""
        condition = self.value(node.inputs[0]).entries
        if condition is None or condition.size != 1:
            return False
        try:
            taken = bool(condition.reshape(-1)[0])
        except UndecidedError:
            return False
        branch = node.attrs["then_branch" if taken else "else_branch"]
        for each in branch.nodes:
            self.add(each)
        for result, given in zip(node.outputs, branch.outputs, strict=True):
            self.values[result.name] = self.value(given)
        return True

    def _add_constant(self, node: Any) -> None:
        name = node.outputs[0].name
        kind, value = next(iter(node.attrs.items()), ("", None))
        held = kind in ("value", "sparse_value")
        if len(node.attrs) != 1 or not kind.startswith(("value", "sparse_value")) or held != is_tensor(value):
            raise CaptureError(
                f"node {node.name!r} (Constant) must have one value, of the type that its attribute says; found "
                f"{sorted(node.attrs)}: the file is broken; export it again"
            )
        if held:
            stored = self._stored(value)
            self.values[name] = self._constant(Stored(name, stored.shape, stored.dtype, stored.load))
            return
        if "string" in kind:
            raise UnsupportedOperatorError(f"the constant {name} holds strings: only numbers can be computed with")
        dtype = torch.float32 if "float" in kind else torch.int64
        tensor = torch.tensor(value, dtype=dtype)
        self.values[name] = self._constant(Stored(name, tuple(tensor.shape), dtype, lambda: tensor))

    def _target(self, node: Any) -> Op:
        try:
            return op(node.op, node.domain or DOMAIN)
        except KeyError:
            where = f"{node.domain}.{node.op}" if node.domain else node.op
            raise UnsupportedOperatorError(
                f"node {node.name!r} is a {where}, which neither the ONNX standard nor ONNX Runtime has: replace it, "
                "or give its definition as a function in the file"
            ) from None

    def _bound(self, node: Any, target: Op, inputs: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Give inputs and attributes the names of the operator's schema."""
        operands: dict[str, Any] = {}
        rest = list(inputs)
        for parameter in target.schema.inputs:
            if parameter.kind == "variadic":
                operands[parameter.name], rest = rest, []
            else:
                operands[parameter.name] = rest.pop(0) if rest else None
                if operands[parameter.name] is None and parameter.kind == "tensor":
                    raise CaptureError(
                        f"node {node.name!r} ({node.op}) lacks its input {parameter.name}: the file is broken; "
                        "export it again"
                    )
        if rest:
            raise CaptureError(f"node {node.name!r} ({node.op}) has {len(rest)} inputs too many: the file is broken")
        known = {a.name for a in target.schema.arguments}
        attributes: dict[str, Any] = {}
        for name, value in node.attrs.items():
            if name not in known:
                raise CaptureError(
                    f"node {node.name!r} ({node.op}) has an attribute {name!r} that the operator has not"
                )
            if name in operands:  # became an input in a later version
                operands[name] = self._literal(value)
            else:
                attributes[name] = self._filling(node, value) if is_tensor(value) else value
        return operands, attributes

    def _filling(self, node: Any, value: Any) -> Filling:
        stored = self._stored(value)
        if stored.shape not in ((), (1,)):
            raise CaptureError(
                f"node {node.name!r} ({node.op}) has a tensor of shape {list(stored.shape)} as an attribute where one "
                "number must stand: the file is broken; export it again"
            )
        return Filling(stored.load().reshape(()).item(), ONNX_TYPE[stored.dtype])

    def _literal(self, value: Any) -> Found:
        tensor = torch.as_tensor(value)
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        return self._constant(Stored("literal", tuple(tensor.shape), tensor.dtype, lambda: tensor))

    # -- sizes --

    def _computed_sizes(
        self, node: Any, target: Op, operands: dict[str, Any], attributes: dict[str, Any], count: int
    ) -> list[Found] | None:
        """Return the results of a node that computes with sizes alone; None for any other."""
        if target.domain != DOMAIN:
            return None
        if target.name in ("Shape", "Size"):
            return [self._shape(target.name, operands["data"], attributes)]
        flat = [v for value in operands.values() for v in (value if isinstance(value, list) else [value])]
        present = [v for v in flat if v is not None]
        if not present or any(v.entries is None for v in present) or target.name in _RANDOM:
            return None
        if any(v.stored is not None and v.dtype.is_floating_point and v.entries.size > 1 for v in present):
            return None  # a short vector may be a weight, and keeps its name
        dtype = result_type(target.name, present, attributes)
        if not any(has_size(v.entries) for v in present):
            return self._constants(target, operands, attributes, count)
        given = [
            [v.entries for v in value] if isinstance(value, list) else value and value.entries
            for value in operands.values()
        ]
        try:
            found = evaluated(target.name, given, {**attributes, "outputs": count}, real=dtype.is_floating_point)
        except (UndecidedError, ArithmeticError, ValueError, IndexError, TypeError):
            return None
        if found is None:
            return None
        results = found if isinstance(found, list) else [found]
        return [of_entries(entries, dtype) for entries in results] if all(e.size <= LARGEST for e in results) else None

    def _shape(self, name: str, value: Found, attributes: Mapping[str, Any]) -> Found:
        spec = value.spec
        sizes: list[Any] = [
            self._extent(value, d) if varies else n
            for d, (n, varies) in enumerate(zip(spec.shape, spec.dynamic, strict=True))
        ]
        if name == "Size":
            return of_entries(as_entries(math.prod(sizes), ()), torch.int64)
        sizes = sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))]
        entries = np.empty(len(sizes), dtype=object)
        entries[:] = sizes
        return of_entries(entries, torch.int64)

    def _extent(self, value: Found, dim: int) -> Size:
        """Return the size of a dimension that varies; the same object for the same dimension."""
        key = (value.node, dim)
        if key not in self._sizes:
            self._sizes[key] = Size.of(*key, value.shape[dim], value.probe[dim])
        return self._sizes[key]

    def _constants(
        self, target: Op, operands: Mapping[str, Any], attributes: Mapping[str, Any], count: int
    ) -> list[Found] | None:
        """Compute a node on constants, where the result is small."""

        def real(value: Any) -> Any:
            if isinstance(value, list):
                return [real(each) for each in value]
            return None if value is None else tensor_of(value.entries, value.dtype)

        args = [as_argument(target, name, value, lambda v: real(v), None) for name, value in operands.items()]
        given = with_outputs(target, attributes, count)
        try:
            if not is_small_result(target, operands, given):
                return None
            found = target(*args, **given)
        except FAILURES:
            return None  # as a node, it is refused where its types are told
        results = list(found) if isinstance(found, list | tuple) else [found]
        if all(isinstance(r, torch.Tensor) and is_small(tuple(r.shape), r.dtype) for r in results):
            return [of_entries(entries_of(r), r.dtype) for r in results]
        return None

    # -- calls --

    def _emit(
        self, node: Any, target: Op, operands: Mapping[str, Any], attributes: dict[str, Any], names: list[str]
    ) -> _Call:
        """Add the call of an operator, with the types of its results."""
        if target.key in _WITH_BODIES:
            raise UnsupportedOperatorError(
                f"node {node.name!r} is a {target.name}, whose course depends on data: leave it out of the exported "
                "part, or export the model with fixed control flow"
            )
        shown = with_outputs(target, attributes, len(names))
        if target.key == "Reshape":
            operands = {**operands, "shape": self._own_sizes(operands["data"], operands["shape"])}
        results = self._types(node, target, operands, shown, len(names))
        for name, value in operands.items():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, Found) and each.stored is not None:
                    self.uses.setdefault(each.stored.name, []).append((target.key, name))
        self._note_whole_weights(target, operands)
        args = [as_argument(target, name, value, lambda v: v.node, self.graph) for name, value in operands.items()]
        while args and args[-1] is None:
            args.pop()
        call = self.graph.create_node(
            "call_function", target, tuple(args), shown, name=identifier(node.name or target.name)
        )
        weights = [v.stored.name for v in operands.values() if isinstance(v, Found) and v.stored is not None]
        owner = owner_of(node, self._metadata.get(names[0], {}), weights)
        call.meta.update({ONNX: (node.name, tuple(names)), OWNER: owner})
        several = len(names) > 1 or target.key == "Split"
        call.meta[SPEC] = tuple(r.spec for r in results) if several else results[0].spec
        for index, result in enumerate(results):
            result.make = self._part(call, index, result) if several else lambda: call
        return _Call(results)

    def _note_whole_weights(self, target: Op, operands: Mapping[str, Any]) -> None:
        """Note a tensor of whole numbers that acts as a weight, where the number 0 stands for zero."""
        places = WEIGHTS.get(target.key)
        weight = operands[places[0]] if places is not None else None
        if places is None or weight is None or weight.stored is None:
            return
        zero = operands.get(places[2])
        if zero is None or (zero.entries is not None and all(entry == 0 for entry in zero.entries.flat)):
            self._whole_weights.add(weight.stored.name)

    def _own_sizes(self, data: Found, shape: Found) -> Found:
        """Let a shape copy sizes from the value it is for, where they are the same as what it copies from elsewhere."""
        if not self._apart or shape.entries is None or not has_size(shape.entries):
            return shape
        entries = shape.entries.copy()
        varying = data.spec.dynamic
        for dim, entry in enumerate(entries[: len(data.shape)]):
            here = (data.shape[dim], data.probe[dim])
            if isinstance(entry, Size) and varying[dim] and (entry.hint, entry.probe) == here and here[0] != here[1]:
                entries[dim] = self._extent(data, dim)
        return replace(shape, entries=entries, stored=None)

    def _part(self, call: fx.Node, index: int, result: Found) -> Callable[[], fx.Node]:
        import operator

        def make() -> fx.Node:
            with self.graph.inserting_after(call):
                node = self.graph.call_function(operator.getitem, (call, index))
            node.meta.update({SPEC: result.spec, OWNER: call.meta[OWNER]})
            return node

        return make

    def _types(
        self, node: Any, target: Op, operands: Mapping[str, Any], attributes: Mapping[str, Any], count: int
    ) -> list[Found]:
        """Type the results of an operator, for both sizes of the inputs."""
        flat = [
            v for value in operands.values() for v in (value if isinstance(value, list) else [value]) if v is not None
        ]
        first = self._run(node, target, operands, attributes, probe=False)
        varies = any(v.shape != v.probe or (v.entries is not None and has_size(v.entries)) for v in flat)
        second = self._run(node, target, operands, attributes, probe=True) if varies else first
        found = [
            Found("", shape, other, dtype, unmade) for (shape, dtype), (other, _) in zip(first, second, strict=True)
        ]
        if len(found) < count:
            raise CaptureError(f"node {node.name!r} ({node.op}) has {count} results; the operator yields {len(found)}")
        for each in found:
            each.varying = varying_dims(target, operands, each)
        return found[: max(count, 1)] if target.key != "Split" else found

    def _run(
        self, node: Any, target: Op, operands: Mapping[str, Any], attributes: Mapping[str, Any], *, probe: bool
    ) -> tuple[Type, ...]:
        """Return the types of the results; of operators that are alike, only the first is run."""

        def typed(value: Found) -> Type:
            return value.probe if probe else value.shape, value.dtype

        args = [as_argument(target, name, value, typed, None, probe=probe) for name, value in operands.items()]
        key = hashable((target, args, attributes))
        known = self._known.get(key) if key is not None else None
        if known is not None:
            return known
        try:
            found = without_values(target, args, attributes)
        except NotImplementedError as error:
            raise UnsupportedOperatorError(
                f"node {node.name!r} ({target}): the shape of its result is not known without its values ({error})"
            ) from error
        except FAILURES as error:
            shapes = [list(v.probe if probe else v.shape) for v in operands.values() if isinstance(v, Found)]
            raise MisfitError(
                f"node {node.name!r} ({target}) does not take operands of shape {shapes}: "
                f"{' '.join(str(error).split())}",
                probe=probe,
            ) from error
        results = found if isinstance(found, list | tuple) else [found]
        for each in results:
            if each.numel() > LARGEST_VALUE:
                raise MisfitError(
                    f"node {node.name!r} ({target}) yields {list(each.shape)}, {each.numel()} entries; at most "
                    f"{LARGEST_VALUE} are computed with",
                    probe=probe,
                )
        types = tuple((tuple(each.shape), each.dtype) for each in results)
        if key is not None:
            self._known[key] = types
        return types

    # -- the end --

    def parameters(self) -> None:
        """Make parameters of the tensors that act as weights; the rest are buffers."""
        for node in self.graph.find_nodes(op="get_attr"):
            path = str(node.target)
            tensor = _attribute_of(self.module, path)
            uses = self.uses.get(self.names.get(path, path), [])
            fixed = any(name in FIXED_OPERANDS.get(key, ()) for key, name in uses)
            if self.names.get(path, path) in self._whole_weights:
                set_tensor(self.module, path, nn.Parameter(tensor, requires_grad=False))
            elif tensor.is_floating_point() and tensor.numel() > 1 and uses and not fixed:
                trained = tensor.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
                set_tensor(self.module, path, nn.Parameter(tensor, requires_grad=trained))


@dataclass(frozen=True)
class _Call:
    results: list[Found]


class _Once:
    """Call a function the first time, and remember what it returned."""

    def __init__(self, function: Callable[[], _Call]) -> None:
        self._function = function
        self._found: _Call | None = None

    def __call__(self) -> _Call:
        if self._found is None:
            self._found = self._function()
        return self._found


_RANDOM: Final = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout")
)
_WITH_BODIES: Final = frozenset(("If", "Loop", "Scan", "SequenceMap"))


def _attribute_of(module: nn.Module, path: str) -> torch.Tensor:
    *parents, last = path.split(".")
    for part in parents:
        module = module._modules[part]  # type: ignore[assignment]
    found = module._parameters.get(last)
    return found if found is not None else module._buffers[last]  # type: ignore[return-value]
