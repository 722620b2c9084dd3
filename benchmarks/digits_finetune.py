"""Prune small models trained on digits to 30 % of their multiply-adds, fine-tune a few epochs, and compare.

    python -m benchmarks.digits_finetune [--seeds N] [--flops 0.3] [--epochs N] [--json FILE]

Prints, for a ResNet, a MobileNet and a ViT: accuracy dense, pruned without training, and fine-tuned, as mean and
spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graphopt
from benchmarks.digits import MODELS, accuracy, load, train

DENSE_EPOCHS = 20


def measure(name: str, seed: int, flops: float, epochs: int) -> dict[str, Any]:
    """Train, prune and fine-tune one model."""
    data = load(seed)
    torch.manual_seed(seed)
    model = MODELS[name]()
    train(model, data, epochs=DENSE_EPOCHS, lr=3e-3, seed=seed)
    dense = accuracy(model, data)
    result = graphopt.optimize(model, (data.test_images[:8],), budget=graphopt.Budget(flops=flops), seed=seed)
    pruned = accuracy(result.module, data)
    statistic = next((b for n, b in result.module.named_buffers() if n.endswith("running_mean")), None)
    before = None if statistic is None else statistic.clone()
    train(result.module, data, epochs=epochs, lr=2e-3, seed=seed)
    moved = None if before is None or statistic is None else not torch.equal(before, statistic)
    return {
        "model": name,
        "seed": seed,
        "dense": dense,
        "pruned": pruned,
        "finetuned": accuracy(result.module, data),
        "statistics_moved": moved,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--flops", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = [measure(m, s, options.flops, options.epochs) for m in MODELS for s in range(options.seeds)]
    table = Table("model", "dense", "pruned", "fine-tuned", "lost (points)", "statistics moved")
    for name in MODELS:
        mine = [r for r in rows if r["model"] == name]

        def show(values: list[float]) -> str:
            return f"{statistics.mean(values):.4f} ± {statistics.pstdev(values):.4f}"

        lost = [100 * (r["dense"] - r["finetuned"]) for r in mine]
        table.add_row(
            name,
            *(show([r[k] for r in mine]) for k in ("dense", "pruned", "finetuned")),
            f"{statistics.mean(lost):.2f} ± {statistics.pstdev(lost):.2f}",
            str({r["statistics_moved"] for r in mine}),
        )
    Console(width=140).print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
