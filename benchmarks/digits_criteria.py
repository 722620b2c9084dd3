"""Prune small models trained on digits with every criterion, with and without recovery, and with Torch-Pruning.

    python -m benchmarks.digits_criteria [--seeds 0 1 …] [--models NAME …] [--criteria NAME …] [--keep 0.7 0.5 0.3]
                                         [--epochs 2] [--dense FOLDER] [--json FILE] [--show FILE …]

For a ResNet, a MobileNet and a ViT, at each share of kept multiply-adds: accuracy on the test images right after
pruning; after `compensate-mean`, and after `ridge-refit`, on 128 training images without their labels; and, from
what pruning left, after two epochs of training. Criteria that look at data see the same 128 images; `group-taylor`,
ours and Torch-Pruning's, sees their labels, too. Torch-Pruning prunes globally, with its defaults, at the ratio that
leaves the same multiply-adds, found by bisection; both sides are counted by PyTorch's counter. Each dense model is
trained once a seed; with `--dense` it is kept in a folder and found there again. `--show` prints what `--json` wrote
before, of several runs together.

No criterion may be praised from a refitted run: a refit levels criteria, chance among them. They are to be compared
by the columns without it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from benchmarks.digits import MODELS, Digits, SmallViT, accuracy, load, train
from graphopt.capture import capture
from graphopt.errors import PipelineError
from graphopt.graph import Graph
from graphopt.importance import CRITERIA, InputFluctuation
from graphopt.passes.prune import PruneChannels
from graphopt.passes.recover import CompensateMean, RidgeRefit

DENSE_EPOCHS = 20
SAMPLES = 128
BATCH = 8
"""Images a calibration batch: `group-taylor` squares batch by batch, and asks for small ones."""
SEARCH_STEPS = 12
OURS = {name: kind() for name, kind in CRITERIA.items()} | {
    "input-fluctuation ifv": InputFluctuation("ifv"),
    "input-fluctuation wifn": InputFluctuation("wifn"),
}
THEIRS = {"Torch-Pruning l2": "l2", "Torch-Pruning taylor": "group-taylor"}
"""Their criteria by the name of ours that is the same."""
RECOVERIES = {"mean": CompensateMean(), "ridge": RidgeRefit()}
COLUMNS = {"pruned": "pruned", "mean": "mean-bias", "ridge": "ridge refit", "tuned": "trained"}

Batches = list[tuple[Tensor, Tensor]]
Row = dict[str, Any]


def dense(name: str, seed: int, data: Digits, folder: Path | None) -> nn.Module:
    """Return the trained model, from the folder if it is there."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    path = None if folder is None else folder / f"{name}-{seed}.pt"
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, data, epochs=DENSE_EPOCHS, lr=3e-3, seed=seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model


def calibration(data: Digits, seed: int) -> Batches:
    """Return batches of training images with their labels."""
    chosen = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))[:SAMPLES]
    return [(data.train_images[i], data.train_labels[i]) for i in chosen.split(BATCH)]


