"""String the stages together: the public functions.

What may live here: :func:`optimize`, :func:`inspect`, :func:`explain`, and the order of stages. What a stage does is
said in its own room.
"""

from __future__ import annotations

import copy
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphopt.allocation import Budget
from graphopt.capture import capture
from graphopt.checkpoint import Checkpoint, Weights
from graphopt.cost import CostModel
from graphopt.debugging import Recorder, Reproducer, asked, failure, find_culprit
from graphopt.dialects import infer
from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.write import to_proto
from graphopt.errors import (
    BudgetError,
    CaptureError,
    GraphOptError,
    LoweringError,
    PipelineError,
    PlanError,
    unknown_name,
)
from graphopt.graph import Graph
from graphopt.importance.calibration import Loss, batches
from graphopt.passes import FineTune, PruneChannels
from graphopt.pipeline import Context, Outcome, Pass, Pipeline, Preserves, Verify, observer, watching
from graphopt.pipeline import run as run_pipeline
from graphopt.plan import Origin, Plan
from graphopt.report import BudgetLine, Comparison, Inspection, Report, frozen_rows, print_explanation, unknown_rows
from graphopt.report.wording import amount, listing, plural
from graphopt.shrink import follow  # lets plans be applied to modules, too
from graphopt.targets import Lowered, Target, find_target, write_manifest
from graphopt.targets.base import PROVENANCE, staged

