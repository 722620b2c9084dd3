"""Check that padding goes into convolutions and poolings: text, meaning, refusals, properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.passes import FoldPad
from graphopt.testing import Trial, try_pass
from tests.onnx_models import calls, trial


def inside(body: str, **weights: Any) -> Trial:
    """Run the pass on what turns ``a`` into ``b``."""
    given = {"u": (2, 3, 1, 1), "w": (3, 2, 3, 3), **weights}
    given = {name: value for name, value in given.items() if name == "u" or f" {name}" in body}
    head = "(float[N,3,7,9] x) => (float[N,C,H,W] y)"
    return trial(FoldPad(), head, f"a = Conv<kernel_shape = [1, 1]>(x, u) {body} y = Softmax(b)", given)


def test_text() -> None:
    done = inside(
        'c = Pad(a, p) d = Conv<pads = [1, 0, 0, 1], strides = [2, 2]>(c, w) e = Pad<mode = "reflect">(d, q) '
        "b = AveragePool<kernel_shape = [2, 2]>(e)",
        p=[0, 0, 1, 2, 0, 0, 3, 0],
        q=[0, 0, 1, 1, 0, 0, 0, 0],
    )
    assert done.text().splitlines() == TEXT
    assert [(site.name, site.reason) for site in done.applied] == [("Conv_1", "pads as Pad_0 did")]
    assert [(site.name, site.reason) for site in done.skipped] == [("AveragePool_0", "Pad_1 pads by reflect")]
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged


TEXT = [
    "-%Pad_0: float32[2?, 2, 11, 11] = onnx.Pad(%Conv_0, [0, 0, 1, 2, 0, 0, 3, 0])",
    "-%Conv_1: float32[2?, 3, 5, 5] = onnx.Conv(%Pad_0, %w, pads=[1, 0, 0, 1], strides=[2, 2])",
    "-%Pad_1: float32[2?, 3, 6, 6] = onnx.Pad(%Conv_1, [0, 0, 1, 1, 0, 0, 0, 0], mode=reflect)",
    "+%conv: float32[2?, 3, 5, 5] = onnx.Conv(%Conv_0, %w, pads=[2, 2, 3, 1], strides=[2, 2])",
    "+%Pad_1: float32[2?, 3, 6, 6] = onnx.Pad(%conv, [0, 0, 1, 1, 0, 0, 0, 0], mode=reflect)",
]

P = {"p": [0, 0, 1, 1, 0, 0, 1, 0]}
DOES: dict[str, tuple[str, dict[str, Any]]] = {
    "some axes": ("c = Pad(a, p, z, k) b = Conv(c, w)", {"p": [1, 2], "z": np.float32(0), "k": [-1]}),
    "an average": ("c = Pad(a, p) b = AveragePool<kernel_shape = [3, 3]>(c)", P),
    "an average that pads": (
        "c = Pad(a, p) b = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>(c)",
        P,
    ),
    "a maximum": ("c = Pad(a, p, v) b = MaxPool<kernel_shape = [3, 3]>(c)", {**P, "v": np.float32(-np.inf)}),
    "a maximum of what is not negative": (
        "r = Relu(a) c = Pad(r, p) b = MaxPool<kernel_shape = [3, 3], strides = [2, 2]>(c)",
        P,
    ),
}


@pytest.mark.parametrize("name", DOES)
def test_folds(name: str) -> None:
    body, weights = DOES[name]
    done = inside(body, **weights)
    assert "Pad" not in calls(done.after)
    assert done.difference() < 1e-12
    assert done.notices_damage()


STAYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "channels": (
        "c = Pad(a, p) b = Conv(c, t)",
        {"p": [0, 1, 0, 0, 0, 0, 0, 0], "t": (3, 3, 3, 3)},
        "Pad_0 pads more than spatial dimensions, or by sizes that vary, or cuts",
    ),
    "a cut": (
        "c = Pad(a, p) b = Conv(c, w)",
        {"p": [0, 0, -1, 0, 0, 0, 0, 0]},
        "Pad_0 pads more than spatial dimensions, or by sizes that vary, or cuts",
    ),
    "another value": (
        "c = Pad(a, p, v) b = Conv(c, w)",
        {**P, "v": np.float32(1)},
        "Pad_0 pads by 1, a convolution by 0",
    ),
    "automatic": (
        'c = Pad(a, p) b = Conv<auto_pad = "SAME_UPPER">(c, w)',
        P,
        "Conv_1 pads automatically (SAME_UPPER)",
    ),
    "an average of two kinds": (
        "c = Pad(a, p) b = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(c)",
        P,
        "AveragePool_0 counts what Pad_0 pads, and not what it pads itself",
    ),
    "a maximum of anything": (
        "c = Pad(a, p) b = MaxPool<kernel_shape = [3, 3]>(c)",
        P,
        "Pad_0 pads by 0, a maximum by nothing",
    ),
    "windows in the padding": (
        "c = Pad(a, p) b = AveragePool<kernel_shape = [1, 2]>(c)",
        P,
        "windows of AveragePool_0 would lie in the padding",
    ),
    "a size rounded up": (
        "c = Pad(a, p) b = AveragePool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>(c)",
        P,
        "AveragePool_0 rounds its size up, or yields positions",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    body, weights, reason = STAYS[name]
    done = inside(body, **weights)
    assert done.unchanged
    assert [site.reason for site in done.skipped] == [reason]


def test_other_graphs_are_left_alone() -> None:
    assert try_pass(FoldPad(), nn.Linear(2, 2), torch.randn(2, 2)).unchanged


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.lists(st.integers(0, 1), min_size=4, max_size=4),
    st.sampled_from(["Conv", "AveragePool", "MaxPool"]),
    st.sampled_from([0.0, 1.0, -np.inf]),
    st.booleans(),
    st.booleans(),
)
def test_preserves(pads: list[int], own: list[int], name: str, value: float, positive: bool, count: bool) -> None:
    attributes = f"pads = {own}" + (f", count_include_pad = {int(count)}" if name == "AveragePool" else "")
    attributes += "" if name == "Conv" else ", kernel_shape = [3, 2]"
    weight = ", w" if name == "Conv" else ""
    done = inside(
        f"r = {'Relu' if positive else 'Neg'}(a) c = Pad(r, p, v) b = {name}<{attributes}>(c{weight})",
        p=[0, 0, *pads[:2], 0, 0, *pads[2:]],
        v=np.float32(0.0 if name != "MaxPool" and value == -np.inf else value),
    )
    assert done.difference() < 1e-12
    assert done.again().unchanged
