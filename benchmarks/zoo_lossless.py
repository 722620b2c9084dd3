"""Run the lossless passes on the zoo: what they save, that outputs stay equal, and what it does to the time of a call.

    python -m benchmarks.zoo_lossless [NAME …] [--pipeline TEXT] [--native] [--compile] [--repeats N] [--json FILE]

Prints one row a model: the largest relative difference of the outputs (the model and its inputs in float64), nodes,
parameters and multiply-adds before and after, and the time of a call in float32 on one thread, after over before. Calls
of the two sides alternate; a ratio is that of the medians. With ``--compile`` both are compiled by ``torch.compile``,
too, which takes a C++ compiler and minutes. A row whose outputs differ by more than 1e-10 ends the run with status 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

LIMIT = 1e-10
PIPELINE = (
    "remove-identities,fold-constants,merge-duplicates,fold-batch-norm,merge-branches,merge-consecutive,fold-scale,"
    "merge-parallel"
)


def optimised(graph: Any, text: str) -> Any:
    """Run a pipeline without its checks; return the graph and how many sites each pass acted on."""
    import graphopt.passes  # noqa: F401  # registers the passes
    from graphopt.cost import CostModel
    from graphopt.dialects.aten import infer
    from graphopt.pipeline import Context, Pipeline, run

    context = Context(original=CostModel(infer(graph)).cost())
    outcome = run(Pipeline.parse(text), graph, context, inputs=[], verify="off")
    return outcome.graph, {r.name: sum(site.applied for site in r.sites) for r in outcome.records}


def difference_in_float64(name: str, text: str, native: bool) -> float:
    """Compare the outputs of a float64 model before and after."""
    from graphopt.capture import capture
    from graphopt.verify import difference, evaluate
    from tests.zoo import ZOO, cast, in_float64

    model = ZOO[name].build(native=native).double()
    args, kwargs = cast(tuple(ZOO[name].inputs(native=native)), torch.float64)
    with in_float64():
        graph = capture(model, (args, kwargs))
    after, _ = optimised(graph, text)
    found = [evaluate(each, args, kwargs, double=True) for each in (graph, after)]
    return difference(*found, double=True).relative


def alternating(sides: Sequence[Callable[[], Any]], repeats: int, least_seconds: float) -> list[float]:
    """Call each side in turn, at least so often and so long; return the medians in seconds."""
    for side in sides:
        side()
        side()
    times: list[list[float]] = [[] for _ in sides]
    started = time.perf_counter()
    while len(times[0]) < repeats or time.perf_counter() - started < least_seconds:
        for side, row in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            row.append(time.perf_counter() - start)
    return [statistics.median(row) for row in times]


def measure(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Optimise one model, and measure both."""
    import warnings

    from graphopt.capture import capture
    from graphopt.cost import CostModel
    from graphopt.dialects.aten import infer
    from tests.zoo import ZOO

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    native, text = options["native"], options["pipeline"]
    row: dict[str, Any] = {"model": name, "difference": difference_in_float64(name, text, native)}
    inputs = tuple(ZOO[name].inputs(native=native))
    graph = capture(ZOO[name].build(native=native), inputs)
    start = time.perf_counter()
    after, row["sites"] = optimised(graph, text)
    row["seconds"] = time.perf_counter() - start
    for side, each in (("before", graph), ("after", after)):
        cost = CostModel(infer(each)).cost()
        row[side] = {
            "nodes": sum(node.op == "call_function" for node in each.nodes),
            "params": cost.params,
            "macs": cost.macs,
        }
    args, kwargs = ZOO[name].inputs(native=native)
    modules = [each.module.eval() for each in (graph, after)]
    kinds: dict[str, Callable[[Any], Any]] = {"eager": lambda module: module}
    if options["compile"]:
        kinds["compiled"] = torch.compile
    for kind, prepare in kinds.items():
        calls = [partial(prepare(module), *args, **kwargs) for module in modules]
        with torch.inference_mode():
            times = alternating(calls, options["repeats"], options["least"])
        for side, seconds in zip(("before", "after"), times, strict=True):
            row[side][kind] = seconds
    return row


def ratio(row: dict[str, Any], what: str) -> float:
    """Return a number after over before."""
    before: float = row["before"].get(what, 0)
    return row["after"][what] / before if before else float("nan")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line a model, and the medians."""
    kinds = [kind for kind in ("eager", "compiled") if kind in rows[0]["before"]]
    table = Table("model", "difference", "operators", "parameters", "macs", *(f"{kind} ms" for kind in kinds), "sites")
    for row in rows:
        before, after = row["before"], row["after"]
        table.add_row(
            row["model"],
            f"{row['difference']:.0e}",
            f"{before['nodes']} -> {after['nodes']}",
            f"{ratio(row, 'params'):.3f}",
            f"{ratio(row, 'macs'):.3f}",
            *(f"{before[k] * 1e3:.1f} x {ratio(row, k):.2f}" for k in kinds),
            " ".join(f"{name}:{count}" for name, count in row["sites"].items() if count),
            style="red" if not row["difference"] <= LIMIT else None,
        )
    console = Console(width=200)
    console.print(table)
    medians = [
        f"{what} {statistics.median(ratio(row, what) for row in rows):.3f}" for what in ("nodes", "params", *kinds)
    ]
    console.print(f"medians of after over before, {len(rows)} models: {', '.join(medians)}")


def main() -> int:
    """Measure and print."""
    from tests.zoo import ZOO

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--pipeline", default=PIPELINE)
    parser.add_argument(
        "--native", action="store_true", help="at the sizes models are made for, not those of the tests"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--least", type=float, default=1.0, help="seconds that both sides are called for")
    parser.add_argument("--json")
    options = vars(parser.parse_args())
    rows = []
    for name in options["names"]:
        with ProcessPoolExecutor(1) as pool:
            rows.append(pool.submit(measure, name, options).result())
        print(rows[-1], flush=True)
        if options["json"]:
            Path(options["json"]).write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)
    return int(any(not row["difference"] <= LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