__all__ = ["Result", "explain", "inspect", "optimize"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

REPORT_PAGE: Final = "report.html"
REPORT_DATA: Final = "report.json"
PLAN: Final = "plan.safetensors"


@dataclass(frozen=True)
class Result:
    """What :func:`optimize` made. Printed, it shows its report.

    Attributes:
        module: The smaller model: trainable, parameters under the names they had, in the mode the model was in.
        onnx: The ``onnx.ModelProto``, of a model of ONNX, or from a target that makes one; None otherwise.
        plan: Which indices of the input model's tensors are left.
        artifacts: The files that were written, by kind.
        report: What was done, what was not, and why.
        graph: The graph that ``module`` runs, with its example inputs, for passes and targets.
        model: The smaller model in the class of the one that was given; None unless ``own_class`` was asked for.
    """

    module: fx.GraphModule = field(repr=False)
    onnx: Any = field(repr=False)
    plan: Plan = field(repr=False)
    artifacts: Mapping[str, Path]
    report: Report = field(repr=False)
    graph: Graph = field(repr=False)
    model: Any = field(repr=False, default=None)

    def __str__(self) -> str:
        return str(self.report)

    def __rich__(self) -> Report:
        return self.report

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def optimize(
    model: Any,
    example_inputs: Any = None,
    *,
    target: str | Target = "torch",
    budget: Budget | None = None,
    pipeline: Pipeline | Pass | Iterable[Pass] | str | Path | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    evaluate: Callable[[Any], float] | None = None,
    finetune: Callable[[Any], object] | None = None,
    steps: int = 1,
    own_class: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    verify: Verify = "each",
    seed: int = 0,
) -> Result:
    """Make a model smaller, and prove that what is left computes what it did.

    The model itself is not changed, and neither is the state of any random number generator. The same arguments give
    the same result.

    Args:
        model: an ``nn.Module``, an ``ExportedProgram``, an ``fx.GraphModule``, an ``onnx.ModelProto``, the path of an
            ``.onnx`` or ``.pt2`` file, a :class:`~graphopt.graph.Graph` that was captured before (``capture`` names
            further dynamic dimensions), or an earlier :class:`Result`, whose plan and the new one's compose:
            ``first.plan.then(second.plan)``.
        example_inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs, or a pair of both; not needed
            where the model carries or describes its inputs. Costs are those of these inputs' batch.
        target: what the result is for: "torch", "onnx", or a target of your own.
        budget: what the result may cost at most. Without one only lossless passes run.
        pipeline: the passes to run, in place of the target's default: a ``Pipeline``, its text, or the path of a
            ``.toml``.
        calibration: batches of inputs, or of ``(inputs, labels)``, for criteria that look at data; the first batch is
            what promises are checked on.
        loss: makes a scalar of the model's outputs and a batch's labels, for criteria that look at gradients; cross
            entropy of the first output where it is not given.
        evaluate: a metric of a module, higher is better; called on a copy before and after, and reported.
        finetune: trains a module in place; called after each step of pruning, before layers are merged for deployment.
            Without it, train ``result.module`` yourself.
        steps: in how many steps to prune; each leaves the same share of what it finds.
        own_class: keep whole what the model's own code could not follow, so that ``result.model`` is a smaller model of
            the same class (:meth:`Plan.apply`); for modules, and the target "torch".
        checkpoint: where the values are of a model whose parameters are on the meta device: a ``.safetensors`` file,
            the index of a sharded checkpoint, or a folder. They are read a tensor at a time, never all. What runs on
            shapes alone is checked then, not what is computed; with `output` the checkpoint is pruned into it.
        output: the folder for the artifacts, the report and a manifest; it is left as it was if anything fails.
        verify: check what passes promise after each of them ("each"), once at the end ("final"), or never ("off").
        seed: seeds whatever is random.

    Raises:
        CaptureError: the model could not be captured.
        PipelineError: the pipeline, the target or an option does not exist.
        BudgetError: the budget cannot be met; ``smallest`` says what can.
        PassError: a pass broke off.
        VerificationError: a pass broke its promise, and leaving single groups alone did not help.
        PlanError: the model's code cannot follow, whatever is kept whole (``own_class``).
        LoweringError: the target cannot take the result, or a file could not be written.
        MissingDependencyError: the target needs a package that is not installed.

    Example:
        >>> result = graphopt.optimize(model, example_inputs, budget=graphopt.Budget(flops=0.5))  # doctest: +SKIP
        >>> print(result.report)  # doctest: +SKIP
    """
    _check_options(budget, verify, seed, steps)
    chosen = find_target(target)
    passes = _pipeline(chosen, budget, pipeline, calibration is not None and finetune is None)
    passes = _stepped(passes, steps, finetune)
    _check_own_class(own_class, model, chosen)
    folder = _folder(output)
    clock = _Clock()
    with _seeded(seed):
        with clock("capture"):
            graph = _captured(model, example_inputs)
            _bind(graph, checkpoint)
        passes, left_out = _able(passes, chosen, pipeline, {"evaluate": evaluate, "finetune": finetune}, graph)
        data = list(calibration) if isinstance(calibration, Iterator) else calibration
        typing = infer(graph)
        original = CostModel(typing).cost()
        inputs, warnings = _verification_inputs(graph, data, verify, seed)
        before = _scored(evaluate, graph, clock, "evaluate before")
        context = Context(
            original=original,
            budget=budget,
            channel_multiple=chosen.channel_multiple,
            calibration=data,
            loss=loss,
            evaluate=evaluate,
            train=finetune,
            seed=seed,
        )
        if own_class:
            with clock("follow the class"):
                passes = _followed(passes, graph, context, model)
        settings = Reproducer(graph, passes, chosen.name, budget, data, verify, seed)
        with _traces(settings, context, chosen) as reached:
            with clock("passes"):
                outcome = run_pipeline(passes, graph, context, inputs=inputs, verify=verify, forgiving=pipeline is None)
            reached.append(outcome)
            after = _scored(evaluate, outcome.graph, clock, "evaluate after")
            report = Report(
                model=_name(model),
                target=chosen.name,
                pipeline=str(passes[: len(outcome.records)]),
                seed=seed,
                verify=verify,
                before=original,
                after=outcome.records[-1].after if outcome.records else original,
                versions=_versions(),
                passes=outcome.records,
                frozen=frozen_rows(typing),
                unknown=unknown_rows(typing),
                notes=[*graph.notes, *left_out],
                comparisons=outcome.comparisons,
                timings=clock.seconds,
                score=None if before is None or after is None else (before, after),
            )
            report.budget = _budget_lines(budget, passes, report)
            report.warnings = [*warnings, *_warnings(report, outcome, budget)]
            lowered, artifacts = _lowered(chosen, outcome, folder, report, clock)
    module = outcome.graph.module
    module.train(graph.training)
    proto = to_proto(outcome.graph) if lowered.onnx is None and is_onnx(outcome.graph) else lowered.onnx
    plan = replace(outcome.plan, origin=Origin.of(model, inputs[0][1] if inputs else graph.example_inputs, module))
    return Result(module, proto, plan, artifacts, report, outcome.graph, plan.apply(model) if own_class else None)


def inspect(model: Any, example_inputs: Any = None) -> Inspection:
    """Say what a model is made of: its groups, what must stay whole and why, and the cost by layer.

    Args:
        model: as for :func:`optimize`.
        example_inputs: as for :func:`optimize`.

    Raises:
        CaptureError: the model could not be captured.
    """
    with _seeded(0):
        graph = _captured(model, example_inputs)
    observer().stage("infer axes")
    return Inspection.of(_name(model), infer(graph))


def explain(model: Any, parameter: str, dim: int, example_inputs: Any = None) -> None:
    """Print why a dimension of a parameter goes with others, or cannot shrink: the operators that tie it, in words.

    ``inspect(model).coupling.explain(parameter, dim)`` gives the same as data.

    Args:
        model: as for :func:`optimize`.
        parameter: the name of a parameter or buffer, as in ``model.named_parameters()``.
        dim: the dimension.
        example_inputs: as for :func:`optimize`.

    Raises:
        CaptureError: the model could not be captured.
        PipelineError: there is no such parameter, or it has no such dimension; the message has the nearest name.
    """
    print_explanation(inspect(model, example_inputs), parameter, dim)


def _check_own_class(own_class: Any, model: Any, target: Target) -> None:
    if not isinstance(own_class, bool):
        raise PipelineError(f"own_class must be True or False; found {own_class!r}")
    if own_class and (not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule)):
        raise PipelineError(f"own_class is for modules with code of their own; found {_name(model)}: leave it out")
    if own_class and target.name != "torch":
        raise PipelineError(
            f"own_class gives a module back, and the target '{target.name}' changes layers beyond what a class can "
            "follow: optimize for the target 'torch', then result.model for the other one"
        )


