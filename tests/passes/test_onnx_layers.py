"""Check what the lossless passes make of layers of ONNX: text, refusals with their reasons, meaning.

The changed lines of every case, and what the pass said of it, stand in ``onnx_layers.txt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.passes import (
    FoldBatchNorm,
    FoldConstants,
    FoldScale,
    MergeBranches,
    MergeConsecutive,
    MergeDuplicates,
    MergeParallel,
    RemoveConstantChannels,
    SplitParallel,
)
from graphopt.pipeline import Pass
from graphopt.testing import Trial
from tests.onnx_models import trial

GOLDEN = Path(__file__).with_name("onnx_layers.txt")

IMAGES = "(double[N,3,6,6] x) => (double[N,4,6,6] y)"
TOKENS = "(double[N,5,6] x) => (double[N,5,4] y)"
ROWS = "(double[N,6] x) => (double[N,4] y)"
POSITIVE = np.array([0.5, 1.5, 2.0, 0.7])
NORM: dict[str, Any] = {"g": (4,), "s": (4,), "m": (4,), "v": POSITIVE}
FLAT = np.array([1.0, 0, 2])
"""Of three outputs, the second is its bias, whatever the input is."""


@dataclass(frozen=True)
class Case:
    """A pass, and the model that it is run on: head, nodes, tensors."""

    each: Pass
    head: str
    body: str
    weights: Mapping[str, Any]

    def run(self) -> Trial:
        """Run the pass on the model."""
        return trial(self.each, self.head, self.body, self.weights)


CASES: dict[str, Case] = {
    "batch norm into a convolution without a bias": Case(
        FoldBatchNorm(),
        IMAGES,
        'c = Conv<auto_pad = "SAME_UPPER">(x, w) y = BatchNormalization(c, g, s, m, v)',
        {"w": (4, 3, 3, 3), **NORM},
    ),
    "batch norm into a transposed convolution": Case(
        FoldBatchNorm(),
        IMAGES,
        """
        c = ConvTranspose<pads = [1, 1, 1, 1]>(x, w, b)
        y = BatchNormalization(c, g, s, m, v)
        """,
        {"w": (3, 4, 3, 3), "b": (4,), **NORM},
    ),
    "batch norm into a product, which gets a sum": Case(
        FoldBatchNorm(),
        ROWS,
        "c = MatMul(x, w) y = BatchNormalization(c, g, s, m, v)",
        {"w": (6, 4), **NORM},
    ),
    "batch norm into the layer after it": Case(
        FoldBatchNorm(),
        "(double[N,4,6,6] x) => (double[N,2,6,6] y)",
        "n = BatchNormalization(x, g, s, m, v) y = Conv(n, w)",
        {"w": (2, 4, 1, 1), **NORM},
    ),
    "batch norm beside padding": Case(
        FoldBatchNorm(),
        "(double[N,4,6,6] x) => (double[N,2,6,6] y)",
        "n = BatchNormalization(x, g, s, m, v) y = Conv<pads = [0, 2, 2, 0]>(n, w)",
        {"w": (2, 4, 3, 3), "g": (4,), "s": [1, 1, 1, 1.5], "m": np.zeros(4), "v": POSITIVE},
    ),
    "scales of several forms": Case(
        FoldScale(),
        IMAGES,
        "c = Conv(x, w, b) d = Mul(g, c) e = Add(d, h) y = Div(e, n)",
        {"w": (4, 3, 1, 1), "b": (4,), "g": (4, 1, 1), "h": (1, 4, 1, 1), "n": np.float64(2)},
    ),
    "scale of a product with its sum": Case(
        FoldScale(),
        TOKENS,
        "c = MatMul(x, w) d = Add(b, c) e = Mul(d, g) y = Sub(e, h)",
        {"w": (6, 4), "b": (1, 1, 4), "g": (4,), "h": (1,)},
    ),
    "scale of a Gemm with factors": Case(
        FoldScale(),
        ROWS,
        """
        c = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, w, b)
        d = Mul(c, g)
        y = Add(d, h)
        """,
        {"w": (4, 6), "b": (1,), "g": (4,), "h": (1, 4)},
    ),
    "a bias that others read gets a copy": Case(
        FoldScale(),
        TOKENS,
        """
        c = MatMul(x, w)
        d = Add(c, b)
        e = Mul(d, g)
        f = MatMul(x, u)
        h = Add(f, b)
        r = Relu(h)
        y = Mul(e, r)
        """,
        {"w": (6, 4), "u": (6, 4), "b": (4,), "g": (4,)},
    ),
    "a weight that others read stays": Case(
        FoldScale(),
        TOKENS,
        "c = MatMul(x, w) d = Mul(c, g) e = MatMul(x, w) r = Relu(e) y = Add(d, r)",
        {"w": (6, 4), "g": (4,)},
    ),
    "products in a row": Case(
        MergeConsecutive(),
        TOKENS,
        "c = MatMul(x, w) d = Add(c, b) e = MatMul(d, u) y = Add(e, s)",
        {"w": (6, 5), "b": (5,), "u": (5, 4), "s": (4,)},
    ),
    "a Gemm after a product": Case(
        MergeConsecutive(),
        ROWS,
        "c = MatMul(x, w) y = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(c, u, s)",
        {"w": (6, 5), "u": (4, 5), "s": (4,)},
    ),
    "convolutions with uneven padding": Case(
        MergeConsecutive(),
        IMAGES,
        "c = Conv(x, w) y = Conv<pads = [0, 2, 2, 0]>(c, u, s)",
        {"w": (7, 3, 1, 1), "u": (4, 7, 3, 3), "s": (4,)},
    ),
    "a bottleneck": Case(
        MergeConsecutive(),
        TOKENS,
        "c = MatMul(x, w) y = MatMul(c, u)",
        {"w": (6, 2), "u": (2, 4)},
    ),
    "branches of one input": Case(
        MergeBranches(),
        "(double[N,4,6,6] x) => (double[N,4,6,6] y)",
        """
        c = Conv<pads = [1, 1, 1, 1]>(x, w)
        d = Conv(x, u, b)
        e = Add(c, d)
        f = BatchNormalization(x, g, s, m, v)
        y = Add(f, e)
        """,
        {"w": (4, 4, 3, 3), "u": (4, 4, 1, 1), "b": (4,), **NORM},
    ),
    "branches of other strides": Case(
        MergeBranches(),
        "(double[N,4,6,6] x) => (double[N,4,3,3] y)",
        """
        c = Conv<strides = [2, 2]>(x, w)
        d = Conv<strides = [2, 2], pads = [1, 0, 0, 1]>(x, u)
        e = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
        f = Add(c, d)
        y = Add(f, e)
        """,
        {"w": (4, 4, 1, 1), "u": (4, 4, 2, 2)},
    ),
    "products side by side": Case(
        MergeParallel(),
        TOKENS,
        "c = MatMul(x, w) d = Add(c, b) e = MatMul(x, u) r = Sigmoid(e) y = Mul(r, d)",
        {"w": (6, 4), "b": (4,), "u": (6, 4)},
    ),
    "Gemms side by side": Case(
        MergeParallel(),
        ROWS,
        """
        c = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, w, b)
        d = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, u, s)
        r = Sigmoid(d)
        y = Mul(r, c)
        """,
        {"w": (4, 6), "b": (4,), "u": (4, 6), "s": (1,)},
    ),
    "packed queries and keys": Case(
        SplitParallel(),
        "(double[N,5,6] x) => (double[N,2,5,5] y)",
        """
        c = MatMul(x, w)
        d = Add(b, c)
        r = Reshape(d, sizes)
        t = Transpose<perm = [2, 0, 3, 1, 4]>(r)
        q = Gather<axis = 0>(t, zero)
        k = Gather<axis = 0>(t, one)
        u = Transpose<perm = [0, 1, 3, 2]>(k)
        y = MatMul(q, u)
        """,
        {"w": (6, 12), "b": (12,), "sizes": [0, 0, 2, 2, 3], "zero": np.int64(0), "one": np.int64(1)},
    ),
    "a split product": Case(
        SplitParallel(),
        TOKENS,
        """
        c = MatMul(x, w)
        d = Add(c, b)
        e, f = Split<axis = -1, num_outputs = 2>(d)
        r = Sigmoid(e)
        y = Mul(r, f)
        """,
        {"w": (6, 8), "b": (8,)},
    ),
    "windows of a Gemm": Case(
        SplitParallel(),
        ROWS,
        """
        c = Gemm<transB = 1>(x, w, b)
        d = Slice(c, zero, four, one)
        e = Slice(c, four, end, one)
        r = Sigmoid(d)
        y = Mul(r, e)
        """,
        {"w": (8, 6), "b": (8,), "zero": [0], "four": [4], "one": [1], "end": [2**63 - 1]},
    ),
    "a product that is also read whole": Case(
        SplitParallel(),
        "(double[N,5,6] x) => (double[N,5,4] y, double[N,5,8] z)",
        """
        c = MatMul(x, w)
        e, f = Split<axis = -1, num_outputs = 2>(c)
        y = Mul(e, f)
        z = Relu(c)
        """,
        {"w": (6, 8)},
    ),
    "what follows from tensors alone": Case(
        FoldConstants(),
        TOKENS,
        """
        t = Transpose<perm = [1, 0]>(w)
        s = Mul(t, k)
        c = MatMul(x, s)
        e = Expand(h, sizes)
        y = Add(c, e)
        """,
        {"w": (4, 6), "k": np.float64(0.5), "h": (1,), "sizes": [1, 5, 4]},
    ),
    "an expansion": Case(
        FoldConstants(),
        "(double[N,300,400] x) => (double[N,300,400] y)",
        "e = Expand(h, sizes) y = Add(x, e)",
        {"h": (1, 400), "sizes": [1, 300, 400]},
    ),
    "quantized weights": Case(
        FoldConstants(),
        "(float[N,6] x) => (float[N,4] y)",
        "q = DequantizeLinear(w, s) c = MatMul(x, q) y = Relu(c)",
        {"w": (np.arange(24, dtype=np.int8) % 7 - 3).reshape(6, 4), "s": np.float32(0.5)},
    ),
    "equal calls and weights": Case(
        MergeDuplicates(),
        "(double[N,5,64] x) => (double[N,5,64] y)",
        """
        a = MatMul(x, w)
        b = MatMul(x, u)
        p = Relu(a)
        q = Relu(a)
        r = Add(p, q)
        y = Mul(r, b)
        """,
        {"w": np.eye(64), "u": np.eye(64)},
    ),
    "random numbers": Case(
        MergeDuplicates(),
        "(double[N,4] x) => (double[N,4] y)",
        """
        a = RandomNormalLike(x)
        b = RandomNormalLike(x)
        c = Sub(a, b)
        z = Mul(c, zero)
        y = Add(x, z)
        """,
        {"zero": np.float64(0)},
    ),
    "constant channels": Case(
        RemoveConstantChannels(),
        IMAGES,
        "c = Conv(x, w, b) r = Relu(c) y = Conv(r, u)",
        {"w": FLAT[:, None, None, None] * np.ones((3, 3, 1, 1)), "b": [0.5, 1.5, 0.25], "u": (4, 3, 1, 1)},
    ),
    "constant features of a product": Case(
        RemoveConstantChannels(),
        TOKENS,
        "c = MatMul(x, w) d = Add(c, b) r = Tanh(d) e = MatMul(r, u) y = Add(e, s)",
        {"w": np.ones((6, 3)) * FLAT, "b": [0.5, 1.5, 0.25], "u": (3, 4), "s": (4,)},
    ),
    "constants beside padding": Case(
        RemoveConstantChannels(),
        IMAGES,
        "c = Conv(x, w, b) y = Conv<pads = [1, 1, 1, 1]>(c, u)",
        {"w": FLAT[:, None, None, None] * np.ones((3, 3, 1, 1)), "b": [0.5, 1.5, 0.25], "u": (4, 3, 3, 3)},
    ),
}


def described(name: str, done: Trial) -> str:
    """Return what a pass did, as the golden file has it."""
    said = [f"applied {site.name}: {site.reason}" for site in done.applied]
    said += [f"skipped {site.name}: {site.reason}" for site in done.skipped]
    return "\n".join([f"== {name}", *said, *done.text().splitlines(), ""])


def test_text() -> None:
    found = "\n".join(described(name, case.run()) for name, case in CASES.items())
    assert found.splitlines() == GOLDEN.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", CASES)
def test_the_result_computes_the_same(name: str) -> None:
    done = CASES[name].run()
    assert done.difference() < 1e-11
    assert done.notices_damage()
    assert done.again().unchanged


def test_a_bias_that_others_read_keeps_its_numbers() -> None:
    done = CASES["a bias that others read gets a copy"].run()
    assert torch.equal(done.after.tensor("b"), done.before.tensor("b"))
    assert {"b", "b_1"} <= set(done.after.tensors())


def test_what_is_folded_stands_for_what_it_was() -> None:
    done = CASES["what follows from tensors alone"].run()
    (name,) = [name for name in done.after.tensors() if "Mul" in name]
    assert isinstance(done.after.tensor(name), nn.Parameter)
    assert [[(s.tensor, s.dim) for s in done.after.stands_for(name, dim)] for dim in (0, 1)] == [[("w", 1)], [("w", 0)]]


def test_parts_of_packed_weights_stand_for_their_rows() -> None:
    done = CASES["a split product"].run()
    (source,) = done.after.stands_for("w_1", 1)
    assert (source.tensor, source.dim, source.positions.tolist()) == ("w", 1, [4, 5, 6, 7])


def test_parameters_that_are_trained_stay_two() -> None:
    done = trial(
        MergeDuplicates(trainable=True),
        "(double[N,64] x) => (double[N,64] y)",
        "a = MatMul(x, w) b = MatMul(x, u) y = Mul(a, b)",
        {"w": np.eye(64), "u": np.eye(64)},
    )
    assert done.unchanged


def test_vectors_that_are_equal_stay_two() -> None:
    body = "a = Mul(x, g) b = Add(a, s) y = Mul(b, h)"
    done = trial(MergeDuplicates(), TOKENS.replace("5,4", "5,6"), body, dict.fromkeys("gsh", np.ones(6)))
    assert done.unchanged


def test_batch_norms_in_training_stay() -> None:
    body = "c = Conv(x, w) y, p, q = BatchNormalization<training_mode = 1>(c, g, s, m, v)"
    head = "(double[N,3,6,6] x) => (double[N,4,6,6] y, double[4] p)"
    done = trial(FoldBatchNorm(), head, body, {"w": (4, 3, 1, 1), **NORM})
    assert done.unchanged
    assert [site.reason for site in done.skipped] == ["it normalises by its batches in evaluation, too"]


@pytest.mark.parametrize(("mode", "merged"), [("", True), ("yes", False)])
def test_dropout_in_training_is_random(mode: str, merged: bool) -> None:
    operands = "x, half, yes" if mode else "x"
    body = f"a = Dropout({operands}) b = Dropout({operands}) y = Add(a, b)"
    weights = {"half": np.float64(0.5), "yes": np.bool_(True)} if mode else {}
    done = trial(MergeDuplicates(), "(double[N,6] x) => (double[N,6] y)", body, weights)
    assert bool(done.applied) is merged


def test_a_large_weight_in_a_narrow_type_is_not_widened() -> None:
    body = "w = Cast<to = 1>(narrow) y = MatMul(x, w)"
    head = "(float[N,256] x) => (float[N,256] y)"
    done = trial(FoldConstants(), head, body, {"narrow": np.ones((256, 256), np.int8)})
    assert done.unchanged
    assert [site.reason for site in done.skipped] == [
        "262144 bytes would be stored in place of the 65536 that they are computed from"
    ]


def test_a_weight_that_is_tied_is_not_stored_twice() -> None:
    body = "e = Gather(w, x) t = Transpose<perm = [1, 0]>(w) y = MatMul(e, t)"
    done = trial(FoldConstants(), "(int64[N,5] x) => (double[N,5,7] y)", body, {"w": (7, 6)})
    assert done.unchanged
    assert [site.reason for site in done.skipped] == [
        "336 bytes of w, which Gather_0 reads, too, would be stored twice"
    ]
