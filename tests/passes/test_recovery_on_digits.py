"""Check on real data what compensation is worth: a small network on digits, five seeds, no training afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt

pytestmark = pytest.mark.slow

SEEDS = range(5)
SAMPLES = 128


@cache
def trained(seed: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return a network with hidden layers of 128 and 64, unlabelled inputs, and test inputs with labels."""
    torch.manual_seed(seed)
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    order = torch.randperm(len(x))
    (x, held), (y, labels) = x[order].split([1300, len(x) - 1300]), y[order].split([1300, len(x) - 1300])
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(40):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval(), x[:SAMPLES], held, labels


@cache
def accuracy(keep: float, pipeline: str) -> float:
    """Return the mean accuracy over the seeds."""
    found = []
    for seed in SEEDS:
        model, data, x, y = trained(seed)
        result = graphopt.optimize(
            model,
            x[:2],
            budget=graphopt.Budget(flops=keep),
            pipeline=pipeline,
            calibration=data.split(50),
            verify="off",
            seed=seed,
        )
        with torch.no_grad():
            found.append(float((result.module(x).argmax(1) == y).double().mean()))
    return sum(found) / len(found)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on layers this small several only wait for each other, on a busy machine for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("removed", "expected"), [(0.5, 0.97), (0.6, 0.967), (0.7, 0.964)])
def test_a_refit_on_few_unlabelled_inputs_gives_the_accuracy_back(removed: float, expected: float) -> None:
    """The accuracies expected are those of a trial of the method apart from this project, on the same data."""
    pruned = accuracy(1 - removed, "prune-channels")
    refitted = accuracy(1 - removed, "prune-channels,ridge-refit")
    assert refitted > expected - 0.01
    assert refitted > pruned + 0.05


def test_it_does_so_for_channels_removed_at_random() -> None:
    assert accuracy(0.3, "prune-channels{importance=random},ridge-refit") > 0.957 - 0.01


def test_means_help_where_half_is_removed() -> None:
    pruned = accuracy(0.5, "prune-channels")
    assert accuracy(0.5, "prune-channels,compensate-mean") > pruned + 0.02
    assert accuracy(0.5, "prune-channels,compensate-mean{propagate=false}") > pruned + 0.02