def _followed(passes: Pipeline, graph: Graph, context: Context, model: nn.Module) -> Pipeline:
    """Return the passes with what the model's class could not follow kept whole; training and refits are left out here.

    Raises:
        PlanError: the class cannot follow, and nothing more can be kept whole.
        BudgetError: with all that whole, the budget cannot be met.
    """
    whole: tuple[str, ...] = ()
    while True:
        trial = Pipeline(each for each in passes if each.preserves is not Preserves.APPROXIMATE)
        try:
            outcome = run_pipeline(trial, graph, context, inputs=(), verify="off")
        except BudgetError as error:
            if whole:
                error.add_note(f"own_class keeps whole {', '.join(whole)}, which the model's code cannot follow")
            raise
        try:
            follow(model, outcome.plan.keep, graph)
        except PlanError as error:
            more = tuple(pattern for pattern in error.exclude if pattern not in whole)
            if not more:
                raise
            whole += more
            passes = _without(passes, more)
            observer().stage(f"keep {plural(len(whole), 'pattern')} whole, which the class could not follow")
        else:
            return passes


def _without(passes: Pipeline, whole: tuple[str, ...]) -> Pipeline:
    """Return the passes with more groups excluded from pruning."""

    def excluding(each: Pass) -> Pass:
        if not isinstance(each, PruneChannels):
            return each
        constraints = each.constraints
        return replace(each, constraints=replace(constraints, exclude=(*constraints.exclude, *whole)))

    return Pipeline(map(excluding, passes))


def _bind(graph: Graph, source: str | os.PathLike[str] | None) -> None:
    """Let the graph read what it has no values of from a checkpoint."""
    if source is None:
        return
    hollow = graph.hollow
    if not hollow:
        raise PipelineError(
            "the model's values are in memory, so a checkpoint is of no use: leave it out, or build the model without "
            "values, as in `with torch.device('meta'): model = …`"
        )
    tensors = {name: (graph.tensor(name), graph.names(name)) for name in hollow}
    buffers = [name for name in hollow if not isinstance(graph.tensor(name), nn.Parameter)]
    graph.weights = Weights.bind(Checkpoint.open(source), tensors, spare=buffers)


