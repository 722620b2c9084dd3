"""Compute with ONNX Runtime what has no function here: a model of one node, on the CPU and without gradients.

On meta tensors onnx's own shape inference tells the results' shapes, where it can. A node may carry graphs (the body
of a Loop); values that such a graph takes from outside are given by name, as ``captured``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from graphopt.dialects.onnx.types import ONNX_TYPE, TORCH_TYPE
from graphopt.errors import MissingDependencyError

__all__ = ["call"]

_STRING: Final = 8
_TEXT: Final = "OUS"
"""Kinds of numpy arrays that hold text."""
_IR_VERSION: Final = 10


def call(
    key: str,
    *args: Any,
    outputs: int = 1,
    captured: Mapping[str, Tensor] | None = None,
    opset_version: int | None = None,
    **attributes: Any,
) -> Any:
    """Run one operator, given by its key, on operands as calls of the dialect have them.

    Args:
        key: the operator, with its domain unless that is the default one.
        args: its inputs; text is a numpy array.
        outputs: how many results there are.
        captured: the values that graphs among the attributes take from outside.
        opset_version: the version that graphs among the attributes are written in; the newest unless told otherwise.
        attributes: its attributes; a graph is a GraphProto, a tensor may be torch's.

    Raises:
        NotImplementedError: neither ONNX Runtime nor, on meta tensors, onnx knows what it yields.
        MissingDependencyError: onnxruntime is not installed.
    """
    slots = _slots(args, _variadic(key))
    values = {name: _operand(value) for name, value in slots if name}
    outer = {name: _operand(value) for name, value in (captured or {}).items()}
    found = _tensors([*values.values(), *outer.values()])
    node = _Node(key, tuple(name for name, _ in slots), outputs, attributes, opset_version)
    if any(t.is_meta for t in found):
        return _shaped(node, values, outer)
    device = next((t.device for t in found), torch.device("cpu"))
    results = _run(node, values | outer)
    moved = [r.to(device) if isinstance(r, Tensor) else r for r in results]
    return moved[0] if outputs == 1 else tuple(moved)


class _Node:
    """One node without its values, which is what a session is made for."""

    def __init__(
        self, key: str, inputs: tuple[str, ...], outputs: int, attributes: Mapping[str, Any], opset: int | None
    ) -> None:
        self.opset = opset
        self.domain, _, self.name = key.rpartition(".")
        self.inputs = inputs
        self.outputs = [f"y{i}" for i in range(outputs)]
        self.attributes = {name: value for name, value in attributes.items() if value is not None}

    def model(self, types: Mapping[str, Any], constants: Sequence[Any] = ()) -> Any:
        """Return the model, given the types of its inputs and tensors that are known."""
        import onnx
        from onnx import helper

        attributes = {name: _attribute(value) for name, value in self.attributes.items()}
        node = helper.make_node(self.name, self.inputs, self.outputs, domain=self.domain, **attributes)
        graph = helper.make_graph(
            [node],
            "node",
            [onnx.ValueInfoProto(name=name, type=kind) for name, kind in types.items()],
            [onnx.ValueInfoProto(name=name) for name in self.outputs],
            initializer=constants,
        )
        imports = [helper.make_opsetid("", self.opset or _opset())]
        if self.domain:
            imports.append(helper.make_opsetid(self.domain, 1))
        return helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION)


@cache
def _variadic(key: str) -> int | None:
    """Return from which input on there may be any number; onnx tells that of its own operators only."""
    import onnx.defs

    if "." in key:
        return None
    inputs = onnx.defs.get_schema(key).inputs
    options = [p.option == onnx.defs.OpSchema.FormalParameterOption.Variadic for p in inputs]
    return options.index(True) if True in options else len(inputs)


def _slots(args: Sequence[Any], variadic: int | None) -> list[tuple[str, Any]]:
    """Return the inputs of the node by name; an absent one has no name.

    A list of tensors is one input, a sequence, unless the operator takes any number from there on.
    """
    found: list[tuple[str, Any]] = []
    for i, value in enumerate(args):
        if i == variadic or (variadic is None and isinstance(value, list) and _tensors(value)):
            found += [("" if each is None else f"x{i}_{j}", each) for j, each in enumerate(value)]
        else:
            found.append(("" if value is None else f"x{i}", value))
    return found


def _operand(value: Any) -> Any:
    """Return an operand as a tensor, a list of tensors or an array of text."""
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in _TEXT):
        return value
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
        return list(value)
    if isinstance(value, list | tuple):
        return torch.tensor(value, dtype=torch.float32 if any(isinstance(v, float) for v in value) else torch.int64)
    return torch.as_tensor(value)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [t for v in values for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]


def _attribute(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    import onnx

    flat = value.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return onnx.TensorProto(data_type=ONNX_TYPE[value.dtype], dims=list(value.shape), raw_data=raw)


def _type(value: Any, *, shaped: bool) -> Any:
    from onnx import helper

    if isinstance(value, list):
        code = ONNX_TYPE[value[0].dtype] if value else ONNX_TYPE[torch.float32]
        return helper.make_sequence_type_proto(helper.make_tensor_type_proto(code, None))
    code = ONNX_TYPE[value.dtype] if isinstance(value, Tensor) else _STRING
    return helper.make_tensor_type_proto(code, list(value.shape) if shaped else None)


@cache
def _opset() -> int:
    """Return the newest opset that both onnx and ONNX Runtime have."""
    import onnx.defs
    from onnx import helper

    newest: int = onnx.defs.onnx_opset_version()
    kind = helper.make_tensor_type_proto(ONNX_TYPE[torch.float32], [])
    start, end = (onnx.ValueInfoProto(name=name, type=kind) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "opset", [start], [end])
    for opset in range(newest, 0, -1):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR_VERSION)
        try:
            _session(model.SerializeToString())
        except _failures():
            continue
        return opset
    raise NotImplementedError("ONNX Runtime takes no opset that onnx has")


def _failures() -> tuple[type[Exception], ...]:
    state = _runtime().capi.onnxruntime_pybind11_state
    return (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException)


def _runtime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        purpose = "computing an operator that has no function of its own"
        raise MissingDependencyError("onnx", package="onnxruntime", purpose=purpose) from error
    return onnxruntime


def _run(node: _Node, values: Mapping[str, Any]) -> list[Any]:
    """Run the node; where ONNX Runtime has it in no double precision, in single."""
    try:
        return _in_session(node, values)
    except NotImplementedError:
        if not any(t.dtype == torch.float64 for t in _tensors(list(values.values()))):
            raise
    single = {name: _recast(value, torch.float64, torch.float32) for name, value in values.items()}
    return [_recast(r, torch.float32, torch.float64) for r in _in_session(node, single)]


def _recast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_recast(v, old, new) for v in value]
    return value.to(new) if isinstance(value, Tensor) and value.dtype == old else value


def _in_session(node: _Node, values: Mapping[str, Any]) -> list[Any]:
    model = node.model({name: _type(value, shaped=False) for name, value in values.items()})
    try:
        session = _session(model.SerializeToString(deterministic=True))
        found = session.run(None, {name: _array(value) for name, value in values.items()})
    except _failures() as error:
        text = " ".join(str(error).split())
        raise NotImplementedError(f"{node.name}, which ONNX Runtime does not compute: {text}") from error
    return [_result(value) for value in found]


@lru_cache(maxsize=256)
def _session(model: bytes) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _array(value: Any) -> Any:
    if isinstance(value, list):
        return [_array(v) for v in value]
    if not isinstance(value, Tensor):
        return value.astype(object)
    value = value.detach().cpu()
    try:
        return value.numpy()
    except TypeError:
        # numpy has no such type: ONNX Runtime takes its bits.
        bits = value.contiguous().view({1: torch.uint8, 2: torch.int16}[value.itemsize]).numpy()
        return _runtime().OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_TYPE[value.dtype])


def _result(value: Any) -> Any:
    if isinstance(value, list):
        return [_result(v) for v in value]
    if value is None or (isinstance(value, np.ndarray) and value.dtype.kind in _TEXT):
        return value
    return torch.from_numpy(np.array(value))


def _shaped(node: _Node, values: Mapping[str, Any], outer: Mapping[str, Any]) -> Any:
    """Return meta tensors of the shapes that onnx infers."""
    import onnx
    import onnx.shape_inference

    constants = [
        onnx.TensorProto(name=name, **{f: getattr(proto, f) for f in ("data_type", "dims", "raw_data")})
        for name, value in values.items()
        if isinstance(value, Tensor) and not value.is_meta
        for proto in [_attribute(value)]
    ]
    types = {name: _type(value, shaped=True) for name, value in (dict(values) | dict(outer)).items()}
    try:
        inferred = onnx.shape_inference.infer_shapes(node.model(types, constants), data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise NotImplementedError(f"{node.name}: {error}") from error
    found = []
    for value in inferred.graph.output:
        kind = value.type.tensor_type
        if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
            raise NotImplementedError(f"{node.name}: onnx does not tell the shape of its result without values")
        shape = [d.dim_value for d in kind.shape.dim]
        found.append(torch.empty(shape, dtype=TORCH_TYPE[kind.elem_type], device="meta"))
    return found[0] if len(found) == 1 else tuple(found)
