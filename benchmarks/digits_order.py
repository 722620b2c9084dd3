"""Fold batch norms before pruning or after it: which of the two keeps more accuracy on digits?

    python -m benchmarks.digits_order [--seeds N] [--keep 0.7 0.5 0.3] [--json FILE]

Prints, for networks with batch norms, the accuracy on the test images at each share of kept multiply-adds, as mean and
spread over seeds: with batch norms folded before and after pruning by magnitude, each without and with a refit on 128
training images without their labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

import graphopt
from benchmarks.digits import MODELS, accuracy, load, train

NAMES: Final = ("small-resnet", "small-mobilenet")
DENSE_EPOCHS: Final = 20
ORDERS: Final = {
    "prune, fold": "prune-channels,fold-batch-norm",
    "fold, prune": "fold-batch-norm,prune-channels",
    "prune, refit, fold": "prune-channels,ridge-refit,fold-batch-norm",
    "fold, prune, refit": "fold-batch-norm,prune-channels,ridge-refit",
}


def measure(name: str, seed: int, shares: list[float]) -> list[dict[str, Any]]:
    """Train one model, and prune it in every order."""
    data = load(seed)
    torch.manual_seed(seed)
    model = MODELS[name]()
    train(model, data, epochs=DENSE_EPOCHS, lr=3e-3, seed=seed)
    images = [(part,) for part in data.train_images[:128].split(32)]
    rows = []
    for keep in shares:
        for order, passes in ORDERS.items():
            result = graphopt.optimize(
                model,
                (data.test_images[:8],),
                budget=graphopt.Budget(flops=keep),
                pipeline=passes,
                calibration=images,
                seed=seed,
            )
            found = {"model": name, "seed": seed, "keep": keep, "order": order}
            rows.append({**found, "dense": accuracy(model, data), "accuracy": accuracy(result.module, data)})
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = [row for name in NAMES for seed in range(options.seeds) for row in measure(name, seed, options.keep)]
    table = Table("model", "kept", *ORDERS)
    for name in NAMES:
        for keep in options.keep:
            cells = []
            for order in ORDERS:
                mine = [r["accuracy"] for r in rows if (r["model"], r["keep"], r["order"]) == (name, keep, order)]
                cells.append(f"{statistics.mean(mine):.3f} ± {statistics.pstdev(mine):.3f}")
            table.add_row(name, f"{keep:.0%}", *cells)
    Console(width=120).print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
