"""Compare lossless optimizers of ONNX files on the zoo: nodes, bytes, latency in ONNX Runtime, and what they take.

    python -m benchmarks.onnx_lossless [NAME …] [--exporter E …] [--optimizers O …] [--rounds N] [--json FILE]

Each model is exported by torch (files are shared through `GRAPHOPT_ONNX_CACHE`), and given to every optimizer, each in
a process of its own. All files are then loaded into one process, ONNX Runtime's own optimizations once off and once on,
and run in rounds, in an order drawn anew for each; a latency is the median over the rounds of the file's time over
that of the original in the same round. Constants do not count as nodes, as they are not run.

Outputs are compared on two batch sizes. A file that does not load, does not run at another batch size than the
example's, or differs by more than `LIMIT` is shown as broken, and is not timed. ``ort-extended`` writes operators of
ONNX Runtime's own (the column says how many), which no other runtime reads.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.onnx_optimizers import OPTIMIZERS, optimize_apart
from tests.zoo import ZOO
from tests.zoo.onnx_files import EXPORTERS, ExportError, exported, feeds

ORIGINAL = "original"
LEVELS = {"off": "ORT_DISABLE_ALL", "on": "ORT_ENABLE_ALL"}
LIMIT = 1e-3
"""The largest difference of an output, relative to its largest value, that float32 in another order explains."""

NOISE = 0.02
"""Latencies that differ by less than this share are counted as equal."""

WARM_UP = 3
BATCHES = (2, 3)

Row = dict[str, Any]
Feeds = dict[str, np.ndarray[Any, Any]]


def operators(model: Any) -> Counter[str]:
    """Count the operators of a model by type, in its bodies and at each call of its functions, too."""
    functions = {(f.domain, f.name): f for f in model.functions}

    def count(nodes: Iterable[Any]) -> Counter[str]:
        found: Counter[str] = Counter()
        for node in nodes:
            if (node.domain, node.op_type) in functions:
                found += count(functions[node.domain, node.op_type].node)
            elif node.op_type != "Constant":
                found[f"{node.domain}::{node.op_type}".removeprefix("::")] += 1
            for attribute in node.attribute:
                for graph in [attribute.g, *attribute.graphs]:
                    found += count(graph.node)
        return found

    return count(model.graph.node)


def session(path: Path, level: str, threads: int = 1) -> Any:
    """Load a file into ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def difference(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """Return the largest difference of an output relative to its largest value; infinite where shapes differ."""
    if [a.shape for a in expected] != [b.shape for b in found]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        scale = float(np.abs(a.astype(np.float64)).max(initial=0.0)) or 1.0
        apart = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0)) / scale
        worst = max(worst, apart) if np.isfinite(apart) else float("inf")
    return worst


def compared(path: Path, inputs: Sequence[Feeds], expected: Sequence[Sequence[Any]]) -> tuple[float, str]:
    """Run a file on several batch sizes; return its difference to what is expected, and why it is broken if it is."""
    worst = 0.0
    try:
        run = session(path, "off")
        names = [output.name for output in run.get_outputs()]
        for each, outputs in zip(inputs, expected, strict=True):
            known = {value.name for value in run.get_inputs()}
            found = run.run(names, {key: array for key, array in each.items() if key in known})
            worst = max(worst, difference(outputs, found))
    except Exception as error:  # noqa: BLE001  # whatever the file does wrong is the finding
        return float("inf"), " ".join(str(error).split())[:160]
    return worst, "" if worst <= LIMIT else f"outputs differ by {worst:.0e}"


def latencies(paths: Mapping[str, Path], inputs: Feeds, level: str, rounds: int) -> dict[str, list[float]]:
    """Run all files in interleaved rounds; return the seconds of each round."""
    sessions = {name: session(path, level) for name, path in paths.items()}
    given = {name: {value.name: inputs[value.name] for value in each.get_inputs()} for name, each in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    order, shuffle = list(sessions), random.Random(0).shuffle
    for number in range(rounds + WARM_UP):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            sessions[name].run(None, given[name])
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(name: str, exporter: Any, optimizers: Sequence[str], rounds: int) -> list[Row]:
    """Optimise one file with each optimizer and compare the files; the first row is the original's."""
    import onnx

    source = exported(name, exporter)
    inputs = [feeds(name, source, batch=batch) for batch in BATCHES]
    run = session(source, "off")
    expected = [run.run(None, each) for each in inputs]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {ORIGINAL: source}
        for optimizer in optimizers:
            paths[optimizer] = Path(folder, optimizer, "model.onnx")
            paths[optimizer].parent.mkdir()
        for variant, path in paths.items():
            row: Row = {"model": name, "exporter": exporter, "variant": variant, "broken": ""}
            rows.append(row)
            if variant != ORIGINAL:
                took = optimize_apart(variant, source, path)
                row |= {"seconds": took.seconds, "peak_bytes": took.peak_bytes}
                if took.failure:
                    row["broken"] = took.failure
                    continue
            found = operators(onnx.load(str(path)))
            row |= {
                "nodes": found.total(),
                "foreign": sum(count for key, count in found.items() if "::" in key),
                "operators": dict(found.most_common()),
                "bytes": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),
            }
            row["difference"], row["broken"] = compared(path, inputs, expected)
        sound = {row["variant"]: paths[row["variant"]] for row in rows if not row["broken"]}
        for level in LEVELS:
            seconds = latencies(sound, inputs[0], level, rounds)
            for row in rows:
                if row["variant"] in sound:
                    own = seconds[row["variant"]]
                    row[f"{level}_ms"] = statistics.median(own) * 1e3
                    row[f"{level}_ratio"] = statistics.median(
                        a / b for a, b in zip(own, seconds[ORIGINAL], strict=True)
                    )
    return rows


