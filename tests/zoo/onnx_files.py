"""Export the models of the zoo to ONNX files, by both exporters of torch, each once for all who ask.

    path = exported("resnet50", "dynamo")
    outputs = session.run(None, feeds("resnet50", path, batch=3))

Files are kept in the folder that `GRAPHOPT_ONNX_CACHE` names, so that several runs can share them, and otherwise in
a temporary one that goes with the process. `onnx_exports.json` says which models an exporter refuses, and why:
`python -m tests.zoo.onnx_files` exports all of them and writes it anew.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import ZOO, Arguments, quiet

__all__ = ["EXPORTERS", "REFUSED", "ExportError", "Exporter", "exported", "feeds"]

Exporter = Literal["dynamo", "torchscript"]
EXPORTERS: tuple[Exporter, ...] = get_args(Exporter)

REFUSED = Path(__file__).with_name("onnx_exports.json")
"""The models that an exporter cannot export: ``{exporter: {model: reason}}``."""

CACHE = "GRAPHOPT_ONNX_CACHE"
_EXAMPLE_BATCH = 2


class ExportError(Exception):
    """Say why an exporter of torch refuses a model."""


def exported(name: str, exporter: Exporter, *, opset: int | None = None, cache: Path | None = None) -> Path:
    """Export a model in its small size, with a dynamic batch, or find the file that was exported before.

    Args:
        name: The model.
        exporter: Which of torch's two exporters.
        opset: The version of the operators; the exporter's default unless given.
        cache: The folder of the files, in place of the one of the environment.

    Raises:
        ExportError: The exporter refuses the model.
    """
    folder = cache or _shared_folder()
    stem = f"{name}-{exporter}" + (f"-opset{opset}" if opset else "")
    path, refusal = folder / f"{stem}.onnx", folder / f"{stem}.refused"
    if path.exists():
        return path
    if refusal.exists():
        raise ExportError(refusal.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as stage:
        unfinished = Path(stage, "model.onnx")
        try:
            _export(name, exporter, unfinished, opset)
        except Exception as error:  # each exporter and model fails in a way of its own
            reason = _first_cause(error)
            Path(stage, "refused").write_text(reason)
            Path(stage, "refused").replace(refusal)
            raise ExportError(reason) from error
        unfinished.replace(path)
    return path


def feeds(name: str, path: Path, *, batch: int = 2, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """Make inputs by the names that the file gives them; inputs that the export dropped are left out."""
    import onnx

    wanted = {value.name for value in onnx.load(path, load_external_data=False).graph.input}
    tensors = _named(ZOO[name].build(), ZOO[name].inputs(batch=batch, seed=seed))
    return {key: tensor.numpy() for key, tensor in tensors.items() if key in wanted}


@functools.cache
def _shared_folder() -> Path:
    if folder := os.environ.get(CACHE):
        return Path(folder)
    import atexit

    temporary = tempfile.mkdtemp(prefix="graphopt-zoo-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def _export(name: str, exporter: Exporter, path: Path, opset: int | None) -> None:
    module, inputs = ZOO[name].build(), ZOO[name].inputs(batch=_EXAMPLE_BATCH)
    export = {"dynamo": _by_dynamo, "torchscript": _by_torchscript}[exporter]
    with quiet(), torch.no_grad(), _silenced():
        export(module, inputs, path, opset)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Drop what Python and C++ print: both exporters tell what they do, and whole graphs where they fail."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        saved = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in saved:
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)


def _by_dynamo(module: nn.Module, inputs: Arguments, path: Path, opset: int | None) -> None:
    dynamic = {key: {0: torch.export.Dim.DYNAMIC} for key in _named(module, inputs)}
    program = torch.onnx.export(
        module,
        inputs.args,
        kwargs=inputs.kwargs,
        dynamo=True,
        dynamic_shapes=dynamic,
        input_names=list(dynamic),
        opset_version=opset,
    )
    assert program is not None
    program.save(path, external_data=False)


def _by_torchscript(module: nn.Module, inputs: Arguments, path: Path, opset: int | None) -> None:
    """Trace the model as a function of plain tensors that returns plain tensors, which is all that tracing knows."""
    tensors = _named(module, inputs)
    module.forward = _flattened(module.forward, list(tensors))
    torch.onnx.export(
        module,
        tuple(tensors.values()),
        str(path),
        dynamo=False,
        input_names=list(tensors),
        dynamic_axes={key: {0: "batch"} for key in tensors},
        opset_version=opset,
    )


def _flattened(forward: Callable[..., Any], names: list[str]) -> Callable[..., tuple[Tensor, ...]]:
    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = forward(**dict(zip(names, tensors, strict=True)))
        return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))

    return flat


def _named(module: nn.Module, inputs: Arguments) -> dict[str, Tensor]:
    """Return the inputs under the names of the arguments of ``forward``; every input of the zoo is one tensor."""
    bound = inspect.signature(module.forward).bind(*inputs.args, **inputs.kwargs).arguments
    if not all(isinstance(value, Tensor) for value in bound.values()):
        raise TypeError(f"the inputs are not tensors: {sorted(bound)}")
    return bound


def _first_cause(error: BaseException) -> str:
    """Return the kind and the first line of what an exporter stumbled over, without what it wrapped around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def main() -> None:
    """Export the models named, or all, and update the table of refusals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--exporter", choices=EXPORTERS, help="both unless given")
    options = parser.parse_args()
    refused: dict[str, dict[str, str]] = json.loads(REFUSED.read_text()) if REFUSED.exists() else {}
    for name in options.names:
        for exporter in [options.exporter] if options.exporter else EXPORTERS:
            rows = refused.setdefault(exporter, {})
            rows.pop(name, None)
            try:
                print(name, exporter, exported(name, exporter).stat().st_size, flush=True)
            except ExportError as error:
                rows[name] = str(error)
                print(name, exporter, error, flush=True)
            refused[exporter] = {each: rows[each] for each in ZOO if each in rows}
            REFUSED.write_text(json.dumps(refused, indent=1) + "\n")


if __name__ == "__main__":
    main()
