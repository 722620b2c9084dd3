"""Normalisers on scores whose result can be told by hand."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphopt.axes.algebra import atom
from graphopt.errors import PipelineError
from graphopt.importance import NORMALIZERS, ScoreContext, normalize
from tests.cost.handmade import typing_of

Floats = npt.NDArray[np.float64]

positive = st.lists(st.integers(1, 1000), min_size=1, max_size=20).map(lambda v: np.array(v, dtype=np.float64))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("distortion", [8 / 4 - 8 / 7, 8 / 7 - 8 / 8, 8 / 4]),
        ("none", [3, 1, 4]),
        ("zscore", [1 / np.sqrt(21), -5 / np.sqrt(21), 4 / np.sqrt(21)]),
        ("minmax", [2 / 3, 0, 1]),
        ("sum", [3 / 8, 1 / 8, 1 / 2]),
        ("mean", [9 / 8, 3 / 8, 3 / 2]),
        ("lamp", [3 / 7, 1 / 8, 1]),
    ],
)
def test_three_scores(name: str, expected: list[float]) -> None:
    assert NORMALIZERS[name](np.array([3.0, 1.0, 4.0])) == pytest.approx(expected)


@given(positive, st.sampled_from(sorted(NORMALIZERS)))
def test_the_order_inside_a_group_stays(scores: Floats, name: str) -> None:
    found = NORMALIZERS[name](scores)
    order = np.argsort(scores, kind="stable")
    assert (np.diff(found[order]) >= -1e-12).all()
    assert np.isfinite(found).all()


@given(positive, st.sampled_from(["zscore", "minmax", "sum", "mean", "lamp", "distortion"]))
def test_the_scale_of_a_group_does_not_matter(scores: Floats, name: str) -> None:
    assert NORMALIZERS[name](scores * 8) == pytest.approx(NORMALIZERS[name](scores), abs=1e-12)


@pytest.mark.parametrize("name", sorted(NORMALIZERS))
@pytest.mark.parametrize("scores", [[0.0, 0.0], [5.0], [0.0]])
def test_a_group_without_differences_gets_finite_scores(name: str, scores: list[float]) -> None:
    assert np.isfinite(NORMALIZERS[name](np.array(scores))).all()


@given(positive)
def test_the_greatest_index_of_every_group_has_lamp_score_one(scores: Floats) -> None:
    assert NORMALIZERS["lamp"](scores).max() == 1
    assert NORMALIZERS["lamp"](scores).argmax() in np.flatnonzero(scores == scores.max())


def test_lamp_is_the_relative_loss_after_all_lesser_ones() -> None:
    scores = np.array([5.0, 1.0, 2.0, 8.0])
    found = NORMALIZERS["lamp"](scores)
    kept = scores.sum()
    for index in np.argsort(scores):
        assert found[index] == pytest.approx(scores[index] / kept)
        kept -= scores[index]


def test_distortion_counts_for_each_layer_that_reads() -> None:
    a, b = atom(2), atom(3)
    typing = typing_of(
        {
            "one.weight": (nn.Parameter(torch.randn(2, 3)), (a, b)),
            "two.weight": (nn.Parameter(torch.randn(7, 3)), (atom(7), b)),
        },
        macs=[(a, b), (b, b)],
    )
    scores = {
        "one.weight[0]": np.array([1.0, 3.0]),
        "one.weight[1]": np.array([1.0, 1.0, 2.0]),
        "two.weight[0]": np.ones(7),
    }
    found = normalize(scores, "distortion", ScoreContext(typing))
    assert found["one.weight[0]"] == pytest.approx([4 / 3 - 1, 4 / 3])
    assert found["one.weight[1]"] == pytest.approx([3 * (4 / 3 - 1), 3 * (4 / 2 - 4 / 3), 3 * 4 / 2])


@given(positive)
def test_distortion_adds_up_to_removed_over_kept(scores: Floats) -> None:
    found = np.sort(NORMALIZERS["distortion"](scores))
    ascending = np.sort(scores)
    for count in range(len(scores)):
        removed, kept = ascending[:count].sum(), ascending[count:].sum()
        assert found[:count].sum() == pytest.approx(removed / kept)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    typing = typing_of({"w.weight": (nn.Parameter(torch.randn(2)), (atom(2),))})
    with pytest.raises(PipelineError, match="unknown normalizer 'z-score'; did you mean 'zscore'"):
        normalize({"w.weight[0]": np.ones(2)}, "z-score", ScoreContext(typing))
