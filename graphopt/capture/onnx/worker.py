"""Run onnx's checker, shape inference, version converter and inliner in a process of their own.

These are C++ that was not written for files from strangers: on damaged models they may overflow the stack, allocate
without bound, or not end. This module is run as a script, so that what happens then happens to the script. It imports
nothing of graphopt, and onnx alone: a process starts in a tenth of a second.

A request is one line of JSON and the bytes of a model; so is an answer. The process serves one after another, until one
breaks it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MEMORY_LIMIT = 4 << 30
"""Bytes of address space that the process may use."""

_TYPES = "tensor_type", "sparse_tensor_type"


def perform(tasks: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Do what ``tasks`` say to a model, in this order; return findings, and the model.

    Tasks:
        inline: inline the model's functions.
        convert: convert the model to this version of the default domain's operators.
        check: check the model, and say in ``types`` where a declared element type is not the inferred one.
    """
    import onnx
    import onnx.checker
    import onnx.inliner
    import onnx.shape_inference
    import onnx.version_converter

    model = onnx.ModelProto.FromString(data)
    found: dict[str, Any] = {}
    step = ""
    try:
        if tasks.get("inline"):
            step = "inline"
            model = onnx.inliner.inline_local_functions(model, True)
        if tasks.get("convert"):
            step = "convert"
            model = onnx.version_converter.convert_version(model, tasks["convert"])
        if tasks.get("check"):
            step = "check"
            onnx.checker.check_model(_filled(onnx, model), full_check=False)
            step = "infer"
            found["types"] = _types(onnx, model)
    except MemoryError:
        return {"failed": step, "message": "it takes more memory than onnx is given"}, b""
    except Exception as error:  # noqa: BLE001 - of any type that C++ raises
        return {"failed": step, "message": f"{error}"}, b""
    changed = tasks.get("inline") or tasks.get("convert")
    return found, model.SerializeToString(deterministic=True) if changed else b""


def _filled(onnx: Any, model: Any) -> Any:
    """Return a model all of whose inputs and outputs have a shape: runtimes want none, the checker does."""
    values = (*model.graph.input, *model.graph.output)
    if all(value.type.tensor_type.HasField("shape") for value in values):
        return model
    filled = onnx.ModelProto()
    filled.CopyFrom(model)
    for value in (*filled.graph.input, *filled.graph.output):
        kind = value.type.WhichOneof("value")
        if kind is None:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        if kind in (None, *_TYPES):
            getattr(value.type, kind or _TYPES[0]).shape.SetInParent()
    return filled


def _types(onnx: Any, model: Any) -> list[list[Any]]:
    """Return name, declared and inferred element type of the values where these two differ."""
    declared = {}
    for value in (*model.graph.value_info, *model.graph.output):
        kind = value.type.WhichOneof("value")
        if kind in _TYPES and (number := getattr(value.type, kind).elem_type):
            declared[value.name] = number
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    for value in bare.graph.output:
        value.ClearField("type")
    inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=False)
    different = []
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.WhichOneof("value")
        number = getattr(value.type, kind).elem_type if kind in _TYPES else 0
        if number and declared.get(value.name, number) != number:
            different.append([value.name, declared[value.name], number])
    return different


def main() -> None:
    """Answer requests from standard input on standard output until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what C++ prints must not stand in an answer
    _limit()
    requests = sys.stdin.buffer
    while line := requests.readline():
        tasks = json.loads(line)
        found, data = perform(tasks, requests.read(tasks["bytes"]))
        answers.write(json.dumps({**found, "bytes": len(data)}).encode() + b"\n" + data)
        answers.flush()
    os._exit(0)  # what damaged models left behind needs no tidy end


def _limit() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = MEMORY_LIMIT if most == resource.RLIM_INFINITY else min(MEMORY_LIMIT, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    except (ImportError, OSError, ValueError):  # a system without limits
        pass


if __name__ == "__main__":
    main()