def flops(model: nn.Module, inputs: Tensor) -> int:
    """Count floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return int(counter.get_total_flops())


def ours(graph: Graph, criterion: Any, keep: float, data: Batches, seed: int) -> dict[str, nn.Module]:
    """Prune, alone and followed by each recovery."""
    if "seed" in {f.name for f in dataclasses.fields(criterion)}:
        criterion = dataclasses.replace(criterion, seed=seed)
    prune = PruneChannels(importance=criterion, budget=graphopt.Budget(flops=keep))
    unlabelled = [images for images, _ in data]

    def run(*recoveries: graphopt.Pass) -> nn.Module:
        needs_labels = criterion.name == "group-taylor"
        pipeline = graphopt.Pipeline([prune, *recoveries])
        found = graphopt.optimize(
            graph, pipeline=pipeline, calibration=data if needs_labels else unlabelled, verify="off"
        )
        return found.module

    return {"pruned": run()} | {name: run(each) for name, each in RECOVERIES.items()}


def theirs(model: nn.Module, criterion: str, keep: float, data: Batches, inputs: Tensor) -> nn.Module:
    """Prune with Torch-Pruning at the ratio that leaves the multiply-adds closest to what is asked for."""
    limit = keep * flops(model, inputs)
    low, high = 0.0, 1.0
    best, distance = model, math.inf
    for _ in range(SEARCH_STEPS):
        ratio = (low + high) / 2
        try:
            found = _theirs_at(ratio, model, criterion, data, inputs)
            left = flops(found, inputs)
        except Exception:  # noqa: BLE001  # a ratio at which they fail, whatever they raise, is too high
            high = ratio
            continue
        if abs(left - limit) < distance:
            best, distance = found, abs(left - limit)
        low, high = (ratio, high) if left > limit else (low, ratio)
    return best


def _theirs_at(ratio: float, model: nn.Module, criterion: str, data: Batches, inputs: Tensor) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(model)
    options: dict[str, Any] = {}
    if isinstance(model, SmallViT):
        layers = list(model.layers)
        options = {"num_heads": {layer.qkv: layer.heads for layer in layers}}
        options["unwrapped_parameters"] = [(model.position, 2)]
    importance = (
        tp.importance.GroupTaylorImportance()
        if criterion == "group-taylor"
        else (tp.importance.GroupMagnitudeImportance(p=2))
    )
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[model.head],
        **options,
    )
    if criterion == "group-taylor":
        for images, labels in data:
            cross_entropy(model(images), labels).backward()
    pruner.step()
    model.zero_grad()
    return model


def measure(name: str, seed: int, options: argparse.Namespace) -> list[Row]:
    """Prune one trained model in every way."""
    data = load(seed)
    model = dense(name, seed, data, options.dense)
    inputs, batches = data.test_images[:8], calibration(data, seed)
    original, graph = flops(model, inputs), capture(model, (inputs,))
    common = {"model": name, "seed": seed, "dense": accuracy(model, data)}
    rows: list[Row] = []

    def add(way: str, keep: float, found: Mapping[str, nn.Module]) -> None:
        row = {**common, "way": way, "keep": keep, "flops": flops(found["pruned"], inputs) / original}
        row |= {column: accuracy(each, data) for column, each in found.items()}
        if options.epochs:
            tuned = copy.deepcopy(found["pruned"])
            train(tuned, data, epochs=options.epochs, lr=2e-3, seed=seed)
            row["tuned"] = accuracy(tuned, data)
        rows.append(row)

    for keep in options.keep:
        for way in options.criteria:
            if way in THEIRS:
                add(way, keep, {"pruned": theirs(model, THEIRS[way], keep, batches, inputs)})
                continue
            try:
                add(way, keep, ours(graph, OURS[way], keep, batches, seed))
            except PipelineError as error:
                if way != "bn-gamma":
                    raise
                rows.append({**common, "way": way, "keep": keep, "refused": str(error)})
    return rows


def spread(values: Sequence[float]) -> str:
    """Write mean and deviation."""
    return f"{statistics.fmean(values):.3f} ± {statistics.pstdev(values):.3f}" if values else ""


def table_of(name: str, rows: Iterable[Row]) -> Table:
    """Make the table of one model: a section a share, a line a way."""
    mine = [row for row in rows if row["model"] == name]
    seeds = sorted({row["seed"] for row in mine})
    dense_by_seed = {row["seed"]: row["dense"] for row in mine}
    title = f"{name}, dense {spread(list(dense_by_seed.values()))}, {len(seeds)} seeds"
    table = Table("removed", "criterion", "multiply-adds left", *COLUMNS.values(), title=title)
    for keep in dict.fromkeys(row["keep"] for row in mine):
        for way in dict.fromkeys(row["way"] for row in mine):
            each = [row for row in mine if (row["keep"], row["way"]) == (keep, way)]
            if any("refused" in row for row in each):
                table.add_row(f"{1 - keep:.0%}", way, "no batch norm")
                continue
            cells = (spread([row[column] for row in each if column in row]) for column in COLUMNS)
            table.add_row(f"{1 - keep:.0%}", way, f"{statistics.fmean(row['flops'] for row in each):.3f}", *cells)
        table.add_section()
    return table


def against(rows: Sequence[Row]) -> Table:
    """Make the table of differences, seed by seed, between a criterion of ours and the same of Torch-Pruning."""
    table = Table(
        "model",
        "criterion",
        "removed",
        "pruned",
        "trained",
        "ours with mean-bias",
        "ours with ridge refit",
        title="accuracy of ours minus that of Torch-Pruning, same criterion, same multiply-adds, by seed; "
        "recovery is ours alone",
    )
    known = {(row["model"], row["seed"], row["keep"], row["way"]): row for row in rows}
    for name in dict.fromkeys(row["model"] for row in rows):
        for their_way, our_way in THEIRS.items():
            for keep in dict.fromkeys(row["keep"] for row in rows):
                pairs = [
                    (row, known[name, row["seed"], keep, their_way])
                    for row in rows
                    if (row["model"], row["keep"], row["way"]) == (name, keep, our_way)
                    and (name, row["seed"], keep, their_way) in known
                ]
                if not pairs:
                    continue
                columns = (("pruned", "pruned"), ("tuned", "tuned"), ("mean", "pruned"), ("ridge", "pruned"))
                cells = (spread([a[x] - b[y] for a, b in pairs if x in a and y in b]) for x, y in columns)
                table.add_row(name, our_way, f"{1 - keep:.0%}", *cells)
    return table


def levelled(rows: Sequence[Row]) -> str:
    """Say how far criteria are apart with and without a refit."""

    def apart(column: str) -> float:
        gaps = []
        for name in {row["model"] for row in rows}:
            for keep in {row["keep"] for row in rows}:
                by_way: dict[str, list[float]] = {}
                for row in rows:
                    if (row["model"], row["keep"]) == (name, keep) and "ridge" in row:
                        by_way.setdefault(row["way"], []).append(row[column])
                means = [statistics.fmean(values) for values in by_way.values()]
                gaps.append(max(means) - min(means) if means else 0.0)
        return statistics.fmean(gaps)

    return (
        f"Between the best and the worst criterion of ours lie {apart('pruned'):.3f} without recovery and "
        f"{apart('ridge'):.3f} after a refit, on average over models and shares. No criterion may be praised from a "
        "refitted run: compare criteria by the columns without it."
    )


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*THEIRS, *OURS]
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--criteria", nargs="*", choices=every, default=every, metavar="NAME")
    parser.add_argument("--keep", nargs="*", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--epochs", type=int, default=2, help="of training after pruning; 0 for none")
    parser.add_argument("--dense", type=Path, help="a folder for the trained dense models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", nargs="*", type=Path, default=[])
    return parser.parse_args()


def main() -> int:
    """Measure and print."""
    options = parsed()
    torch.set_num_threads(1)
    rows: list[Row] = [row for path in options.show for row in json.loads(path.read_text())]
    for seed in () if options.show else options.seeds:
        for name in options.models:
            rows += measure(name, seed, options)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    console = Console(width=140)
    for name in dict.fromkeys(row["model"] for row in rows):
        console.print(table_of(name, rows))
    console.print(against(rows))
    console.print(levelled(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
