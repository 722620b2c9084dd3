"""Evaluate the arithmetic on sizes that exporters write into ONNX graphs: Shape, Gather, Concat and what lies between.

What may live here: numbers that depend on the sizes of inputs, and the operators that are evaluated on them while a
graph is read, so that sizes become arguments. Small tensors of numbers are arrays of objects here: plain numbers, and
:class:`Size` where a number varies.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from graphopt.graph import SPEC

__all__ = ["Entries", "Size", "UndecidedError", "evaluated", "has_size"]

Entries = npt.NDArray[np.object_]
"""The entries of a small tensor: numbers, truth values and sizes."""

SYM_SIZE: Final = torch.ops.aten.sym_size.int


class UndecidedError(Exception):
    """Say that a comparison comes out differently for different sizes of the inputs."""


@dataclass(eq=False, slots=True)
class Size:
    """A number that depends on the sizes of the inputs: a dimension of a value, or computed from such.

    ``hint`` is its value for the example inputs, ``probe`` for inputs of other sizes.
    """

    function: Any
    arguments: tuple[Any, ...]
    hint: int | float
    probe: int | float
    made: fx.Node | None = field(default=None, repr=False)

    @classmethod
    def of(cls, node: fx.Node, dim: int, hint: int, probe: int) -> Size:
        """Return the size of a dimension of a value."""
        return cls(SYM_SIZE, (node, dim), hint, probe)

    def node(self, graph: fx.Graph) -> fx.Node:
        """Return the node that yields the number, made at the graph's insertion point the first time."""
        if self.made is None:
            arguments = tuple(a.node(graph) if isinstance(a, Size) else a for a in self.arguments)
            self.made = graph.call_function(self.function, arguments)
            self.made.meta[SPEC] = self.hint
        return self.made

    def __add__(self, other: Any) -> Any:
        return self if _is(other, 0) else _computed(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __sub__(self, other: Any) -> Any:
        return self if _is(other, 0) else 0 if other is self else _computed(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _computed(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return self if _is(other, 1) else 0 if _is(other, 0) else _computed(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return self * other

    def __floordiv__(self, other: Any) -> Any:
        if _is(other, 1):
            return self
        factor = _other_factor(self, other)
        return _computed(operator.floordiv, self, other) if factor is None else factor

    def __rfloordiv__(self, other: Any) -> Any:
        return _computed(operator.floordiv, other, self)

    def __truediv__(self, other: Any) -> Any:
        return _computed(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _computed(operator.truediv, other, self)

    def __mod__(self, other: Any) -> Any:
        return _computed(operator.mod, self, other)

    def __rmod__(self, other: Any) -> Any:
        return _computed(operator.mod, other, self)

    def __neg__(self) -> Any:
        return _computed(operator.neg, self)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other or _decided(operator.eq, self, other)

    def __ne__(self, other: object) -> bool:
        return self is not other and _decided(operator.ne, self, other)

    def __lt__(self, other: Any) -> bool:
        return _decided(operator.lt, self, other)

    def __le__(self, other: Any) -> bool:
        return _decided(operator.le, self, other)

    def __gt__(self, other: Any) -> bool:
        return _decided(operator.gt, self, other)

    def __ge__(self, other: Any) -> bool:
        return _decided(operator.ge, self, other)

    def __bool__(self) -> bool:
        return _decided(operator.ne, self, 0)


def _is(value: Any, number: int) -> bool:
    return not isinstance(value, Size) and bool(value == number)


def _other_factor(product: Size, factor: Any) -> Any:
    """Return what is left of a product when one of its factors is divided out; None where it is not one of them."""
    if product.function is operator.mul and not isinstance(factor, Size):
        left, right = product.arguments
        for given, rest in ((left, right), (right, left)):
            if not isinstance(given, Size) and given == factor:
                return rest
    return None


def _computed(function: Callable[..., Any], *arguments: Any) -> Any:
    hints = [a.hint if isinstance(a, Size) else a for a in arguments]
    probes = [a.probe if isinstance(a, Size) else a for a in arguments]
    if not any(isinstance(a, Size) for a in arguments):
        return function(*arguments)
    plain = tuple(a if isinstance(a, Size) else _plain(a) for a in arguments)
    return Size(function, plain, function(*hints), function(*probes))


def _decided(function: Callable[[Any, Any], bool], *arguments: Any) -> bool:
    hints = [a.hint if isinstance(a, Size) else a for a in arguments]
    probes = [a.probe if isinstance(a, Size) else a for a in arguments]
    found = bool(function(*hints))
    if found != bool(function(*probes)):
        raise UndecidedError(f"{function.__name__} of {hints} and of {probes}")
    return found


def _plain(value: Any) -> int | float | bool:
    return value.item() if isinstance(value, np.generic) else value  # type: ignore[no-any-return]


def has_size(entries: Entries) -> bool:
    """Say whether an entry depends on the sizes of the inputs."""
    return any(isinstance(entry, Size) for entry in entries.flat)


# -- operators --------------------------------------------------------------------------------------------------------


def evaluated(name: str, inputs: Sequence[Any], attributes: Mapping[str, Any], *, real: bool) -> Any:
    """Apply an operator of the default domain to small tensors of numbers.

    Args:
        name: the operator.
        inputs: the entries of its inputs, None where one is absent, a list of several where it is variadic.
        attributes: its attributes, by name.
        real: whether the result is a tensor of real numbers, and not of integers or truth values.

    Returns:
        The result's entries; a list of several for a Split; None for an operator that is not evaluated here.

    Raises:
        UndecidedError: the result depends on more than the sizes.
    """
    function = _FUNCTIONS.get(name)
    if function is None:
        return None
    return function(list(inputs), attributes, real)


Function = Callable[[Any, Mapping[str, Any], bool], Any]


def _array(value: Any, shape: tuple[int, ...] | None = None) -> Entries:
    made = np.empty(np.shape(value) if shape is None else shape, dtype=object)
    made[...] = value
    return made


def _elementwise(function: Callable[..., Any]) -> Function:
    def apply(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
        arrays = np.broadcast_arrays(*inputs)
        result = np.empty(arrays[0].shape, dtype=object)
        for index in np.ndindex(result.shape):
            result[index] = function(*(array[index] for array in arrays))
        return result

    return apply


def _divide(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    def divided(a: Any, b: Any) -> Any:
        if real:
            return a / b
        if not isinstance(a, Size) and not isinstance(b, Size):
            return int(a / b) if (a < 0) != (b < 0) else a // b
        return a // b

    return _elementwise(divided)(inputs, attributes, real)


def _cast(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    def cast(value: Any) -> Any:
        if real:
            return value if isinstance(value, Size) else float(value)
        if isinstance(value, Size):
            return value if isinstance(value.hint, int) else _computed(int, value)
        return value if isinstance(value, bool) and attributes.get("to") == 9 else int(value)

    if attributes.get("to") == 9:
        return _elementwise(bool)(inputs, attributes, real)
    return _elementwise(cast)(inputs, attributes, real)


def _rounded(function: Callable[[Any], Any]) -> Function:
    def apply(value: Any) -> Any:
        if isinstance(value, Size):
            return value if isinstance(value.hint, int) else _computed(function, value)
        return float(function(value))

    return _elementwise(apply)


def _extreme(function: Callable[..., Any]) -> Function:
    return _elementwise(lambda *values: _computed(function, *values) if len(values) > 1 else values[0])


def _where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


def _ints(entries: Any) -> list[int]:
    found = list(np.asarray(entries, dtype=object).reshape(-1))
    if any(isinstance(entry, Size) for entry in found):
        raise UndecidedError("a position that varies")
    return [int(entry) for entry in found]


def _gather(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    data, indices = inputs
    positions = np.asarray(_ints(indices), dtype=np.int64).reshape(indices.shape)
    return _array(np.take(data, positions, axis=attributes.get("axis", 0)))


def _concat(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    return _array(np.concatenate(inputs[0], axis=attributes["axis"]))


def _slice(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    data, starts, ends, axes, steps = [*inputs, None, None][:5]
    starts, ends = _ints(starts), _ints(ends)
    axes = list(range(len(starts))) if axes is None else _ints(axes)
    steps = [1] * len(starts) if steps is None else _ints(steps)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise UndecidedError("a slice that runs backwards")
        data = data[(slice(None),) * (axis % data.ndim) + (slice(start, end, step),)]
    return _array(data)


def _unsqueeze(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    data, axes = inputs
    rank = data.ndim + len(_ints(axes))
    for axis in sorted(axis % rank for axis in _ints(axes)):
        data = np.expand_dims(data, axis)
    return _array(data)


def _squeeze(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    data, axes = [*inputs, None][:2]
    return _array(np.squeeze(data) if axes is None else np.squeeze(data, tuple(_ints(axes))))


def _reshape(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    data, shape = inputs
    sizes = [
        data.shape[i] if size == 0 and not attributes.get("allowzero") else size for i, size in enumerate(_ints(shape))
    ]
    return _array(data.reshape(sizes))


def _reduced(function: Callable[[Any, Any], Any]) -> Function:
    def apply(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
        data, axes = [*inputs, None][:2]
        if data.ndim != 1 or (axes is not None and _ints(axes) not in ([0], [-1])) or not data.size:
            raise UndecidedError("a reduction of more than one dimension")
        total = data[0]
        for each in data[1:]:
            total = function(total, each)
        return _array(total, (1,) if attributes.get("keepdims", 1) else ())

    return apply


def _split(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    data, sizes = [*inputs, None][:2]
    axis = attributes.get("axis", 0)
    count = attributes.get("num_outputs") or attributes.get("outputs", 1)
    if sizes is None:
        step = -(-data.shape[axis] // count)
        sizes = [step] * (data.shape[axis] // step) + ([data.shape[axis] % step] if data.shape[axis] % step else [])
    bounds = np.cumsum(_ints(sizes))[:-1]
    return [_array(part) for part in np.split(data, bounds, axis=axis)]


def _constant_of_shape(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    value = attributes.get("value")
    shape = _ints(inputs[0])
    if math.prod(shape) > LARGEST:
        raise UndecidedError("a constant too large to be one of numbers")
    number = 0 if value is None else value.number
    return _array(number, tuple(shape))


def _expand(inputs: Any, attributes: Mapping[str, Any], real: bool) -> Any:
    data, shape = inputs
    wanted = np.broadcast_shapes(data.shape, tuple(_ints(shape)))
    if math.prod(wanted) > LARGEST:
        raise UndecidedError("a constant too large to be one of numbers")
    return _array(np.broadcast_to(data, wanted))


LARGEST: Final = 4096
"""How many entries a tensor of numbers may have to be evaluated while a graph is read."""

_FUNCTIONS: Final[dict[str, Function]] = {
    "Add": _elementwise(operator.add),
    "And": _elementwise(lambda a, b: bool(a) and bool(b)),
    "Cast": _cast,
    "Ceil": _rounded(math.ceil),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _divide,
    "Equal": _elementwise(operator.eq),
    "Expand": _expand,
    "Floor": _rounded(math.floor),
    "Gather": _gather,
    "Greater": _elementwise(operator.gt),
    "GreaterOrEqual": _elementwise(operator.ge),
    "Identity": lambda inputs, attributes, real: inputs[0],
    "Less": _elementwise(operator.lt),
    "LessOrEqual": _elementwise(operator.le),
    "Max": lambda inputs, attributes, real: _extreme(max)(inputs[0], attributes, real),
    "Min": lambda inputs, attributes, real: _extreme(min)(inputs[0], attributes, real),
    "Mod": _elementwise(operator.mod),
    "Mul": _elementwise(operator.mul),
    "Neg": _elementwise(operator.neg),
    "Not": _elementwise(lambda value: not value),
    "Or": _elementwise(lambda a, b: bool(a) or bool(b)),
    "ReduceMax": _reduced(lambda a, b: _computed(max, a, b)),
    "ReduceMin": _reduced(lambda a, b: _computed(min, a, b)),
    "ReduceProd": _reduced(operator.mul),
    "ReduceSum": _reduced(operator.add),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _elementwise(operator.sub),
    "Unsqueeze": _unsqueeze,
    "Where": _elementwise(_where),
}
