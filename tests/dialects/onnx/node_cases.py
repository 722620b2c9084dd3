"""Turn the cases that ONNX ships for its operators, models of one node with inputs and results, into calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphopt.dialects.onnx.operators import NUMBERS, SIZES, Op, op


@dataclass(frozen=True)
class Case:
    """One case: the operator, a call's arguments, the expected results (None for text) and the tolerances."""

    name: str
    op: Op
    args: tuple[Any, ...]
    attributes: dict[str, Any]
    expected: tuple[Any, ...]
    rtol: float
    atol: float

    def run(self, device: str = "cpu") -> tuple[Any, ...]:
        """Call the operator and return all of its results, with the absent ones as None."""
        args = move(self.args, device) if device != "cpu" else self.args
        found = self.op(*args, **self.attributes)
        return tuple(found) if self.op.name == "Split" or "outputs" in self.attributes else (found,)


def move(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(move(v, device) for v in value)
    return value


def tensor(array: Any) -> Any:
    """Return an array as a tensor; of a type of four bits each value in a byte of its own."""
    if isinstance(array, list):
        return [tensor(a) for a in array]
    if hasattr(array, "data_type"):
        import onnx.numpy_helper

        array = onnx.numpy_helper.to_array(array)
    if array is None or not isinstance(array, np.ndarray | np.generic) or array.dtype.kind in "OUS":
        return array
    array = np.array(array, order="C")
    name = array.dtype.name
    if name == "float4_e2m1fn":
        return array  # torch has only pairs of them
    if name in ("int4", "uint4", "int2", "uint2"):
        return torch.from_numpy(array.astype(name[:-1] + "8"))
    kinds = {
        "bfloat16": torch.bfloat16,
        "float8_e4m3fn": torch.float8_e4m3fn,
        "float8_e4m3fnuz": torch.float8_e4m3fnuz,
        "float8_e5m2": torch.float8_e5m2,
        "float8_e5m2fnuz": torch.float8_e5m2fnuz,
        "float8_e8m0fnu": torch.float8_e8m0fnu,
    }
    if name in kinds:
        raw: npt.NDArray[Any] = array.view({1: np.uint8, 2: np.int16}[array.itemsize])
        return torch.from_numpy(raw.copy()).view(kinds[name])
    return torch.from_numpy(array)


@cache
def cases() -> dict[str, Case]:
    """Return ONNX's own cases by name: those of one node of the default domain."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_model_tests(kind="node")
    return {case.name: case for case in map(_case, filter(_wanted, loaded))}


def _wanted(given: Any) -> bool:
    nodes = given.model.graph.node
    return len(nodes) == 1 and nodes[0].domain in ("", "ai.onnx")


def _case(given: Any) -> Case:
    node = given.model.graph.node[0]
    inputs, expected = given.data_sets[0]
    values = {v.name: tensor(x) for v, x in zip(given.model.graph.input, inputs, strict=False)}
    args, attributes = call_of(node, values)
    if len(node.output) > 1:
        attributes["outputs"] = len(node.output)
    if any(a.HasField("g") for a in node.attribute):
        attributes["opset_version"] = given.model.opset_import[0].version
    results: list[Any] = [None] * len(node.output)
    for value, result in zip(given.model.graph.output, expected, strict=True):
        results[list(node.output).index(value.name)] = tensor(result)
    return Case(given.name, op(node.op_type), args, attributes, tuple(results), given.rtol, given.atol)


def call_of(node: Any, values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for a node, as the reader of ONNX files makes them."""
    import onnx.helper

    target = op(node.op_type, node.domain)
    args: list[Any] = []
    for i, parameter in enumerate(target.schema.inputs):
        if parameter.kind == "variadic":
            args.append([values[name] if name else None for name in node.input[i:]])
            break
        value = values[node.input[i]] if i < len(node.input) and node.input[i] else None
        if isinstance(value, Tensor) and parameter.name in SIZES.get(target.name, ()) and not target.domain:
            value = value.tolist() if value.numel() or value.dim() else None
        if isinstance(value, Tensor) and parameter.name in NUMBERS.get(target.name, ()) and not target.domain:
            value = value.reshape(()).item()
        args.append(value)
    attributes = dict(_attributes(node, onnx.helper.get_attribute_value))
    # Before opset 18 some axes were an attribute.
    for i, parameter in enumerate(target.schema.inputs):
        if parameter.name in attributes:
            args[i] = attributes.pop(parameter.name)
    while args and args[-1] is None:
        args.pop()
    return tuple(args), attributes


def _attributes(node: Any, read: Any) -> Iterator[tuple[str, Any]]:
    for attribute in node.attribute:
        value = read(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, list) and value and isinstance(value[0], bytes):
            value = [v.decode() for v in value]
        yield attribute.name, value