def cell(row: Row) -> str:
    """Say in one cell: nodes, and latency over the original's with ONNX Runtime's optimizations off and on."""
    if row["broken"]:
        return f"[red]{row['broken'][:40]}"
    return f"{row['nodes']:>5} {row['off_ratio']:.2f} {row['on_ratio']:.2f}"


def print_models(rows: Sequence[Row], optimizers: Sequence[str], console: Console) -> None:
    """Print a line for each file."""
    table = Table("model", "exporter", "original", *optimizers, title="nodes; latency over the original's, off and on")
    files = dict.fromkeys((row["model"], row["exporter"]) for row in rows)
    by_key = {(row["model"], row["exporter"], row["variant"]): row for row in rows}
    for file in files:
        original = by_key[(*file, ORIGINAL)]
        if original["broken"]:
            table.add_row(*file, f"[red]{original['broken'][:40]}")
            continue
        first = f"{original['nodes']:>5} {original['off_ms']:.1f} {original['on_ms']:.1f} ms"
        table.add_row(*file, first, *(cell(by_key[(*file, each)]) for each in optimizers))
    console.print(table)


def print_summary(rows: Sequence[Row], optimizers: Sequence[str], console: Console) -> None:
    """Print a line for each optimizer: medians of ratios, and on how many files the first one is ahead of it."""
    figures = ("nodes", "bytes", "off_ratio", "on_ratio")
    table = Table(
        "",
        "broken",
        "foreign operators",
        "nodes",
        "bytes",
        "off",
        "on",
        "seconds",
        "peak MB",
        *(f"{optimizers[0]} better / equal / worse: {each.removesuffix('_ratio')}" for each in figures),
    )
    by_key = {(row["model"], row["exporter"], row["variant"]): row for row in rows}
    for name in optimizers:
        own = [row for row in rows if row["variant"] == name]
        sound = [row for row in own if not row["broken"]]
        pairs = [(row, by_key[row["model"], row["exporter"], ORIGINAL]) for row in sound]
        if not pairs:
            table.add_row(name, f"{len(own)} of {len(own)}")
            continue
        medians = [statistics.median(row[key] / original[key] for row, original in pairs) for key in ("nodes", "bytes")]
        medians += [statistics.median(row[key] for row in sound) for key in ("off_ratio", "on_ratio")]
        against = [
            (by_key[row["model"], row["exporter"], optimizers[0]], row) for row in sound if name != optimizers[0]
        ]
        against = [(a, b) for a, b in against if not a["broken"]]
        table.add_row(
            name,
            f"{len(own) - len(sound)} of {len(own)}",
            str(sum(row["foreign"] for row in sound)),
            *(f"{each:.3f}" for each in medians),
            f"{statistics.median(row['seconds'] for row in sound):.2f}",
            f"{statistics.median(row['peak_bytes'] for row in sound) / 1e6:.0f}",
            *(" / ".join(map(str, standing(against, key))) if against else "" for key in figures),
        )
    console.print(table)


def standing(pairs: Sequence[tuple[Row, Row]], key: str) -> tuple[int, int, int]:
    """Count where the first of a pair has less of something, as much, or more."""
    noise = NOISE if key.endswith("ratio") else 0.0
    better = sum(a[key] < b[key] * (1 - noise) for a, b in pairs)
    worse = sum(a[key] > b[key] * (1 + noise) for a, b in pairs)
    return better, len(pairs) - better - worse, worse


def main() -> None:
    """Read the command line, measure, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--exporter", nargs="+", choices=EXPORTERS, default=list(EXPORTERS))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=220)
    rows: list[Row] = []
    for name in options.names:
        for exporter in options.exporter:
            try:
                exported(name, exporter)
            except ExportError as error:
                console.print(f"{name} is refused by the {exporter} exporter: {error}", markup=False)
                continue
            with ProcessPoolExecutor(1) as pool:  # a file that ends its process ends no more than that
                rows += pool.submit(measure, name, exporter, options.optimizers, options.rounds).result()
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if rows:
        print_models(rows, options.optimizers, console)
        print_summary(rows, options.optimizers, console)


if __name__ == "__main__":
    main()
