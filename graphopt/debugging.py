"""Help to find out what went wrong: replay a failure from files, and find the pass and the site that caused it.

What may live here: what :func:`debugging` asks for, the files of a reproducer, and the search for a culprit. All of it
is idle unless asked for, and none of it decides what a pipeline does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch

from graphopt.allocation import Budget
from graphopt.dialects.onnx.facts import facts_of, is_onnx
from graphopt.dialects.onnx.write import write as write_onnx
from graphopt.errors import GraphOptError, PipelineError
from graphopt.graph import Graph
from graphopt.importance.calibration import batches
from graphopt.pipeline import Context, Observer, Pass, Pipeline, Preserves, Removal
from graphopt.pipeline import run as run_pipeline
from graphopt.pipeline.promises import bisect
from graphopt.report import PassRecord
from graphopt.rewrite import rewrite
from graphopt.targets import TARGETS, program
from graphopt.targets.base import staged
from graphopt.targets.lowering import storage

__all__ = ["Culprit", "Recorder", "Reproducer", "asked", "debugging", "find_culprit"]

MODEL: Final = "model.pt2"
MODEL_ONNX: Final = "model.onnx"
INPUTS: Final = "inputs.safetensors"
PIPELINE: Final = "pipeline.toml"
CALIBRATION: Final = "calibration.safetensors"
SETTINGS: Final = "reproducer.json"

MOST_BYTES: Final = 1 << 30
"""How much calibration data a reproducer holds at most; further batches are left out."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What to do when something fails: the folder for a reproducer, and whether to look for the culprit."""

    reproducer: Path | None = None
    bisect: bool = False


_ASKED: ContextVar[Asked] = ContextVar("asked")


@contextmanager
def debugging(*, reproducer: str | Path | None = None, bisect: bool = False) -> Iterator[None]:
    """Within the block, let whatever fails leave traces.

    Args:
        reproducer: a folder. When a pass or a target fails, the graph from before it, the passes that were left and
            what they were given are written there; ``graphopt replay FOLDER`` runs them again.
        bisect: when a target cannot take the result, find the first pass after which it cannot, and the sites in it
            that are to blame. The error's notes say what was found.

    Example:
        >>> with graphopt.debugging(reproducer="failure/"):  # doctest: +SKIP
        ...     graphopt.optimize(model, example_inputs, budget=budget, target="onnx")
    """
    token = _ASKED.set(Asked(None if reproducer is None else Path(reproducer), bisect))
    try:
        yield
    finally:
        _ASKED.reset(token)


def asked() -> Asked:
    """Return what the innermost :func:`debugging` asks for."""
    return _ASKED.get(Asked())


# -- the reproducer -------------------------------------------------------------------------------------------------


class Recorder(Observer):
    """Remember which graph each pass started from, and hand on to another observer what happens."""

    def __init__(self, inner: Observer) -> None:
        self.inner = inner
        self.graphs: list[Graph] = []

    def stage(self, name: str) -> None:
        """Hand on that a stage begins."""
        self.inner.stage(name)

    def begins(self, position: int, graph: Graph) -> None:
        """Remember the graph that a pass starts from."""
        del self.graphs[position:]
        self.graphs.append(graph)
        self.inner.begins(position, graph)

    def goes_on(self, position: int) -> bool:
        """Let the other observer say whether a pass shall run."""
        return self.inner.goes_on(position)

    def changed(self, record: PassRecord, graph: Graph) -> None:
        """Hand on that a pass changed the graph."""
        self.inner.changed(record, graph)


