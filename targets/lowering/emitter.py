"""Build an ONNX graph: nodes, constants and sizes.

What may live here: what every translation needs to write ONNX, and nothing about particular ATen operators.

Sizes that depend on the inputs, and everything computed from them, are tensors of one entry: ``(1,)`` int64 (or
double, or bool). So a shape is a concatenation of them, and no scalar is ever unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import OWNER, SPEC, Graph, TensorSpec, tensor_spec

OPSET: Final = 20
"""Version of the standard operators: the first in which GELU is one operator, and old enough for today's runtimes."""

IR_VERSION: Final = 9
"""Version of the file format that came with that opset."""

# The numbers of onnx.TensorProto.DataType, so that onnx is not needed to know a type's number.
TYPES: Final[dict[torch.dtype, int]] = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.uint16: 4,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.uint32: 12,
    torch.uint64: 13,
    torch.bfloat16: 16,
}

MAXIMUM: Final = 2**63 - 1
"""What ONNX takes for "up to the end" in a slice."""

Value = str | Sequence["Value"] | int | float | None
"""What a translation returns: the name of a tensor, several of them, a plain number, or nothing of use."""


class Emitter:
    """Collect the nodes and constants of one ONNX graph.

    Calling it emits a node. A node that was emitted before with the same inputs and attributes is not repeated.
    """

    def __init__(self, graph: Graph) -> None:
        """Start an empty ONNX graph for ``graph``, which says the types of ATen values."""
        self.graph = graph
        self.values: dict[fx.Node, Value] = {}
        self.nodes: list[Any] = []
        self.constants: dict[str, torch.Tensor] = {}
        self._current: fx.Node | None = None
        self._names: set[str] = set()
        self._labels: set[str] = set()
        self._counts: dict[str, int] = {}
        self._seen: dict[Any, tuple[str, ...]] = {}
        self._small: dict[Any, str] = {}
        self._large: dict[int, tuple[torch.Tensor, str]] = {}

    # -- names --

    def begin(self, node: fx.Node) -> None:
        """Say which call is being translated: it gives the names to what is emitted from here on."""
        self._current = node

    def reserve(self, name: str) -> str:
        """Return ``name``, or the first of ``name.1``, ``name.2``, … that is not taken, and take it."""
        return _reserve(name, self._names, self._counts)

    # -- nodes --

    def __call__(self, operator: str, *inputs: str | None, **attributes: Any) -> str:
        """Emit a node with one output and return that output's name; an input of ``None`` is left out."""
        return self.several(operator, 1, *inputs, **attributes)[0]

    def several(self, operator: str, count: int, *inputs: str | None, **attributes: Any) -> tuple[str, ...]:
        """Emit a node with ``count`` outputs and return their names; attributes of ``None`` are left out."""
        from onnx import helper

        given = {name: value for name, value in attributes.items() if value is not None}
        key = (operator, count, inputs, tuple((name, _hashable(value)) for name, value in sorted(given.items())))
        found = self._seen.get(key)
        if found is None:
            base = self._current.name if self._current is not None else operator
            found = self._seen[key] = tuple(self.reserve(base) for _ in range(count))
            names = [name or "" for name in inputs]
            while names and not names[-1]:
                names.pop()
            self.nodes.append(helper.make_node(operator, names, list(found), name=self._label(operator), **given))
        return found

    def _label(self, operator: str) -> str:
        owner = self._current.meta.get(OWNER) if self._current is not None else None
        return _reserve(f"{owner}/{operator}" if owner else operator, self._labels, self._counts)

    # -- constants --

    def constant(self, value: Any, dtype: torch.dtype | None = None) -> str:
        """Return a constant: a tensor, a number, or a (nested) list of numbers; equal small ones are one."""
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)
        tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
        if tensor.numel() > 64:
            return self.weight(tensor, "constant")
        key = (tensor.dtype, tuple(tensor.shape), _bytes(tensor))
        if key not in self._small:
            self._small[key] = self._add(tensor, f"constant_{len(self._small)}")
        return self._small[key]

    def weight(self, tensor: torch.Tensor, name: str) -> str:
        """Return a constant under a name of its own; the same tensor object is stored once."""
        if id(tensor) not in self._large:
            self._large[id(tensor)] = (tensor, self._add(tensor, name))
        return self._large[id(tensor)][1]

    def _add(self, tensor: torch.Tensor, name: str) -> str:
        if tensor.dtype not in TYPES:
            raise UnsupportedOperatorError(f"a constant of type {tensor.dtype}, which ONNX does not have")
        name = self.reserve(name)
        self.constants[name] = tensor
        return name

    def derived(self, name: str, suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
        """Return a constant computed from another one, named after it; computed once for one suffix."""
        key = (name, suffix)
        if key not in self._small:
            self._small[key] = self._add(change(self.constants[name].detach()), name + suffix)
        return self._small[key]

    def known(self, name: str) -> torch.Tensor | None:
        """Return the value of a constant by its name; ``None`` if it is computed."""
        return self.constants.get(name)

    # -- arguments --

    def __getitem__(self, argument: Any) -> str:
        """Return the name of a tensor argument."""
        value = self.values[argument] if isinstance(argument, fx.Node) else argument
        if isinstance(value, str):
            return value
        raise UnsupportedOperatorError(f"a tensor is needed where {argument} yields {value!r}")

    def optional(self, argument: Any) -> str | None:
        """Return the name of a tensor argument that may be absent."""
        return None if argument is None else self[argument]

    def operand(self, argument: Any, dtype: torch.dtype) -> str:
        """Return an operand, tensor or number, as a tensor of ``dtype``; numbers have no dimensions."""
        if isinstance(argument, fx.Node):
            spec = argument.meta.get(SPEC)
            value = self.values[argument]
            if isinstance(value, int | float):
                return self.constant(value, dtype)
            if isinstance(spec, TensorSpec):
                return self.cast(self[argument], spec.dtype, dtype)
            return self("Squeeze", self.cast(self[argument], scalar_type(spec), dtype))
        return self.constant(argument, dtype)

    def cast(self, name: str, source: torch.dtype, target: torch.dtype) -> str:
        """Convert a tensor; nothing is emitted where it has the type already."""
        if source == target:
            return name
        known = self.known(name)
        if known is not None and known.numel() <= 64:
            return self.constant(known.to(target))
        return self("Cast", name, to=TYPES[target])

    # -- sizes --

    def size(self, value: Any) -> str:
        """Return a number, or the node of one, as an int64 tensor of shape ``(1,)``."""
        if isinstance(value, fx.Node):
            found = self.values[value]
            value = found if isinstance(found, int) else self[value]
        return value if isinstance(value, str) else self.constant([int(value)], torch.int64)

    def static(self, values: Iterable[Any]) -> list[int] | None:
        """Return sizes as plain integers, or ``None`` if one of them is known only at run time."""
        found = []
        for value in values:
            known = self.values[value] if isinstance(value, fx.Node) else value
            if not isinstance(known, int):
                return None
            found.append(int(known))
        return found

    def sizes(self, values: Sequence[Any]) -> str:
        """Return several sizes, each as for :meth:`size`, as one int64 vector."""
        known = self.static(v for v in values if not isinstance(v, str))
        if known is not None and len(known) == len(values):
            return self.constant(known, torch.int64)
        parts = [self.size(value) for value in values]
        return parts[0] if len(parts) == 1 else self("Concat", *parts, axis=0)

    def shape(self, name: str, spec: TensorSpec) -> list[int | str]:
        """Return the sizes of a tensor: integers where they are static, else the names of ``(1,)`` tensors."""
        return [self.extent(name, spec, dim) for dim in range(len(spec.shape))]

    def extent(self, name: str, spec: TensorSpec, dim: int) -> int | str:
        """Return one size of a tensor: an integer if it is static, else the name of a ``(1,)`` tensor."""
        dim %= len(spec.shape)
        return self("Shape", name, start=dim, end=dim + 1) if spec.dynamic[dim] else spec.shape[dim]

    # -- the commonest shape operators --

    def reshape(self, name: str, spec: TensorSpec, target: Sequence[Any]) -> str:
        """Reshape a tensor of type ``spec`` to sizes as for :meth:`size`, of which one may be -1.

        Sizes that are kept become 0 and one that is computed becomes -1, so that the shape is a constant where it can.
        """
        entries: list[Any] = [self._entry(value) for value in target]
        if 0 in entries:
            return self("Reshape", name, self.sizes(entries), allowzero=1)
        for i, entry in enumerate(entries):
            if isinstance(entry, str) and i < len(spec.shape) and entry == self._extent_if_known(name, spec, i):
                entries[i] = 0
        computed = [i for i, entry in enumerate(entries) if isinstance(entry, str)]
        if len(computed) == 1 and -1 not in entries:
            entries[computed[0]] = -1
        return self("Reshape", name, self.sizes(entries))

    def _entry(self, value: Any) -> int | str:
        if isinstance(value, fx.Node):
            value = self.values[value]
        return value if isinstance(value, str) else int(value)

    def _extent_if_known(self, name: str, spec: TensorSpec, dim: int) -> str | None:
        if not spec.dynamic[dim]:
            return None
        found = self._seen.get(("Shape", 1, (name,), (("end", dim + 1), ("start", dim))))
        return found[0] if found else None

    def transpose(self, name: str, order: Sequence[int]) -> str:
        """Permute dimensions; nothing is emitted for the identity."""
        return name if list(order) == sorted(order) else self("Transpose", name, perm=list(order))

    def unsqueeze(self, name: str, *dims: int) -> str:
        """Insert dimensions of size 1 at non-negative positions of the result."""
        return self("Unsqueeze", name, self.constant(list(dims), torch.int64)) if dims else name

    def squeeze(self, name: str, *dims: int) -> str:
        """Remove dimensions of size 1 at non-negative positions."""
        return self("Squeeze", name, self.constant(list(dims), torch.int64)) if dims else name

    def slice(self, name: str, dim: int, start: Any, stop: Any, step: int = 1) -> str:
        """Cut a range out of a dimension; bounds are as for :meth:`size`."""
        return self(
            "Slice",
            name,
            self.size(start),
            self.size(stop),
            self.constant([dim], torch.int64),
            *([self.constant([step], torch.int64)] if step != 1 else []),
        )

    def expand(self, name: str, target: Sequence[Any]) -> str:
        """Broadcast to sizes as for :meth:`size`; 1 keeps a size, as in ONNX."""
        return self("Expand", name, self.sizes(list(target)))

    def scalar(self, value: float | str, dtype: torch.dtype) -> str:
        """Return a number as a tensor of ``dtype`` without dimensions."""
        return value if isinstance(value, str) else self.constant(value, dtype)

    def zero(self, dtype: torch.dtype) -> str:
        """Return the constant 0."""
        return self.constant(0, dtype)


def _reserve(name: str, taken: set[str], counts: dict[str, int]) -> str:
    found, count = name, counts.get(name, 0)
    while found in taken:
        count += 1
        found = f"{name}.{count}"
    counts[name] = count
    taken.add(found)
    return found


def scalar_type(value: Any) -> torch.dtype:
    """Return the type of the tensor that stands for a symbolic number of this example value."""
    if isinstance(value, bool):
        return torch.bool
    if isinstance(value, int):
        return torch.int64
    if isinstance(value, float):
        return torch.float64
    raise TypeError(f"expected a number, found {value!r}")


def onnx_type(dtype: torch.dtype) -> int:
    """Return ONNX's number of a type.

    Raises:
        UnsupportedOperatorError: if ONNX has no such type.
    """
    if dtype not in TYPES:
        raise UnsupportedOperatorError(f"values of type {dtype}, which ONNX does not have")
    return TYPES[dtype]


def dims_of(value: Any, rank: int) -> list[int]:
    """Return a ``dim`` argument as non-negative dimensions; absent or empty means all."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return list(range(rank))
    return [d % max(rank, 1) for d in (value if isinstance(value, list | tuple) else [value])]


def is_float(dtype: torch.dtype) -> bool:
    """Say whether values of a type are floating-point numbers."""
    return dtype.is_floating_point


def out_spec(node: fx.Node) -> TensorSpec:
    """Return the type of a call's (first) result."""
    spec = node.meta.get(SPEC)
    if isinstance(spec, tuple) and spec and isinstance(spec[0], TensorSpec):
        return spec[0]
    return tensor_spec(node)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    return value
