"""Test that damaged models are read or refused, and do nothing else: thousands by hand, some here.

Each example is one seed; a failure names its seed.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import graphopt
from graphopt.capture import capture
from graphopt.capture.onnx.files import load
from graphopt.errors import GraphOptError

from .mutate import damaged, mutated
from .victims import attention, control, convolutions, old, outside, straight

VICTIMS = ("convolutions", "attention", "control", "straight", "old", "outside")


def read(source: Any) -> None:
    """Read a model and all its weights."""
    found = load(source)
    for initializer in found.model.graph.initializer:
        found.tensor(initializer)


def victims(folder: Path) -> dict[str, onnx.ModelProto]:
    """Return the models by name; the data of one is in the folder."""
    return {
        "convolutions": convolutions(),
        "attention": attention(),
        "control": control(),
        "straight": straight(),
        "old": old(),
        "outside": outside(folder),
    }


def damage(models: dict[str, onnx.ModelProto], seed: int, folder: Path) -> Any:
    """Return one of the models damaged in a way that depends on the seed: a model, or the path of a file."""
    rng = random.Random(seed)
    name = rng.choice(VICTIMS)
    path = folder / "damaged.onnx"
    if rng.random() < 0.75:
        given = mutated(models[name], rng)
        if name != "outside":
            return given
        path.write_bytes(given.SerializeToString())
    else:
        path.write_bytes(damaged(models[name].SerializeToString(), rng))
    return path


def outcomes(seeds: range, folder: Path, act: Callable[[Any], object]) -> Counter[str]:
    """Count what is read and what is refused; let everything else through."""
    models = victims(folder)
    counts: Counter[str] = Counter()
    for seed in seeds:
        source = damage(models, seed, folder)
        try:
            act(source)
            counts["read"] += 1
        except GraphOptError:
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} raises {type(error).__name__}") from error
    return counts


def test_undamaged_models_are_read(tmp_path: Path) -> None:
    for name, given in victims(tmp_path).items():
        read(tmp_path / "outside.onnx" if name == "outside" else given)


def test_damaged_models_are_read_or_refused(tmp_path: Path) -> None:
    counts = outcomes(range(200), tmp_path, read)
    assert counts["read"] > 20
    assert counts["refused"] > 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.onnx", "outside.data", "outside.onnx"]


def test_damaged_models_are_captured_or_refused(tmp_path: Path) -> None:
    counts = outcomes(range(300, 450), tmp_path, capture)
    assert counts["read"] > 15
    assert counts["refused"] > 40


def _pruned(source: Any, folder: Path) -> None:
    """Prune a model and write it; a refusal leaves nothing behind."""
    output = folder / "out"
    try:
        graphopt.optimize(source, target="onnx", budget=graphopt.Budget(flops=0.6), output=output)
    except GraphOptError:
        assert not output.exists()
        raise
    assert (output / "model.onnx").exists()
    shutil.rmtree(output)


def test_damaged_models_are_pruned_or_refused(tmp_path: Path) -> None:
    counts = outcomes(range(500, 560), tmp_path, lambda source: _pruned(source, tmp_path))
    assert counts["read"] > 5
    assert counts["refused"] > 15


_CAMPAIGN = """
import faulthandler, sys
from pathlib import Path
from tests.capture.onnx import test_fuzz as fuzz
faulthandler.enable()
folder, kind, first, last = Path(sys.argv[1]), *sys.argv[2:]
act = {"read": fuzz.read, "captured": fuzz.capture, "pruned": lambda source: fuzz._pruned(source, folder)}[kind]
for seed in range(int(first), int(last), 50):
    print(seed, flush=True)
    print(fuzz.outcomes(range(seed, seed + 50), folder, act), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("read", 3000), ("captured", 1500), ("pruned", 600)])
def test_many_damaged_models_end_no_process(tmp_path: Path, kind: str, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CAMPAIGN, str(tmp_path), kind, "1000", str(1000 + count)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, (done.stdout[-200:], done.stderr[-2000:])
