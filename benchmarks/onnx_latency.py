"""Measure a pruned model against the dense one in ONNX Runtime.

    python -m benchmarks.onnx_latency [NAME] [--flops F] [--multiples M …] [--batch N] [--threads N] [--repeats N]
                                      [--json FILE]

The model (ResNet-50 unless another of the zoo is named, in its native size, with random weights) is lowered to ONNX as
it is, and pruned to a share of its multiply-adds once for each channel multiple. All files are loaded into one process,
and run one after another, in an order that is drawn anew for every round. The table shows the median and the smallest
time of a run, and the median over the rounds of dense time over pruned time: what else happens on the machine during
a round slows its runs alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.targets.onnx import OnnxTarget
from tests.zoo import ZOO

WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """What one file took.

    ``speedup`` is the median over the rounds of the dense model's time over this one's, in the same round.
    """

    variant: str
    gmacs: float
    megabytes: float
    median_ms: float
    smallest_ms: float
    speedup: float


def macs(module: Any, inputs: tuple[Any, ...]) -> int:
    """Count the multiply-adds of one call."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2


def lowered(
    name: str, folder: Path, *, flops: float, multiples: list[int], batch: int
) -> tuple[dict[str, tuple[Path, int]], dict[str, np.ndarray[Any, Any]]]:
    """Write the dense model and the pruned ones; return each file with its multiply-adds, and inputs by name."""
    zoo = ZOO[name]
    model = zoo.build(native=True)
    args, kwargs = zoo.inputs(native=True, batch=batch)
    if kwargs:
        raise SystemExit(f"{name} takes keyword inputs: {', '.join(kwargs)}; choose a model that takes tensors")
    budgets: list[tuple[str, int, graphopt.Budget | None]] = [("dense", 1, None)]
    budgets += [(f"pruned, multiples of {m}", m, graphopt.Budget(flops=flops)) for m in multiples]
    found = {}
    feeds: dict[str, np.ndarray[Any, Any]] = {}
    for variant, multiple, budget in budgets:
        target = OnnxTarget(channel_multiple=multiple)
        result = graphopt.optimize(model, args, target=target, budget=budget, output=folder / variant, verify="final")
        found[variant] = (result.artifacts["onnx"], macs(result.module.eval(), args))
        feeds = {value.name: tensor.numpy() for value, tensor in zip(result.onnx.graph.input, args, strict=True)}
    return found, feeds


def measure(
    files: dict[str, tuple[Path, int]], feeds: dict[str, np.ndarray[Any, Any]], *, threads: int, repeats: int
) -> list[Timing]:
    """Time all files in interleaved rounds."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    sessions = {
        variant: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for variant, (path, _) in files.items()
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in sessions}
    order = list(sessions)
    shuffle = random.Random(0).shuffle
    for round_ in range(repeats + WARM_UP):
        shuffle(order)
        for variant in order:
            start = time.perf_counter()
            sessions[variant].run(None, feeds)
            if round_ >= WARM_UP:
                seconds[variant].append(time.perf_counter() - start)
    return [
        Timing(
            variant,
            count / 1e9,
            path.stat().st_size / 1e6,
            statistics.median(seconds[variant]) * 1e3,
            min(seconds[variant]) * 1e3,
            statistics.median(a / b for a, b in zip(seconds["dense"], seconds[variant], strict=True)),
        )
        for variant, (path, count) in files.items()
    ]


def main() -> None:
    """Read the command line, measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="resnet50", choices=sorted(ZOO))
    parser.add_argument("--flops", type=float, default=0.5, help="share of the multiply-adds that is kept")
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 8, 16], help="channel multiples to compare")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files, feeds = lowered(
            options.name, Path(folder), flops=options.flops, multiples=options.multiples, batch=options.batch
        )
        timings = measure(files, feeds, threads=options.threads, repeats=options.repeats)
    table = Table(title=f"{options.name}, batch {options.batch}, {options.threads} thread(s), {options.repeats} rounds")
    for column in ("", "GMACs", "MB", "median ms", "smallest ms", "speedup"):
        table.add_column(column, justify="left" if not column else "right")
    for t in timings:
        figures = (f"{t.gmacs:.2f}", f"{t.megabytes:.1f}", f"{t.median_ms:.1f}", f"{t.smallest_ms:.1f}")
        table.add_row(t.variant, *figures, f"{t.speedup:.2f}")
    Console().print(table)
    if options.json:
        figures_ = {"machine": platform.processor() or platform.machine(), **vars(options) | {"json": None}}
        options.json.write_text(json.dumps({**figures_, "timings": [asdict(t) for t in timings]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