def _able(
    passes: Pipeline, target: Target, own: Any, functions: Mapping[str, Any], graph: Graph
) -> tuple[Pipeline, list[str]]:
    """Return the passes that can run on the graph, and a note on those of the default that cannot."""
    hollow = graph.hollow
    if not hollow:
        return passes, []
    why = f"the values of {plural(len(hollow), 'tensor')} of the model ({listing(hollow)}) are not in memory"
    for name, function in functions.items():
        if function is not None:
            raise PipelineError(f"{name} needs a model that runs, and {why}: load the weights, or leave {name} out")
    if target.needs_values:
        raise LoweringError(
            f"the target '{target.name}' needs all values, and {why}: optimize for target='torch', load what was "
            "written into result.module, and optimize that"
        )
    unable = [each for each in passes if each.needs_values]
    named = [each for each in (Pipeline.of(own) if own is not None else ()) if each.needs_values]
    if named:
        raise PipelineError(
            f"the pass '{named[0].name}' computes with the values of parameters, and {why}: load the weights, or run "
            "passes that read a checkpoint piece by piece, such as prune-channels"
        )
    notes = [f"{each.name} was left out: it computes with the values of parameters, and {why}" for each in unable]
    return Pipeline.of([each for each in passes if not each.needs_values]), notes


# -- before the passes ----------------------------------------------------------------------------------------------


