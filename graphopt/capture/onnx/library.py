"""Have onnx's own code check, inline and convert a model, without its weights and in another process.

What may live here: the copy of a model without its large tensors, sending it to ``worker``, and putting the tensors
back into what returns. So C++ never sees a file, and a model of any size costs it only its nodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from graphopt.capture.onnx.weights import Weights, short, type_name
from graphopt.errors import CaptureError

if TYPE_CHECKING:
    import onnx

__all__ = ["check", "rewrite"]

_SMALL: Final = 1 << 12
"""Bytes up to which a tensor is sent along: sizes, axes and scales, from which shapes are inferred."""

_SECONDS: Final = 60
"""Time that onnx may take, and as many seconds more for every so many nodes."""
_NODES: Final = 10_000

_RUNTIME_OPERATORS: Final = ("SimplifiedLayerNormalization",)
"""Operators that ONNX Runtime has in the default domain and onnx does not."""


def check(model: onnx.ModelProto, weights: Weights) -> list[str]:
    """Have a model checked; return notes on declared types that are wrong and do no harm.

    Raises:
        CaptureError: if onnx says that it is no model.
    """
    found, _ = _run({"check": True}, _skeleton(model), weights, len(model.graph.node))
    outputs = {value.name for value in model.graph.output}
    notes = []
    for name, declared, inferred in found["types"]:
        if name in outputs:
            raise weights.error(
                f"output '{short(name)}'",
                f"declared {type_name(declared)}, computed {type_name(inferred)}",
                "the type that is computed",
                "declare the output with that type, or put a Cast before it",
            )
        notes.append(
            f"value {short(name)} is declared {type_name(declared)} and computed {type_name(inferred)}: the "
            "declaration was ignored"
        )
    wrong = {name for name, _, _ in found["types"]}
    if wrong:
        kept = [value for value in model.graph.value_info if value.name not in wrong]
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)
    return notes


def rewrite(model: onnx.ModelProto, weights: Weights, *, inline: bool = False, convert: int = 0) -> onnx.ModelProto:
    """Return a model with its functions inlined, or with operators of another version; with all its tensors.

    Raises:
        CaptureError: if onnx cannot do it.
    """
    import onnx

    skeleton = _skeleton(model)
    _, data = _run({"inline": inline, "convert": convert}, skeleton, weights, len(model.graph.node))
    result: onnx.ModelProto = onnx.ModelProto.FromString(data)
    stand_ins = {value.name for value in skeleton.graph.input} - {value.name for value in model.graph.input}
    inputs = [value for value in result.graph.input if value.name not in stand_ins]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    present = {tensor.name for tensor in result.graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name in stand_ins and tensor.name not in present:
            result.graph.initializer.append(tensor)
    for name in ("metadata_props", "opset_import") if inline else ("metadata_props",):
        if not getattr(result, name):
            getattr(result, name).extend(getattr(model, name))
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if model.HasField(name) and not result.HasField(name):
            setattr(result, name, getattr(model, name))
    return result


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with inputs in place of its large tensors, which typing and checking cannot tell apart.

    Graphs inside nodes keep what they hold: their tensors are small, or were moved out.
    """
    import onnx

    skeleton = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            continue
        if field.name in _REPEATED:
            getattr(skeleton, field.name).extend(value)
        else:
            setattr(skeleton, field.name, value)
    graph, source = skeleton.graph, model.graph
    graph.name = source.name or "graph"
    for name in ("node", "input", "output", "value_info"):
        getattr(graph, name).extend(getattr(source, name))
    skeleton.ir_version = max(model.ir_version, 4)  # from 4 on, initializers need not be inputs
    for tensor in source.initializer:
        if tensor.data_location != tensor.EXTERNAL and tensor.ByteSize() <= _SMALL:
            graph.initializer.append(tensor)
        else:
            shape = list(tensor.dims)
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
    for node in graph.node:
        if not node.domain and node.op_type in _RUNTIME_OPERATORS:
            node.domain = "com.microsoft"
    return skeleton


_REPEATED: Final = ("opset_import", "metadata_props", "training_info", "functions", "configuration")


def _run(
    tasks: dict[str, Any], model: onnx.ModelProto, weights: Weights, node_count: int
) -> tuple[dict[str, Any], bytes]:
    message = json.dumps(tasks).encode() + b"\n" + model.SerializeToString()
    seconds = _SECONDS * (1 + node_count // _NODES)
    script = str(Path(__file__).with_name("worker.py"))
    try:
        done = subprocess.run(
            [sys.executable, "-P", script], input=message, capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _refused(weights, "onnx did not come to an end with this model", f"{seconds} seconds at most") from error
    line, newline, data = done.stdout.partition(b"\n")
    if done.returncode or not newline:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise _refused(weights, f"a model on which onnx breaks off ({short(reason[0])})", "a well-formed model")
    found = json.loads(line)
    if "failed" in found:
        step = {
            "inline": "functions that onnx cannot inline",
            "convert": f"operators that onnx cannot convert to opset {tasks.get('convert')}",
            "check": "a model that is not well formed",
            "infer": "types that do not fit",
        }[found["failed"]]
        raise _refused(weights, f"{step}: {_plain(found['message'])}", "a model that onnx.checker accepts")
    return found, data


def _refused(weights: Weights, found: str, required: str) -> CaptureError:
    return weights.error("the model", found, required, "export the model again, to opset 13 or newer")


def _plain(message: str) -> str:
    """Return a message of onnx in one line."""
    return short(" ".join(message.split()), 400)
