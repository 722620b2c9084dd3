"""Build a graph of ONNX operators from a model that onnx-graphsurgeon holds.

What may live here: the walk over the model's nodes, which gives every value its type for two sizes of the inputs, takes
arithmetic on sizes out of the graph, and copies the rest.

A dimension varies where its size for the example inputs differs from that for inputs of other sizes. Sizes come from
running each operator on tensors without values, so a model of any size is read in little time and memory.
"""

from __future__ import annotations

import keyword
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from torch import fx, nn

from graphopt.capture.onnx.sizes import LARGEST, Entries, Size, UndecidedError, evaluated, has_size
from graphopt.dialects.onnx.operators import DOMAIN, NUMBERS, SIZES, Op, op
from graphopt.dialects.onnx.quantized import WEIGHTS
from graphopt.dialects.onnx.types import ONNX_TYPE, TORCH_TYPE, Filling
from graphopt.errors import CaptureError, UnsupportedOperatorError
from graphopt.graph import OWNER, SPEC, TensorSpec, TraceModule, set_tensor

__all__ = ["FAILURES", "Builder", "Found", "Stored"]

ONNX: Final = "onnx"
"""Key in ``node.meta`` of what the file calls a node and its results: ``(name, (result, …))``."""

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


Type = tuple[tuple[int, ...], torch.dtype]
"""The shape of a tensor, and the type of its entries."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its type, and its values when they are asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


@dataclass(eq=False)
class Found:
    """What is known of one value of the model.

    ``shape`` and ``probe`` are its shapes for the example inputs and for inputs of other sizes. ``entries`` are its
    numbers, where it is a small tensor of numbers that depend on sizes alone. ``make`` makes the node that yields it.
    """

    name: str
    shape: tuple[int, ...]
    probe: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], fx.Node]
    entries: Entries | None = None
    stored: Stored | None = None
    varying: frozenset[int] = frozenset()
    made: fx.Node | None = field(default=None, repr=False)

    @property
    def node(self) -> fx.Node:
        """The node that yields the value; made when first asked for."""
        if self.made is None:
            self.made = self.make()
        return self.made

    @property
    def spec(self) -> TensorSpec:
        """The value's type."""
        dynamic = tuple(
            a != b or d in self.varying for d, (a, b) in enumerate(zip(self.shape, self.probe, strict=True))
        )
        return TensorSpec(self.shape, self.dtype, dynamic)


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
        node = self.graph.placeholder(_identifier(name))
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
        if _is_small(stored.shape, stored.dtype):
            found.entries = _entries(stored.load())
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
        parts = [_attribute_name(part) for part in parts]
        path = ".".join(parts)
        while path in self._taken or path in self._parts or any(p in self._taken for p in _prefixes(path)):
            path = f"{path.replace('.', '_')}_"
        self._taken.add(path)
        self._parts.update(_prefixes(path))
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
                return self._attribute(result.name, _tensor(result.entries, result.dtype))
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
        if len(node.attrs) != 1 or not kind.startswith(("value", "sparse_value")) or held != _is_tensor(value):
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
                attributes[name] = self._filling(node, value) if _is_tensor(value) else value
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
        dtype = _result_type(target.name, present, attributes)
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
        return [_known(entries, dtype) for entries in results] if all(e.size <= LARGEST for e in results) else None

    def _shape(self, name: str, value: Found, attributes: Mapping[str, Any]) -> Found:
        spec = value.spec
        sizes: list[Any] = [
            self._extent(value, d) if varies else n
            for d, (n, varies) in enumerate(zip(spec.shape, spec.dynamic, strict=True))
        ]
        if name == "Size":
            return _known(_object(math.prod(sizes), ()), torch.int64)
        sizes = sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))]
        entries = np.empty(len(sizes), dtype=object)
        entries[:] = sizes
        return _known(entries, torch.int64)

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
            return None if value is None else _tensor(value.entries, value.dtype)

        args = [_argument(target, name, value, lambda v: real(v), None) for name, value in operands.items()]
        given = _with_outputs(target, attributes, count)
        try:
            if not _is_small_result(target, operands, given):
                return None
            found = target(*args, **given)
        except FAILURES:
            return None  # as a node, it is refused where its types are told
        results = list(found) if isinstance(found, list | tuple) else [found]
        if all(isinstance(r, torch.Tensor) and _is_small(tuple(r.shape), r.dtype) for r in results):
            return [_known(_entries(r), r.dtype) for r in results]
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
        shown = _with_outputs(target, attributes, len(names))
        if target.key == "Reshape":
            operands = {**operands, "shape": self._own_sizes(operands["data"], operands["shape"])}
        results = self._types(node, target, operands, shown, len(names))
        for name, value in operands.items():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, Found) and each.stored is not None:
                    self.uses.setdefault(each.stored.name, []).append((target.key, name))
        self._note_whole_weights(target, operands)
        args = [_argument(target, name, value, lambda v: v.node, self.graph) for name, value in operands.items()]
        while args and args[-1] is None:
            args.pop()
        call = self.graph.create_node(
            "call_function", target, tuple(args), shown, name=_identifier(node.name or target.name)
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
            Found("", shape, other, dtype, _unmade) for (shape, dtype), (other, _) in zip(first, second, strict=True)
        ]
        if len(found) < count:
            raise CaptureError(f"node {node.name!r} ({node.op}) has {count} results; the operator yields {len(found)}")
        for each in found:
            each.varying = _varying(target, operands, each)
        return found[: max(count, 1)] if target.key != "Split" else found

    def _run(
        self, node: Any, target: Op, operands: Mapping[str, Any], attributes: Mapping[str, Any], *, probe: bool
    ) -> tuple[Type, ...]:
        """Return the types of the results; of operators that are alike, only the first is run."""

        def typed(value: Found) -> Type:
            return value.probe if probe else value.shape, value.dtype

        args = [_argument(target, name, value, typed, None, probe=probe) for name, value in operands.items()]
        key = _hashable((target, args, attributes))
        known = self._known.get(key) if key is not None else None
        if known is not None:
            return known
        try:
            found = _without_values(target, args, attributes)
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