@dataclass(frozen=True)
class Reproducer:
    """A failure as files: a model, the passes that fail on it, and what they were given.

    The folder holds ``model.pt2``, or ``model.onnx`` with its example inputs; ``pipeline.toml``;
    ``calibration.safetensors`` where there were data; and ``reproducer.json``. Functions (an own loss, a metric, a
    training) are not among them.

    Attributes:
        graph: What the passes start from.
        pipeline: The passes.
        target: The name of the target.
        budget: The budget, in absolute numbers.
        calibration: The batches.
        verify: When promises are checked.
        seed: The seed.
        error: What went wrong.
        notes: What could not be saved.
    """

    graph: Graph
    pipeline: Pipeline
    target: str
    budget: Budget | None = None
    calibration: Iterable[Any] | None = None
    verify: str = "each"
    seed: int = 0
    error: str = ""
    notes: list[str] = field(default_factory=list)

    def save(self, directory: Path) -> None:
        """Write the folder, all of it or nothing.

        Raises:
            LoweringError: the graph could not be exported, or the folder cannot be written to.
        """
        notes = list(self.notes)
        exported = None if is_onnx(self.graph) else program.to_program(self.graph)
        with staged(directory) as stage:
            if exported is None:
                written = write_onnx(self.graph)
                storage.write(written.skeleton, written.weights, stage / MODEL_ONNX)
                _save_inputs(self.graph, stage / INPUTS)
            else:
                with program.quiet():
                    torch.export.save(exported, stage / MODEL)
            (stage / PIPELINE).write_text(self.pipeline.to_toml(), encoding="utf-8")
            if self.calibration is not None:
                tensors, left_out = _flat(self.calibration, self.graph)
                safetensors.torch.save_file(tensors, stage / CALIBRATION)
                notes += left_out
            settings = {
                "format": "graphopt-reproducer",
                "version": 1,
                "replay": f"graphopt replay {directory}",
                "error": self.error,
                "pipeline": str(self.pipeline),
                "target": self.target,
                "budget": None
                if self.budget is None
                else {k: v for k, v in asdict(self.budget).items() if v is not None},
                "verify": self.verify,
                "seed": self.seed,
                "notes": notes,
            }
            (stage / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(directory: Path) -> dict[str, Any]:
        """Return the arguments of :func:`graphopt.optimize` that replay the failure.

        Raises:
            PipelineError: the folder holds no reproducer.
        """
        try:
            settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
            if settings["format"] != "graphopt-reproducer" or settings["version"] != 1:
                raise ValueError(f"its format is {settings['format']!r}, version {settings['version']!r}")
            budget = settings["budget"]
            arguments = {
                "model": directory / MODEL,
                **_onnx_model(directory),
                "pipeline": directory / PIPELINE,
                "target": settings["target"] if settings["target"] in TARGETS else "torch",
                "budget": None if budget is None else Budget(**budget),
                "verify": settings["verify"],
                "seed": settings["seed"],
            }
            if (directory / CALIBRATION).exists():
                arguments["calibration"] = _nested(safetensors.torch.load_file(directory / CALIBRATION))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            raise PipelineError(
                f"{directory} holds no reproducer ({error}); one is written by graphopt optimize --reproducer FOLDER "
                "when something fails"
            ) from error
        return arguments


def _save_inputs(graph: Graph, path: Path) -> None:
    args, _ = graph.example_inputs
    names = [each.name for each in facts_of(graph).inputs]
    tensors = {name: tensor.contiguous() for name, tensor in zip(names, args, strict=True)}
    safetensors.torch.save_file(tensors, path)


def _onnx_model(directory: Path) -> dict[str, Any]:
    """Return the model and its example inputs, where the folder holds one of ONNX."""
    if not (directory / MODEL_ONNX).exists():
        return {}
    inputs = safetensors.torch.load_file(directory / INPUTS)
    return {"model": directory / MODEL_ONNX, "example_inputs": inputs}


def _flat(calibration: Iterable[Any], graph: Graph) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors of the batches by batch, kind and position, and what was left out."""
    found: dict[str, torch.Tensor] = {}
    held = 0
    for index, batch in enumerate(batches(calibration, graph)):
        parts = {f"{index}.args.{i}": value for i, value in enumerate(batch.args)}
        parts |= {f"{index}.kwargs.{name}": value for name, value in batch.kwargs.items()}
        if batch.labels is not None:
            parts[f"{index}.labels"] = torch.as_tensor(batch.labels)
        if not all(isinstance(value, torch.Tensor) for value in parts.values()):
            return {}, ["the calibration data is nested, and was not saved"]
        held += sum(value.numel() * value.element_size() for value in parts.values())
        if held > MOST_BYTES:
            return found, [f"the calibration data was saved up to batch {index}: it holds more than a gigabyte"]
        found |= {name: value.detach().cpu().clone().contiguous() for name, value in parts.items()}
    return found, []


def _nested(tensors: Mapping[str, torch.Tensor]) -> list[Any]:
    """Return batches in the form that ``optimize`` takes."""
    rows: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, kind, *name = key.split(".", 2)
        row = rows.setdefault(int(index), {"args": {}, "kwargs": {}, "labels": None})
        if kind == "labels":
            row["labels"] = tensor
        else:
            row[kind][name[0]] = tensor
    found = []
    for _, row in sorted(rows.items()):
        args = tuple(row["args"][key] for key in sorted(row["args"], key=int))
        inputs = row["kwargs"] if row["kwargs"] and not args else args
        found.append(inputs if row["labels"] is None else (inputs, row["labels"]))
    return found


# -- the culprit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first pass after which something fails, and the sites or groups in it without which it does not.

    ``position`` is -1 where the graph fails as it was captured.
    """

    position: int
    name: str
    why: str
    sites: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.position < 0:
            return f"bisection: it fails without any pass ({self.why})"
        told = f"bisection: it fails first after pass {self.position + 1}, '{self.name}' ({self.why})"
        if not self.sites:
            return told
        return f"{told}; without {', '.join(self.sites)} that pass does no harm"


def find_culprit(
    pipeline: Pipeline, graph: Graph, context: Context, fails: Callable[[Graph], str | None]
) -> Culprit | None:
    """Find the pass after which a graph begins to fail, by bisection, and the sites in it that are to blame.

    It is taken for granted that a graph which fails goes on failing under later passes.

    Args:
        pipeline: the passes.
        graph: what they start from.
        context: what they are given.
        fails: says what is wrong with a graph, or None.

    Returns:
        The culprit; None where the graph after all passes does not fail.
    """
    graphs: dict[int, Graph] = {0: graph}

    def after(count: int) -> Graph:
        if count not in graphs:
            graphs[count] = run_pipeline(pipeline[:count], graph, context, inputs=(), verify="off").graph
        return graphs[count]

    last = fails(after(len(pipeline)))
    if last is None:
        return None
    first = fails(graph)
    if first is not None:
        return Culprit(-1, "", first)
    sound, broken = 0, len(pipeline)
    while broken - sound > 1:
        middle = (sound + broken) // 2
        why = fails(after(middle))
        if why is None:
            sound = middle
        else:
            broken, last = middle, why
    each = pipeline[sound]
    return Culprit(sound, each.name, last, _sites(each, after(sound), context, fails))


def _sites(each: Pass, before: Graph, context: Context, fails: Callable[[Graph], str | None]) -> dict[str, str]:
    """Return the sites, or the groups, without which one pass does no harm; none where it cannot be told."""
    fresh = replace(context, sites=[], notes=[])
    result = each.run(before.clone(), fresh)
    if result.removal is not None:
        return _groups(result.removal, fails)
    names = list(dict.fromkeys(site.name for site in fresh.sites if site.applied))

    def wrong(allowed: Sequence[str]) -> str | None:
        spared = {name: "tried without" for name in names if name not in allowed}
        attempt = replace(context, left_alone={**context.left_alone, **spared}, sites=[], notes=[])
        return fails(each.run(before.clone(), attempt).graph)

    return bisect(names, wrong) if names and each.preserves is Preserves.EXACT and wrong([]) is None else {}


def _groups(removal: Removal, fails: Callable[[Graph], str | None]) -> dict[str, str]:
    names = {group.name: group.atom for group in removal.typing.groups if group.atom in removal.keep}

    def wrong(allowed: Sequence[str]) -> str | None:
        return fails(rewrite(removal.typing, {names[name]: removal.keep[names[name]] for name in allowed}))

    return bisect(list(names), wrong) if wrong([]) is None else {}


def failure(attempt: Callable[[], object]) -> str | None:
    """Return what goes wrong in ``attempt``, or None."""
    try:
        attempt()
    except GraphOptError as error:
        return str(error)
    return None
