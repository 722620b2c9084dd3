"""Test that damaged models are read or refused, and do nothing else: thousands by hand, some here.

Each example is one seed; a failure names its seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

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


@pytest.mark.slow
def test_many_damaged_models_are_read_or_refused(tmp_path: Path) -> None:
    counts = outcomes(range(1000, 4000), tmp_path, read)
    assert min(counts["read"], counts["refused"]) > 500
