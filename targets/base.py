"""Say what a target is: what a backend needs of a graph, and how a graph becomes files for it.

What may live here: the :class:`Target` protocol, what lowering returns, and the writing of artifacts so that a folder
never holds half of one. The targets themselves stand beside this file, one a file, and load their backend only when
they lower.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt.errors import LoweringError, MissingDependencyError
from graphopt.graph import Graph
from graphopt.targets import recipes
from graphopt.verify import Difference

if TYPE_CHECKING:
    from types import ModuleType

MANIFEST = "manifest.json"

PROVENANCE = "provenance"
"""Key in a graph's ``module.meta`` of how it was made: texts by name, for targets whose files have room for them."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of what was written with the graph it was written from.

    ``runtime`` ran the artifact ("torch", "onnxruntime"), on inputs that ``inputs`` describes in a word or two
    ("example", "batch of one"). ``noise`` is how far the graph's own result in its precision is from its result in
    float64; it is measured only where the difference is larger than round-off usually is.
    """

    runtime: str
    inputs: str
    difference: Difference
    noise: float = 0.0

    @property
    def passed(self) -> bool:
        """Say whether the difference is round-off: the usual, or at most four times what the model amplifies it to."""
        return self.difference.equal or self.difference.relative <= 4 * self.noise < 0.1

    def to_dict(self) -> dict[str, Any]:
        """Return the check as plain values, for a report."""
        return {
            "runtime": self.runtime,
            "inputs": self.inputs,
            "relative": self.difference.relative,
            "precision": str(self.difference.precision).removeprefix("torch."),
            "noise": self.noise,
            "passed": self.passed,
        }

    def __str__(self) -> str:
        return f"{self.runtime}, {self.inputs}: {self.difference}"


@dataclass(frozen=True)
class Lowered:
    """What a target made of a graph.

    ``artifacts`` maps a kind ("pt2", "onnx") to the file; it is empty where no directory was given. ``onnx`` is the
    ``onnx.ModelProto`` of a target that makes one, weights included unless they stand in a file beside it. ``checks``
    are the comparisons that were made, all of them passed; ``notes`` are plain sentences for the report.
    """

    artifacts: Mapping[str, Path] = field(default_factory=dict)
    onnx: Any = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target(ABC):
    """Describe a backend: what it wants of a graph, and how a graph is lowered to it.

    Attributes:
        channel_multiple: pruned channel counts are rounded to a multiple of this, because the backend computes in
            blocks of that size; 1 where it makes no difference.
        check: run what was written and compare its outputs with the graph's.
    """

    name: ClassVar[str]
    """What the target is called on the command line."""
    requires: ClassVar[str | None] = None
    """The extra of graphopt that brings what lowering needs; ``None`` where the core does."""
    needs_values: ClassVar[bool] = True
    """Whether lowering needs the values of all parameters, and so cannot take a graph that has none in memory."""

    channel_multiple: int = 1
    check: bool = True

    def pipeline(self, budget: Any, calibration: bool = False) -> str:
        """Return the passes that run by default, in a pipeline's textual form; the caller's own take their place.

        Args:
            budget: the budget asked for, or ``None`` where only lossless passes may run.
            calibration: there is data to calibrate on, and no training follows.
        """
        return recipes.deployment(budget, calibration)

    @abstractmethod
    def lower(self, graph: Graph, directory: Path | None = None) -> Lowered:
        """Lower ``graph``, which is not changed, and write the artifacts to ``directory`` unless it is ``None``.

        Raises:
            LoweringError: if the graph cannot be lowered, or a file cannot be written; no partial file is left.
            MissingDependencyError: if what lowering needs is not installed.
            VerificationError: if what was made does not compute what the graph computes; nothing is written.
        """


def require(package: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependencyError: if it is not installed; the message names ``extra``, and starts with ``purpose``.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise
        raise MissingDependencyError(extra, package=package.split(".")[0], purpose=purpose) from error


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Lend an empty folder on the same disk; when the block ends well, move all its files to ``directory``.

    Files move one by one, each atomically, in the order of their names' lengths, longest first, and files of the same
    names are taken away before the first move. So a model file (``model.onnx``) arrives after its weights
    (``model.onnx.data``), and never stands beside the weights of another one. When the block raises, ``directory`` is
    as it was before; so it is when a file cannot be moved.

    Raises:
        LoweringError: if ``directory`` cannot be written to.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".graphopt-", dir=directory))
    except OSError as error:
        raise LoweringError(
            f"cannot write to {directory}: {error.strerror or error}; choose another output directory"
        ) from error
    done = False
    try:
        yield stage
        _move(stage, directory)
        done = True
    except OSError as error:
        raise LoweringError(
            f"writing to {directory} failed: {error.strerror or error}; free some space or choose another directory"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not done:
            for path in missing:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()


def _move(stage: Path, directory: Path) -> None:
    """Move all files of ``stage`` to ``directory``; when one cannot be moved, put back those that stood there."""
    files = sorted(stage.iterdir(), key=lambda path: (-len(path.name), path.name))
    aside = stage / ".before"
    aside.mkdir()
    arrived: list[Path] = []
    try:
        if len(files) > 1:
            for path in reversed(files):
                if os.path.lexists(directory / path.name):
                    (directory / path.name).rename(aside / path.name)
        for path in files:
            path.replace(directory / path.name)
            arrived.append(directory / path.name)
    except BaseException:
        if len(files) > 1:
            for path in arrived:
                path.unlink(missing_ok=True)
            for path in sorted(aside.iterdir(), key=lambda path: (-len(path.name), path.name)):
                path.rename(directory / path.name)
        raise


def write_manifest(directory: Path, artifacts: Mapping[str, Path], facts: Mapping[str, Any] | None = None) -> Path:
    """Write ``manifest.json``: kind, file name, size in bytes and SHA-256 of each artifact and of the files beside it.

    A file that belongs to an artifact (its external weights) starts with the artifact's name; it is listed under
    ``parts``. Names are relative to ``directory``. ``facts`` say how the artifacts were made.
    """
    entries = {}
    for kind, path in sorted(artifacts.items()):
        parts = sorted(other for other in path.parent.glob(f"{path.name}.*") if other.is_file())
        entries[kind] = _described(path, directory) | (
            {"parts": [_described(part, directory) for part in parts]} if parts else {}
        )
    with staged(directory) as stage:
        text = json.dumps(
            {"format": "graphopt-manifest", "version": 1, **(facts or {}), "artifacts": entries}, indent=2
        )
        (stage / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return directory / MANIFEST


def _described(path: Path, directory: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": os.path.relpath(path, directory), "bytes": path.stat().st_size, "sha256": digest}
