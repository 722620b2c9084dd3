"""Write a graph as an ONNX file, ``model.onnx``, and run it in ONNX Runtime against the graph."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.quantized import is_quantized
from graphopt.dialects.onnx.write import Written
from graphopt.dialects.onnx.write import write as write_onnx
from graphopt.errors import LoweringError, UnsupportedOperatorError, VerificationError
from graphopt.graph import Graph
from graphopt.sweep import flatten_inputs
from graphopt.targets import program as programs
from graphopt.targets.base import PROVENANCE, Check, Lowered, Target, require, staged
from graphopt.targets.lowering.storage import EMBEDDED_LIMIT, embed, refer, write
from graphopt.targets.lowering.translate import Translated, translate

if TYPE_CHECKING:
    import onnx

FILE = "model.onnx"


@dataclass(frozen=True)
class OnnxTarget(Target):
    """Translate the graph, in evaluation mode, to standard ONNX operators, with its dynamic dimensions.

    A graph that was read from an ONNX file is written as that file was: the same operators where no pass changed them,
    the same opset, the same names.

    Inputs keep the names of ``forward``'s arguments, outputs the keys of what it returns, weights their names. Weights
    of more than 2 GB stand in ``model.onnx.data``, beside the file. A model with an operator that has no translation
    here goes through ``torch.onnx`` instead, which takes longer and names values its own way; ``notes`` say so. The
    result is run in ONNX Runtime where that is installed.

    Channels come in multiples of 8, the smallest block in which ONNX Runtime convolves on a CPU: at equal cost
    a ResNet-50 runs about a fifth faster so than with channel counts of any size.
    """

    name: ClassVar[str] = "onnx"
    requires: ClassVar[str | None] = "onnx"

    channel_multiple: int = 8

    def lower(self, graph: Graph, directory: Path | None = None) -> Lowered:
        require("onnx", extra="onnx", purpose="writing an ONNX file")
        translated = _translated(graph)
        _describe(translated.skeleton, graph.module.meta.get(PROVENANCE, {}))
        with staged(directory) if directory is not None else _temporary() as stage:
            files = write(translated.skeleton, translated.weights, stage / FILE, limit=EMBEDDED_LIMIT)
            _check_file(stage / FILE)
            checks, notes = self._run(graph, translated, stage / FILE)
        if len(files) > 1 and directory is not None:
            model = refer(translated.skeleton, translated.weights, files[1].name)
            notes = (*notes, f"the weights stand in {files[1].name}: the model in memory refers to that file")
        else:
            model = embed(translated.skeleton, translated.weights)
        return Lowered(
            artifacts={} if directory is None else {"onnx": directory / FILE},
            onnx=model,
            checks=checks,
            notes=(*translated.notes, *notes),
        )

    def _run(
        self, graph: Graph, translated: Translated | Written, path: Path
    ) -> tuple[tuple[Check, ...], tuple[str, ...]]:
        if not self.check:
            return (), ()
        if importlib.util.find_spec("onnxruntime") is None:
            return (), ("onnxruntime is not installed: the ONNX file was checked for form, and not run",)
        try:
            run = runner(graph, translated, path)
        except _NoKernelError as error:
            return (), (f"the ONNX file was not run: {error}",)
        notes = (_ROUNDING_NOTE,) if is_quantized(graph) else ()
        return programs.check(graph, "onnxruntime", run, sorted(translated.outputs)), notes


_ROUNDING_NOTE: Final = (
    "the ONNX file was compared operator by operator: where ONNX Runtime puts quantized operators together, it rounds "
    "in another place, and results may differ by a step of the quantization, as they do for the file that was given"
)


class _NoKernelError(Exception):
    """Say that ONNX Runtime has no CPU kernel for an operator in some precision."""


def _describe(model: onnx.ModelProto, facts: Mapping[str, str]) -> None:
    """Say in the file how it was made, besides what it says already; properties are sorted by name."""
    entries = {entry.key: entry.value for entry in model.metadata_props} | dict(facts)
    del model.metadata_props[:]
    for key in sorted(entries):
        model.metadata_props.add(key=key, value=entries[key])


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        yield Path(folder)


def _translated(graph: Graph) -> Translated | Written:
    if is_onnx(graph):
        return write_onnx(graph)
    try:
        return translate(graph)
    except UnsupportedOperatorError as error:
        from graphopt.targets.lowering.exporter import export

        return export(graph, str(error))


def _check_file(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise LoweringError(
            f"the ONNX model is not well formed: {error}. Nothing was written: please report it"
        ) from error


def runner(graph: Graph, translated: Translated | Written, path: Path) -> Callable[[programs.Inputs], list[Any]]:
    """Load a model into ONNX Runtime; the function returned runs it on a call's inputs and returns its outputs."""
    import onnxruntime

    failures = onnxruntime.capi.onnxruntime_pybind11_state
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    options.intra_op_num_threads = torch.get_num_threads()
    if is_quantized(graph):
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except failures.NotImplemented as error:
        raise _NoKernelError(str(error)) from error
    except (failures.Fail, failures.InvalidArgument, failures.InvalidGraph, failures.RuntimeException) as error:
        raise LoweringError(
            f"ONNX Runtime does not load the ONNX model: {' '.join(str(error).split())}. Nothing was written: if the "
            "model that you gave is one of ONNX, see whether that one loads; otherwise please report it"
        ) from error

    def run(inputs: programs.Inputs) -> list[Any]:
        flat = flatten_inputs(graph.module, *inputs)
        feeds = {name: flat[position].detach().cpu().numpy() for position, name in translated.inputs.items()}
        names = [translated.outputs[position] for position in sorted(translated.outputs)]
        try:
            arrays = session.run(names, feeds)
        except (failures.Fail, failures.InvalidArgument, failures.RuntimeException) as error:
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            raise VerificationError(
                f"the ONNX file does not run in ONNX Runtime on inputs of shape {shapes}, which the graph accepts: "
                f"{error}. Nothing was written: please report the model"
            ) from error
        return [torch.from_numpy(array) for array in arrays]

    return run
