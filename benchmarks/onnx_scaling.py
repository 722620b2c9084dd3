"""Time optimizers of ONNX files on chains of growing length: is what they take linear in the nodes?

    python -m benchmarks.onnx_scaling [--nodes N …] [--optimizers O …] [--repeats N] [--limit SECONDS] [--json FILE]

A chain repeats a block of ten nodes: linear layers, an activation, a residual sum, and some of each kind of thing that
optimizers look for: shape arithmetic that comes to a constant, an identity, a scale
that can be folded. Each optimizer runs in a process of its own; the growth of its memory and the seconds from opening
the file to having written the other are medians of the repeats. An exponent of 1 is linear: it is the slope of a line
through the logarithms. An optimizer that needs longer than the limit is not given a longer chain.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.onnx_lossless import operators
from benchmarks.onnx_optimizers import OPTIMIZERS, optimize_apart

WIDTH = 8
BLOCK = 10

Row = dict[str, Any]


def chain(node_count: int) -> Any:
    """Make a model of so many nodes, rounded down to whole blocks."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def weight(name: str, array: Any) -> str:
        weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}/node", **attributes))
        return output

    first = weight("first", np.array([0]))
    width = weight("width", np.array([WIDTH]))
    x = "x"
    for number in range(max(node_count // BLOCK, 1)):
        stem = f"block{number}"
        matrix = weight(f"{stem}.weight", rng.standard_normal((WIDTH, WIDTH), np.float32) / math.sqrt(WIDTH))
        bias = weight(f"{stem}.bias", rng.standard_normal(WIDTH, np.float32))
        scale = weight(f"{stem}.scale", rng.uniform(0.5, 1, WIDTH).astype(np.float32))
        y = add("MatMul", [x, matrix], f"{stem}/product")
        y = add("Mul", [y, scale], f"{stem}/scaled")
        y = add("Add", [y, bias], f"{stem}/sum")
        y = add("Tanh", [y], f"{stem}/active")
        shape = add("Shape", [x], f"{stem}/shape")
        batch = add("Gather", [shape, first], f"{stem}/batch", axis=0)
        sizes = add("Concat", [batch, width], f"{stem}/sizes", axis=0)
        y = add("Reshape", [y, sizes], f"{stem}/reshaped")
        y = add("Identity", [y], f"{stem}/same")
        x = add("Add", [x, y], f"{stem}/residual")
    nodes[-1].output[0] = "y"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=onnx.IR_VERSION_2024_3_25)


def measure(node_counts: Sequence[int], optimizers: Sequence[str], repeats: int, limit: float) -> list[Row]:
    """Give each chain to each optimizer that was not too slow for a shorter one."""
    import onnx

    rows: list[Row] = []
    slow: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(node_counts):
            source = Path(folder, f"chain{count}.onnx")
            onnx.save(chain(count), str(source))
            for optimizer in optimizers:
                if optimizer in slow:
                    continue
                result = Path(folder, optimizer, "model.onnx")
                result.parent.mkdir(exist_ok=True)
                runs = [optimize_apart(optimizer, source, result, timeout=limit)]
                while not runs[-1].failure and len(runs) < repeats:
                    runs.append(optimize_apart(optimizer, source, result, timeout=limit))
                row: Row = {"optimizer": optimizer, "nodes": count, "failure": runs[-1].failure}
                rows.append(row)
                if row["failure"]:
                    slow.add(optimizer)
                    continue
                row["seconds"] = statistics.median(run.seconds for run in runs)
                row["peak_bytes"] = statistics.median(run.peak_bytes for run in runs)
                row["left"] = operators(onnx.load(str(result))).total()
    return rows


def exponent(rows: Sequence[Row], key: str) -> float:
    """Fit a power of the number of nodes; nan where there are too few points."""
    points = [(row["nodes"], row[key]) for row in rows if not row["failure"] and row[key] > 0]
    if len(points) < 2:
        return float("nan")
    x, y = np.log(np.array(points, dtype=float).T)
    return float(np.polyfit(x, y, 1)[0])


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print a line for each optimizer."""
    counts = sorted({row["nodes"] for row in rows})
    columns = [f"{count:,}" for count in counts]
    table = Table("", *columns, "exponent", "of memory", title="seconds, peak MB and nodes left, by nodes of the chain")
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        own = {row["nodes"]: row for row in rows if row["optimizer"] == name}
        cells = []
        for count in counts:
            row = own.get(count)
            if row is None or row["failure"]:
                cells.append("" if row is None else f"[red]{row['failure'][:40]}")
            else:
                cells.append(f"{row['seconds']:.2f} s  {row['peak_bytes'] / 1e6:.0f} MB  {row['left']:,}")
        fits = (exponent(list(own.values()), key) for key in ("seconds", "peak_bytes"))
        table.add_row(name, *cells, *(f"{each:.2f}" for each in fits))
    console.print(table)


def main() -> None:
    """Read the command line, measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 5_000, 10_000, 25_000, 50_000])
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(options.nodes, options.optimizers, options.repeats, options.limit)
    print_rows(rows, Console(width=220))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
