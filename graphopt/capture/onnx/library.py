"""Have onnx's own code check, inline and convert a model, without its weights and in another process.

What may live here: the copy of a model without its large tensors, sending it to ``worker``, and putting the tensors
back into what returns. So C++ never sees a file, and a model of any size costs it only its nodes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
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

_SCRIPT: Final = Path(__file__).with_name("worker.py")

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
    seconds = _SECONDS * (1 + node_count // _NODES)
    try:
        found, data = _HELPER.ask(tasks, model.SerializeToString(), seconds)
    except TimeoutError as error:
        raise _refused(weights, "onnx did not come to an end with this model", f"{seconds} seconds at most") from error
    except ChildProcessError as error:
        raise _refused(weights, f"a model on which onnx breaks off ({error})", "a well-formed model") from error
    if "failed" in found:
        step = {
            "inline": "functions that onnx cannot inline",
            "convert": f"operators that onnx cannot convert to opset {tasks.get('convert')}",
            "check": "a model that is not well formed",
            "infer": "types that do not fit",
        }[found["failed"]]
        raise _refused(weights, f"{step}: {_plain(found['message'])}", "a model that onnx.checker accepts")
    return found, data


class _Helper:
    """Keep one process of ``worker`` for as long as it answers; start another one after it broke."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._parents: subprocess.Popen[bytes] | None = None

    def ask(self, tasks: dict[str, Any], data: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Send a request and return the answer.

        Raises:
            TimeoutError: if there is none after that time.
            ChildProcessError: if the process died of it.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            late = threading.Event()

            def end() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(seconds, end)
            timer.daemon = True
            timer.start()
            try:
                process.stdin.write(json.dumps({**tasks, "bytes": len(data)}).encode() + b"\n")
                process.stdin.write(data)
                process.stdin.flush()
                line = process.stdout.readline()
                answer = json.loads(line) if line.endswith(b"\n") else {"bytes": -1}
                result = process.stdout.read(answer["bytes"]) if answer["bytes"] >= 0 else b""
                complete = len(result) == answer["bytes"]
            except BaseException as error:
                self.stop()
                if not isinstance(error, OSError):
                    raise
                complete = False
            finally:
                timer.cancel()
            if complete:
                return answer, result
            status = self.stop() or process.returncode
            if late.is_set():
                raise TimeoutError
            raise ChildProcessError(f"status {status}")

    def stop(self) -> int | None:
        """End the process; return its status."""
        process, self._process = self._process, None
        if process is None:
            return None
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def forget(self) -> None:
        """Leave the process to the parent, in a child that was forked: it may not answer both."""
        self._lock = threading.Lock()
        self._parents, self._process = self._process, None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],  # -P: a folder's own onnx.py is not imported
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process


_HELPER: Final = _Helper()
atexit.register(_HELPER.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_HELPER.forget)


def _refused(weights: Weights, found: str, required: str) -> CaptureError:
    return weights.error("the model", found, required, "export the model again, to opset 13 or newer")


def _plain(message: str) -> str:
    """Return a message of onnx in one line."""
    return short(" ".join(message.split()), 400)