class MisfitError(Exception):
    """Say that an operator does not take the operands it is given, at these sizes of the inputs.

    ``probe`` says whether they are the other sizes than those of the example inputs.
    """

    def __init__(self, message: str, *, probe: bool) -> None:
        super().__init__(message)
        self.probe = probe


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


LARGEST_VALUE: Final = 1 << 33
"""Most entries that a value may have for the example inputs: what claims more is a mistake, or made to do harm."""

FAILURES: Final = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError),
)
"""What an operator may raise that is given operands or attributes that it does not take."""

_RANDOM: Final = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout")
)
_WITH_BODIES: Final = frozenset(("If", "Loop", "Scan", "SequenceMap"))
_SIZED: Final[dict[str, str]] = {"Reshape": "shape", "ConstantOfShape": "input"}
"""Operators whose operand has one entry a dimension of the result."""


@cache
def _reserved() -> frozenset[str]:
    """Return the names that a module has already, of which none can be a tensor's."""
    return frozenset((*dir(TraceModule(nn.Module(), fx.Graph())), "T_destination", "call_super_init"))


def _without_values(target: Op, args: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Call an operator on tensors of these types without values.

    What makes a tensor of numbers alone makes it without values, too.
    """
    given = [_on_meta(argument) for argument in args]
    tensors = (each for value in given for each in (value if isinstance(value, list) else [value]))
    if any(isinstance(each, torch.Tensor) for each in tensors):
        return target(*given, **attributes)
    with torch.device("meta"):
        return target(*given, **attributes)


def _is_small_result(target: Op, operands: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
    """Say whether an operator's results have few enough entries to compute them while a graph is read."""
    args = [_argument(target, name, value, lambda v: (v.shape, v.dtype), None) for name, value in operands.items()]
    try:
        found = _without_values(target, args, attributes)
    except NotImplementedError:  # as many as its values say, which are few
        return True
    results = found if isinstance(found, list | tuple) else [found]
    return all(isinstance(r, torch.Tensor) and _is_small(tuple(r.shape), r.dtype) for r in results)


def _unmade() -> fx.Node:
    raise AssertionError("a result without a call")


def _varying(target: Op, operands: Mapping[str, Any], result: Found) -> frozenset[int]:
    """Return the dimensions whose size is a number that varies, whatever it is for the sizes at hand."""
    name = _SIZED.get(target.key)
    given = operands[name] if name else None
    if given is not None and given.entries is not None and given.entries.size == len(result.shape):
        return frozenset(d for d, entry in enumerate(given.entries) if isinstance(entry, Size))
    if target.key == "Pad" and operands["pads"].entries is not None and operands.get("axes") is None:
        rank = len(result.shape)
        return frozenset(d % rank for d, entry in enumerate(operands["pads"].entries) if isinstance(entry, Size))
    if target.key == "Range":
        numbers = [operands[n].entries for n in ("start", "limit", "delta")]
        return frozenset({0}) if any(n is None or has_size(n) for n in numbers) else frozenset()
    return frozenset()


def _argument(
    target: Op, name: str, value: Any, tensor: Callable[[Found], Any], graph: fx.Graph | None, *, probe: bool = False
) -> Any:
    """Return what stands for an operand in a call: sizes and numbers as such, tensors as ``tensor`` says.

    Without a graph, a number that varies is the one it is for the example inputs, or for those of other sizes.
    """
    if value is None:
        return None
    if isinstance(value, list):
        return [None if each is None else tensor(each) for each in value]

    def number(entry: Any) -> Any:
        if isinstance(entry, Size):
            return entry.node(graph) if graph is not None else entry.probe if probe else entry.hint
        return entry

    if value.entries is not None and target.domain == DOMAIN:
        if name in SIZES.get(target.name, ()):
            return [number(entry) for entry in value.entries.reshape(-1)]
        if name in NUMBERS.get(target.name, ()) and value.entries.size == 1:
            return number(value.entries.reshape(-1)[0])
    return tensor(value)


def _on_meta(argument: Any) -> Any:
    """Make tensors without values of the types among an operator's arguments."""
    if isinstance(argument, tuple):
        shape, dtype = argument
        return torch.empty(shape, dtype=dtype, device="meta")
    if isinstance(argument, list):
        return [_on_meta(each) for each in argument]
    return argument


def _hashable(value: Any) -> Any:
    """Return something that is equal for equal arguments; None where tensors are among them."""
    if isinstance(value, list | tuple):
        parts = tuple(map(_hashable, value))
        return None if any(p is None and v is not None for p, v in zip(parts, value, strict=True)) else parts
    if isinstance(value, Mapping):
        return _hashable([*value.items()])
    if isinstance(value, torch.Tensor):
        return None
    # An absent operand is not the same as none that can be told apart, and 1 not the same as 1.0.
    return "absent" if value is None else (type(value), value)


def _with_outputs(target: Op, attributes: Mapping[str, Any], count: int) -> dict[str, Any]:
    if count > 1 and target.key != "Split":
        return {**attributes, "outputs": count}
    if target.key == "Split" and "num_outputs" not in attributes:
        return {**attributes, "num_outputs": count}
    return dict(attributes)


def _result_type(name: str, operands: Sequence[Found], attributes: Mapping[str, Any]) -> torch.dtype:
    if name == "Cast":
        return TORCH_TYPE[attributes["to"]]
    if name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or"):
        return torch.bool
    if name == "ConstantOfShape":
        return attributes["value"].dtype if "value" in attributes else torch.float32
    return operands[1 if name == "Where" else 0].dtype


def _known(entries: Entries, dtype: torch.dtype) -> Found:
    return Found("", entries.shape, entries.shape, dtype, _unmade, entries=entries)


def _is_small(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Say whether a constant's entries are looked at while a graph is read; those of weights are not."""
    count = math.prod(shape)
    return count <= 1 or (count <= 8 and len(shape) == 1) if dtype.is_floating_point else count <= LARGEST


def _is_tensor(value: Any) -> bool:
    """Say whether an attribute is a tensor of onnx-graphsurgeon, whose graphs answer for any attribute."""
    return "_values" in getattr(value, "__dict__", ())


def _entries(tensor: torch.Tensor) -> Entries:
    return _object(tensor.tolist(), tuple(tensor.shape))


def _object(value: Any, shape: tuple[int, ...]) -> Entries:
    made = np.empty(shape, dtype=object)
    made[...] = value
    return made


def _tensor(entries: Entries, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(entries.tolist(), dtype=dtype).reshape(entries.shape)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _identifier(name: str) -> str:
    """Return a name for a node: its characters go into code, so that none but letters, digits and _ may stay."""
    found = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "value"
    return f"{found}_" if found == "self" else found


def _attribute_name(part: str) -> str:
    """Return a part of a tensor's name as a module can have it, unchanged where that is possible.

    ``torch.fx`` writes it into the code of ``forward`` as it is: after a dot, or between quotes.
    """
    if part.isidentifier():
        plain = not keyword.iskeyword(part) and unicodedata.normalize("NFKC", part) == part
    else:
        plain = part.isprintable() and not set(part) & set('"\\{}')
    if not plain:
        part = re.sub(r"\W", "_", part, flags=re.ASCII) + "_"
    return f"{part}_" if part in _reserved() else part


def _attribute_of(module: nn.Module, path: str) -> torch.Tensor:
    *parents, last = path.split(".")
    for part in parents:
        module = module._modules[part]  # type: ignore[assignment]
    found = module._parameters.get(last)
    return found if found is not None else module._buffers[last]  # type: ignore[return-value]


def owner_of(node: Any, metadata: Mapping[str, str], weights: Sequence[str] = ()) -> str:
    """Return the module of the original that called an operator, as far as the exporter wrote it down.

    torch's exporters do: as metadata of the node, or in its name, ``/layer1/layer1.0/conv1/Conv``. Of other files, the
    names of the tensors it reads may tell, and else the node's own name serves.
    """
    scopes = metadata.get("pkg.torch.onnx.name_scopes")
    if scopes:
        import ast

        try:
            found = ast.literal_eval(scopes)
        except (ValueError, SyntaxError):
            found = []
        if isinstance(found, list) and len(found) > 1:
            return str(found[-2])
    if node.name.startswith("/"):
        parts = node.name.split("/")[1:-1]
        names: list[str] = []
        for part in parts:  # "blocks" and then "blocks.0" are one step
            names = [*names[:-1], part] if names and part.startswith(f"{names[-1]}.") else [*names, part]
        return ".".join(names)
    return next((name.rpartition(".")[0] for name in weights if "." in name), str(node.name))