def _check_options(budget: Any, verify: Any, seed: Any, steps: Any) -> None:
    if budget is not None and not isinstance(budget, Budget):
        raise BudgetError(
            f"budget must be a graphopt.Budget, such as graphopt.Budget(flops=0.5); found {type(budget).__name__} "
            f"{budget!r}"
        )
    if verify not in get_args(Verify):
        raise PipelineError(unknown_name("value of verify:", str(verify), get_args(Verify)))
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise PipelineError(f"seed must be an integer, 0 or above; found {seed!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PipelineError(f"steps must be an integer, 1 or above; found {steps!r}")


def _folder(output: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder for artifacts; what can be seen to fail fails here, before the work is done."""
    if output is None:
        return None
    folder = Path(output)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise LoweringError(
            f"cannot write to {folder}: {existing} is {'not writable' if existing.is_dir() else 'no folder'}; "
            "choose another output directory"
        )
    return folder


def _pipeline(target: Target, budget: Budget | None, pipeline: Any, calibration: bool) -> Pipeline:
    """Return the caller's passes, or by default the target's."""
    return Pipeline.of(pipeline) if pipeline is not None else Pipeline.parse(target.pipeline(budget, calibration))


def _stepped(passes: Pipeline, steps: int, finetune: Any) -> Pipeline:
    """Return the passes with pruning done in steps, each followed by the caller's training if there is any."""
    by_hand = any(isinstance(each, FineTune) for each in passes)
    if not any(hasattr(each, "progress") for each in passes):
        if steps > 1:
            raise PipelineError(f"steps={steps} was asked for, but no pass of the pipeline '{passes}' prunes in steps")
        if finetune is not None and not by_hand:
            raise PipelineError(
                f"finetune was given, but nothing is pruned: give a budget, or add {FineTune.name} to the pipeline "
                f"'{passes}'"
            )
        return passes
    return passes.stepped(steps, Pipeline([FineTune()]) if finetune is not None and not by_hand else None)


def _captured(model: Any, example_inputs: Any) -> Graph:
    observer().stage("capture")
    if isinstance(model, Result):
        model = model.graph
    if not isinstance(model, Graph):
        return capture(model, example_inputs)
    graph = capture(model.module, model.example_inputs if example_inputs is None else example_inputs)
    graph.notes = list(dict.fromkeys([*model.notes, *graph.notes]))
    return graph


def _name(model: Any) -> str:
    if isinstance(model, str | os.PathLike):
        return Path(model).name
    if isinstance(model, Graph):
        model = model.module
    return type(model).__name__


def _verification_inputs(
    graph: Graph, calibration: Iterable[Any] | None, verify: str, seed: int
) -> tuple[list[tuple[str, Inputs]], list[str]]:
    """Return what promises are checked on, and what a reader should know about it."""
    if verify == "off":
        return [], ["nothing was verified, as asked (verify='off'): the result may be wrong"]
    if graph.hollow:
        return [("the shapes of the example inputs", graph.example_inputs)], [
            "no output was compared, since the values of the parameters are not in memory: the result was run on "
            "shapes alone, so its sizes fit, and what it computes was not checked. To check it, prune a small model of "
            "the same class, which takes the same way through this code"
        ]
    batch = next(batches(calibration, graph), None) if calibration is not None else None
    if batch is not None:
        label, inputs = "the first calibration batch", (batch.args, batch.kwargs)
    else:
        inputs, changed = _exercising(graph.example_inputs, seed)
        label = "the example inputs" + (", with noise in place of constants" if changed else "")
    outputs = _run(graph, inputs, label)
    leaves = [
        leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    ]
    if any(not bool(torch.isfinite(leaf).all()) for leaf in leaves):
        return [(label, inputs)], [
            f"the model's outputs hold infinities or NaN on {label}: there, verification proves nothing"
        ]
    return [(label, inputs)], []


def _exercising(inputs: Inputs, seed: int) -> tuple[Inputs, bool]:
    """Put noise in place of floating-point inputs that are constant: a model does not show what it does on zeros."""
    generator = torch.Generator().manual_seed(seed)
    changed = False

    def noisy(leaf: Any) -> Any:
        nonlocal changed
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or leaf.numel() < 2:
            return leaf
        if not bool((leaf == leaf.reshape(-1)[0]).all()):
            return leaf
        changed = True
        return torch.randn(leaf.shape, generator=generator).to(leaf)

    return pytree.tree_map(noisy, inputs), changed


def _run(graph: Graph, inputs: Inputs, label: str) -> Any:
    args, kwargs = inputs
    try:
        return graph.run(*pytree.tree_map(_copied, args), **pytree.tree_map(_copied, kwargs))
    except Exception as error:
        raise CaptureError(
            f"the captured model does not run on {label}: {type(error).__name__}: {error}. Give inputs of the shapes "
            "and types of the example inputs"
        ) from error


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _scored(evaluate: Callable[[Any], float] | None, graph: Graph, clock: _Clock, stage: str) -> float | None:
    """Return the caller's metric of a copy of the graph's module: a metric may move or change what it is given."""
    if evaluate is None:
        return None
    with clock(stage):
        observer().stage(stage)
        try:
            return float(evaluate(copy.deepcopy(graph.module).eval()))
        except GraphOptError:
            raise
        except Exception as error:
            raise PipelineError(
                f"evaluate broke off ({stage}): {type(error).__name__}: {error}. It is called with a module in "
                "evaluation mode, and must return a number"
            ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every generator for a block, and put them back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Clock:
    """Measure stages by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@contextmanager
def _traces(settings: Reproducer, context: Context, target: Target) -> Iterator[list[Outcome]]:
    """Let a failure within the block leave the traces that :func:`debugging` asks for; lends a list for the outcome."""
    wanted = asked()
    recorder = Recorder(observer())
    reached: list[Outcome] = []
    try:
        with watching(recorder if wanted.reproducer is not None else recorder.inner):
            yield reached
    except GraphOptError as error:
        if wanted.bisect and reached:
            recorder.inner.stage("find the pass to blame")
            culprit = find_culprit(
                settings.pipeline, settings.graph, context, lambda g: failure(lambda: target.lower(g, None))
            )
            error.add_note(str(culprit) if culprit is not None else "bisection: it does not fail again")
        if wanted.reproducer is not None:
            error.add_note(_reproduced(settings, context, recorder, reached, error, wanted.reproducer))
        raise


def _reproduced(
    settings: Reproducer,
    context: Context,
    recorder: Recorder,
    reached: list[Outcome],
    error: GraphOptError,
    folder: Path,
) -> str:
    """Write a reproducer of a failure, and say where it is or why there is none."""
    passes, graph = settings.pipeline, settings.graph
    if reached:
        passes, graph = Pipeline(), reached[0].graph
    elif recorder.graphs and settings.verify == "each":
        passes, graph = passes[len(recorder.graphs) - 1 :], recorder.graphs[-1]
    costs = {name: float(getattr(context.original, name)) for name in ("flops", "params", "memory")}
    budget = settings.budget
    absolute = None if budget is None or "latency" in budget.limits({**costs, "latency": 1.0}) else budget.limits(costs)
    found = replace(
        settings,
        pipeline=passes,
        graph=graph,
        budget=None if absolute is None else Budget(**absolute),
        error=str(error),
        notes=[
            f"{name} is a function, and was not saved"
            for name, value in (("loss", context.loss), ("evaluate", context.evaluate), ("finetune", context.train))
            if value is not None
        ],
    )
    try:
        found.save(folder)
    except GraphOptError as failed:
        return f"no reproducer could be written: {failed}"
    return f"a reproducer was written: graphopt replay {folder}"


# -- after the passes -----------------------------------------------------------------------------------------------


def _budget_lines(budget: Budget | None, passes: Pipeline, report: Report) -> list[BudgetLine]:
    """Return what was asked for and what was reached; of several budgets in a pipeline, the last."""
    own = [b for b in (getattr(each, "budget", None) for each in passes) if isinstance(b, Budget)]
    asked = budget or (own[-1] if own else None)
    if asked is None:
        return []
    known = {name: getattr(report.before, name) for name in ("flops", "params", "memory")}
    return [
        BudgetLine(name, known[name], limit, getattr(report.after, name)) for name, limit in asked.limits(known).items()
    ]


def _warnings(report: Report, outcome: Outcome, budget: Budget | None) -> list[str]:
    found = []
    for record in outcome.records:
        mistake = "The result is right, but this is a mistake in graphopt: please report the model"
        for name, why in record.left_alone.items():
            found.append(f"{record.name} left {name} alone: changing it gave a wrong model ({why}). {mistake}")
        if record.left_out:
            found.append(f"{record.name} was left out: {record.left_out}. {mistake}")
    if any(record.name.startswith("prune") for record in outcome.records):
        if not report.groups:
            found.append("nothing was pruned: the model costs no more than the budget allows as it is")
    elif not report.changed:
        found.append(
            "nothing was done: the passes found nothing to do, and without a budget nothing is pruned. Give one, such "
            "as budget=graphopt.Budget(flops=0.5)"
        )
    for line in report.budget:
        if not line.met:
            found.append(
                f"the budget was not met: {line.dimension} {amount(line.achieved)} of at most {amount(line.target)}; "
                f"no pass of the pipeline '{report.pipeline}' looks after it"
            )
    if report.unknown:
        names = [row.operator for row in report.unknown]
        found.append(
            f"{plural(len(names), 'operator')} without an axis rule, {listing(names)}: whatever they touch stays whole"
        )
    return found


def _lowered(
    target: Target, outcome: Outcome, output: Path | None, report: Report, clock: _Clock
) -> tuple[Lowered, dict[str, Path]]:
    """Lower to the target; with a folder, write everything into it, or nothing at all."""
    observer().stage(f"lower to {target.name}")
    outcome.graph.module.meta[PROVENANCE] = _provenance(report)
    if output is None:
        with clock("lower"):
            lowered = target.lower(outcome.graph, None)
        _tell(report, target, lowered)
        return lowered, {}
    with staged(output) as stage:
        with clock("lower"):
            lowered = target.lower(outcome.graph, stage)
        _tell(report, target, lowered)
        made = {kind: Path(path) for kind, path in lowered.artifacts.items()}
        names = {**{kind: path.name for kind, path in made.items()}, "plan": PLAN, "report": REPORT_PAGE}
        report.artifacts = {kind: str(output / name) for kind, name in names.items()}
        if outcome.graph.weights is not None:
            *shards, last = outcome.plan.apply_files(outcome.graph.weights.checkpoint, stage)
            made |= {f"shard {number}": path for number, path in enumerate(shards, 1)} | {"checkpoint": last}
            report.artifacts |= {kind: str(output / path.name) for kind, path in made.items()}
        outcome.plan.save(stage / PLAN)
        report.save_html(stage / REPORT_PAGE)
        report.save_json(stage / REPORT_DATA)
        made |= {"plan": stage / PLAN, "report": stage / REPORT_PAGE}
        facts = {key: getattr(report, key) for key in ("model", "target", "pipeline", "seed", "versions")}
        manifest = write_manifest(stage, made, facts)
        made["manifest"] = manifest
    artifacts = {kind: output / path.name for kind, path in made.items()}
    report.artifacts = {kind: str(path) for kind, path in artifacts.items()}
    return lowered, artifacts


def _provenance(report: Report) -> dict[str, str]:
    """Return how a model was made, the same for the same call: what stands in the file itself."""
    return {
        "graphopt.pipeline": report.pipeline,
        "graphopt.seed": str(report.seed),
        "graphopt.target": report.target,
        "graphopt.version": report.versions["graphopt"],
    }


def _tell(report: Report, target: Target, lowered: Lowered) -> None:
    report.notes += lowered.notes
    for check in lowered.checks:
        subject = f"the module and what {check.runtime} computes from the {target.name} file"
        found = Comparison.of(subject, check.difference, f"inputs: {check.inputs}")
        if check.passed and found.allowed is not None:
            # Where the model itself amplifies round-off, the target allows as much as it amplifies.
            found = replace(found, allowed=max(found.allowed, 4 * check.noise))
        report.comparisons.append(found)


def _versions() -> dict[str, str]:
    return {
        "graphopt": version("graphopt"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
