"""Prune every group of every model of the zoo alone, and all together, and compare with the masked originals.

    python -m benchmarks.zoo_exactness [NAME …] [--json FILE] [--workers N]

Prints one row a model: how many groups, the worst relative difference of a group alone and of all together (float64),
and of all together in float32. A row that fails its limit (1e-10, 1e-4) ends the run with status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

DOUBLE_LIMIT, SINGLE_LIMIT = 1e-10, 1e-4


def measure(name: str) -> dict[str, Any]:
    """Capture, type and measure one model."""
    from graphopt.capture import capture
    from graphopt.dialects.aten import infer
    from tests.zoo import ZOO
    from tests.zoo.exactness import measure as exactness

    torch.set_num_threads(1)
    model = ZOO[name]
    typing = infer(capture(model.build(), model.inputs()))
    start = time.perf_counter()
    found = asdict(exactness(typing))
    return {"model": name, **found, "unknown": len(typing.unknown), "seconds": time.perf_counter() - start}


def fails(row: dict[str, Any]) -> bool:
    """Say whether a row is beyond round-off."""
    return not (max(row["alone"], row["together"]) <= DOUBLE_LIMIT and row["single"] <= SINGLE_LIMIT)


def main() -> int:
    """Measure and print."""
    from tests.zoo import ZOO

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--json")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(options.workers) as pool:
        for row in pool.map(measure, options.names):
            rows.append(row)
            print(
                f"{row['model']:30} {row['groups']:4} {row['alone']:.1e} {row['together']:.1e} {row['single']:.1e}",
                flush=True,
            )
    table = Table("model", "groups", "alone (f64)", "worst group", "together (f64)", "together (f32)", "s")
    for row in rows:
        table.add_row(
            row["model"],
            str(row["groups"]),
            f"{row['alone']:.1e}",
            row["worst"],
            f"{row['together']:.1e}",
            f"{row['single']:.1e}",
            f"{row['seconds']:.0f}",
            style="red" if fails(row) else None,
        )
    Console(width=140).print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(map(fails, rows)))


if __name__ == "__main__":
    sys.exit(main())
