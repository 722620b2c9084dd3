"""Put the operands of an operator as its call takes them, with values or without, and type its results.

What may live here: what is asked of one operator of a model while it is read; nothing here changes a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx

from graphopt.capture.onnx.sizes import Size, has_size
from graphopt.capture.onnx.values import Found, is_small
from graphopt.dialects.onnx.operators import DOMAIN, NUMBERS, SIZES, Op
from graphopt.dialects.onnx.types import TORCH_TYPE


class MisfitError(Exception):
    """Say that an operator does not take the operands it is given, at these sizes of the inputs.

    ``probe`` says whether they are the other sizes than those of the example inputs.
    """

    def __init__(self, message: str, *, probe: bool) -> None:
        super().__init__(message)
        self.probe = probe


LARGEST_VALUE: Final = 1 << 33
"""Most entries that a value may have for the example inputs: what claims more is a mistake, or made to do harm."""


FAILURES: Final = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError),
)
"""What an operator may raise that is given operands or attributes that it does not take."""


_SIZED: Final[dict[str, str]] = {"Reshape": "shape", "ConstantOfShape": "input"}
"""Operators whose operand has one entry a dimension of the result."""


def without_values(target: Op, args: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Call an operator on tensors of these types without values.

    What makes a tensor of numbers alone makes it without values, too.
    """
    given = [on_meta(argument) for argument in args]
    tensors = (each for value in given for each in (value if isinstance(value, list) else [value]))
    if any(isinstance(each, torch.Tensor) for each in tensors):
        return target(*given, **attributes)
    with torch.device("meta"):
        return target(*given, **attributes)


def is_small_result(target: Op, operands: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
    """Say whether an operator's results have few enough entries to compute them while a graph is read."""
    args = [as_argument(target, name, value, lambda v: (v.shape, v.dtype), None) for name, value in operands.items()]
    try:
        found = without_values(target, args, attributes)
    except NotImplementedError:  # as many as its values say, which are few
        return True
    results = found if isinstance(found, list | tuple) else [found]
    return all(isinstance(r, torch.Tensor) and is_small(tuple(r.shape), r.dtype) for r in results)


def varying_dims(target: Op, operands: Mapping[str, Any], result: Found) -> frozenset[int]:
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


def as_argument(
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


def on_meta(argument: Any) -> Any:
    """Make tensors without values of the types among an operator's arguments."""
    if isinstance(argument, tuple):
        shape, dtype = argument
        return torch.empty(shape, dtype=dtype, device="meta")
    if isinstance(argument, list):
        return [on_meta(each) for each in argument]
    return argument


def hashable(value: Any) -> Any:
    """Return something that is equal for equal arguments; None where tensors are among them."""
    if isinstance(value, list | tuple):
        parts = tuple(map(hashable, value))
        return None if any(p is None and v is not None for p, v in zip(parts, value, strict=True)) else parts
    if isinstance(value, Mapping):
        return hashable([*value.items()])
    if isinstance(value, torch.Tensor):
        return None
    # An absent operand is not the same as none that can be told apart, and 1 not the same as 1.0.
    return "absent" if value is None else (type(value), value)


def with_outputs(target: Op, attributes: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the attributes of a call of which the file names so many results."""
    if count > 1 and target.key != "Split":
        return {**attributes, "outputs": count}
    if target.key == "Split" and "num_outputs" not in attributes:
        return {**attributes, "num_outputs": count}
    return dict(attributes)


def result_type(name: str, operands: Sequence[Found], attributes: Mapping[str, Any]) -> torch.dtype:
    """Return the type of what an operator makes of small tensors of numbers."""
    if name == "Cast":
        return TORCH_TYPE[attributes["to"]]
    if name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or"):
        return torch.bool
    if name == "ConstantOfShape":
        return attributes["value"].dtype if "value" in attributes else torch.float32
    return operands[1 if name == "Where" else 0].dtype
