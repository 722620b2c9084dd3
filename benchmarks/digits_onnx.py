"""Prune small models trained on digits as PyTorch modules and as ONNX files, and compare what they recognise.

    python -m benchmarks.digits_onnx [--seeds 5 6 7] [--models NAME …] [--keep 0.7 0.5 0.3] [--dense FOLDER]
                                     [--json FILE] [--show FILE]

For a ResNet, a MobileNet and a ViT at each share of kept multiply-adds, by `l2`, alone and followed by `ridge-refit` on
128 training images without labels: accuracy on the test images, of the ONNX file in ONNX Runtime. Each model goes in
three ways: as a module; as a module with its batch norms folded first; and as the ONNX file that torch's exporter
writes of it, which has them folded, too. The second and the third score the same weights, and should keep the same
indices and agree: the table says on how many test images they do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from benchmarks.digits import MODELS, Digits, accuracy, load
from benchmarks.digits_criteria import calibration, dense, spread
from graphopt.importance import L2
from graphopt.passes.merge import FoldBatchNorm
from graphopt.passes.prune import PruneChannels
from graphopt.passes.recover import RidgeRefit

WAYS = ("torch", "torch, folded", "onnx")
COLUMNS = ("pruned", "ridge")

Row = dict[str, Any]


def exported(model: nn.Module, images: Tensor) -> Any:
    """Return the model as torch's exporter writes it, its batch of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        program = torch.onnx.export(
            model, (images,), dynamo=True, dynamic_shapes=({0: batch},), input_names=["x"], verbose=False
        )
    assert program is not None
    return program.model_proto


def pipelines(way: str, keep: float) -> dict[str, graphopt.Pipeline]:
    """Return the passes, without and with recovery."""
    first = [FoldBatchNorm()] if way == "torch, folded" else []
    prune = PruneChannels(importance=L2(), budget=graphopt.Budget(flops=keep))
    return {"pruned": graphopt.Pipeline([*first, prune]), "ridge": graphopt.Pipeline([*first, prune, RidgeRefit()])}


def logits(result: Any, images: Tensor) -> Tensor:
    """Return what a result computes: of an ONNX model what ONNX Runtime makes of it, of a module its own."""
    if result.onnx is None:
        with torch.no_grad():
            found: Tensor = result.module(images)
        return found
    import onnxruntime

    session = onnxruntime.InferenceSession(result.onnx.SerializeToString(), providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def measure(name: str, seed: int, options: argparse.Namespace) -> list[Row]:
    """Prune one trained model in every way."""
    data = load(seed)
    model = dense(name, seed, data, options.dense)
    unlabelled = [images for images, _ in calibration(data, seed)]
    file = exported(model, data.test_images[:8])
    original = {way: file if way == "onnx" else model for way in WAYS}
    common = {"model": name, "seed": seed, "dense": accuracy(model, data)}
    rows: list[Row] = []
    for keep in options.keep:
        answers: dict[tuple[str, str], Tensor] = {}
        for way in WAYS:
            row: Row = {**common, "keep": keep, "way": way}
            for column, passes in pipelines(way, keep).items():
                found, flops = pruned(original[way], way, passes, data, unlabelled)
                answers[way, column] = found
                row |= {column: right(found, data), "flops": flops}
            rows.append(row)
        for column in COLUMNS:
            a, b = (answers[way, column] for way in WAYS[1:])
            rows[-1][f"same {column}"] = (a.argmax(1) == b.argmax(1)).float().mean().item()
            rows[-1][f"apart {column}"] = ((a - b).abs().max() / a.abs().max()).item()
    return rows


def pruned(
    model: Any, way: str, passes: graphopt.Pipeline, data: Digits, unlabelled: Sequence[Tensor]
) -> tuple[Tensor, float]:
    """Run passes; return the logits of the test images, and the share of multiply-adds that is left."""
    inputs = None if way == "onnx" else (data.test_images[:8],)
    result = graphopt.optimize(model, inputs, pipeline=passes, calibration=unlabelled, verify="final")
    report = result.report
    return logits(result, data.test_images), report.after.flops / report.before.flops


def right(found: Tensor, data: Digits) -> float:
    """Return the share of test images that are recognised."""
    return (found.argmax(1) == data.test_labels).float().mean().item()


def table_of(name: str, rows: Sequence[Row]) -> Table:
    """Make the table of one model."""
    mine = [row for row in rows if row["model"] == name]
    seeds = sorted({row["seed"] for row in mine})
    dense_by_seed = {row["seed"]: row["dense"] for row in mine}
    title = f"{name}, dense {spread(list(dense_by_seed.values()))}, {len(seeds)} seeds"
    table = Table("removed", "way in", "multiply-adds left", "pruned", "ridge refit", "same answers", title=title)
    for keep in dict.fromkeys(row["keep"] for row in mine):
        for way in WAYS:
            each = [row for row in mine if (row["keep"], row["way"]) == (keep, way)]
            agreement = ", ".join(
                f"{statistics.fmean(row[f'same {column}'] for row in each):.1%}" for column in COLUMNS if way == WAYS[2]
            )
            cells = (spread([row[column] for row in each]) for column in COLUMNS)
            left = statistics.fmean(row["flops"] for row in each)
            table.add_row(f"{1 - keep:.0%}", way, f"{left:.3f}", *cells, agreement)
        table.add_section()
    return table


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[5, 6, 7])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--keep", nargs="*", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--dense", type=Path, help="a folder for the trained dense models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path)
    return parser.parse_args()


def main() -> int:
    """Measure and print."""
    options = parsed()
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(options.show.read_text()) if options.show else []
    for seed in () if options.show else options.seeds:
        for name in options.models:
            rows += measure(name, seed, options)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    console = Console(width=140)
    for name in dict.fromkeys(row["model"] for row in rows):
        console.print(table_of(name, rows))
    gaps = [
        row["ridge"] - next(r["ridge"] for r in rows if _key(r) == _key(row) and r["way"] == WAYS[1])
        for row in rows
        if row["way"] == WAYS[2]
    ]
    console.print(
        f"After a refit, onnx minus torch, folded: {np.mean(gaps):+.4f} on average, {max(map(abs, gaps)):.4f} at most."
    )
    return 0


def _key(row: Row) -> tuple[Any, ...]:
    return row["model"], row["seed"], row["keep"]


if __name__ == "__main__":
    sys.exit(main())
