"""Time typing, scoring, allocation and rewriting against Torch-Pruning's graph build and pruning, on the zoo.

    python -m benchmarks.prune_speed [NAME …] [--repeats N] [--ours-only] [--json FILE]

Both sides prune the same module, at the resolution it is made for, to about half its multiply-adds with an L2
criterion, on one thread. The export that precedes ours and the forward pass inside Torch-Pruning's tracing are what
each needs to see the graph; only theirs is inside the timing (ours is in the JSON). Repeats of the two sides alternate;
the table shows medians and ratios.
A model that Torch-Pruning cannot prune, or that no longer runs afterwards, is listed but not compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn


def ours(graph: Any) -> dict[str, float]:
    """Prune a captured graph once; return seconds by stage."""
    from graphopt.allocation import Budget, Constraints, Knapsack
    from graphopt.cost import CostModel
    from graphopt.dialects.aten import infer
    from graphopt.importance import L2, ScoreContext
    from graphopt.rewrite import rewrite

    marks = [time.perf_counter()]
    typing = infer(graph)
    marks.append(time.perf_counter())
    scores = L2().score(ScoreContext(typing))
    marks.append(time.perf_counter())
    keep = Knapsack().allocate(typing.groups, scores, CostModel(typing), Budget(flops=0.5), Constraints())
    marks.append(time.perf_counter())
    rewrite(typing, keep)
    marks.append(time.perf_counter())
    stages = ("infer", "score", "allocate", "rewrite")
    return dict(zip(stages, (b - a for a, b in pairwise(marks)), strict=True))


def theirs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Build Torch-Pruning's graph and prune half the channels once; return seconds."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    example: Any = kwargs or args
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    start = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.3,
        ignored_layers=head,
        global_pruning=False,
    )
    pruner.step()
    elapsed = time.perf_counter() - start
    with torch.no_grad():
        model(*args, **kwargs)
    return elapsed


def measure(name: str, repeats: int, ours_only: bool) -> dict[str, Any]:
    """Time both sides on one model, alternating."""
    from graphopt.capture import capture
    from tests.zoo import ZOO

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = ZOO[name].build(native=True)
    args, kwargs = ZOO[name].inputs(native=True, batch=1)
    start = time.perf_counter()
    graph = capture(model, (args, kwargs))
    row: dict[str, Any] = {"model": name, "capture": time.perf_counter() - start}
    mine: list[dict[str, float]] = []
    other: list[float] = []
    failure = "not run" if ours_only else ""
    for _ in range(repeats):
        mine.append(ours(graph))
        if not failure:
            try:
                other.append(theirs(model, args, kwargs))
            except Exception as e:  # noqa: BLE001  # their failures are data here, whatever they raise
                failure = f"{type(e).__name__}: {str(e).splitlines()[0][:60] if str(e) else ''}"
    for stage in mine[0]:
        row[stage] = statistics.median(m[stage] for m in mine)
    row["ours"] = statistics.median(sum(m.values()) for m in mine)
    row["theirs"] = statistics.median(other) if other and not failure else None
    row["failure"] = failure
    return row


def main() -> int:
    """Measure and print."""
    from tests.zoo import ZOO

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = []
    for name in options.names:
        with ProcessPoolExecutor(1) as pool:
            rows.append(pool.submit(measure, name, options.repeats, options.ours_only).result())
        print(rows[-1], flush=True)
    table = Table("model", "infer ms", "score ms", "allocate ms", "rewrite ms", "ours s", "Torch-Pruning s", "ratio")
    ratios = []
    for row in rows:
        ratio = row["theirs"] / row["ours"] if row["theirs"] else None
        ratios.extend([ratio] if ratio else [])
        table.add_row(
            row["model"],
            *(f"{row[s] * 1e3:.0f}" for s in ("infer", "score", "allocate", "rewrite")),
            f"{row['ours']:.3f}",
            f"{row['theirs']:.3f}" if row["theirs"] else row["failure"],
            f"{ratio:.1f}x" if ratio else "",
        )
    console = Console(width=160)
    console.print(table)
    if ratios:
        console.print(f"median ratio over the {len(ratios)} models both can prune: {statistics.median(ratios):.1f}x")
    console.print(f"slowest of ours: {max(r['ours'] for r in rows):.3f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
