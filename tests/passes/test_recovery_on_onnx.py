"""Compensation, refits and training on graphs of ONNX operators: exact where they must be, and the same as in torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.dialects import infer
from graphopt.graph import Graph
from graphopt.passes import CompensateMean, RidgeRefit
from graphopt.pipeline import Pass, Reference
from graphopt.testing import Trial, damaged, pruned, try_pass
from graphopt.verify import difference, evaluate
from tests.onnx_models import calls, graph_of, parsed

EXACT = RidgeRefit(ridge=1e-15, samples=0)
RECOVERIES = [CompensateMean(), CompensateMean(propagate=False), EXACT]


def cut(graph: Graph, keep: Mapping[str, Any]) -> tuple[Graph, Reference]:
    """Keep only the named indices of the named groups."""
    typing = infer(graph)
    atoms = {str(place): g.atom for g in typing.groups for place in g.places}
    return pruned(typing, {atoms[name]: np.asarray(kept) for name, kept in keep.items()})


def recovered(each: Pass, graph: Graph, keep: Mapping[str, Any], data: list[Any]) -> tuple[Trial, Reference]:
    small, reference = cut(graph, keep)
    return try_pass(each, small, calibration=data, reference=reference), reference


def gap(reference: Reference, after: Graph, x: Tensor) -> float:
    """Return how far a graph is from the whole model, relative."""
    expected, found = (evaluate(g, (x,), {}, double=True) for g in (reference.graph, after))
    return difference(expected, found, double=True).relative


# What makes six channels of three, by the number of dimensions of places; then what reads them.
MAKE = {
    0: ("N,3", "h = Gemm <transB = 1> (x, make, shift)", (6, 3)),
    1: ("N,3,6", "h = Conv(x, make, shift)", (6, 3, 1)),
    2: ("N,3,6,7", "h = Conv(x, make, shift)", (6, 3, 1, 1)),
    -1: ("N,5,3", "m = MatMul(x, make) h = Add(m, shift)", (3, 6)),
}
# Places, the body, its weights, whether a constant channel is made up for exactly, and the groups.
LAYERS: dict[str, tuple[int, str, dict[str, Any], bool, int]] = {
    "Gemm": (0, "y = Gemm(h, w, b)", {"w": (6, 4), "b": (4,)}, True, 1),
    "Gemm, turned": (0, "y = Gemm <transB = 1> (h, w, b)", {"w": (4, 6), "b": (4,)}, True, 1),
    "Gemm without a bias": (0, "y = Gemm(h, w)", {"w": (6, 4)}, True, 1),
    "MatMul": (-1, "y = MatMul(h, w)", {"w": (6, 4)}, True, 1),
    "MatMul and Add": (-1, "z = MatMul(h, w) y = Add(b, z)", {"w": (6, 4), "b": (4,)}, True, 1),
    "MatMul, turned": (-1, "t = Transpose(w) z = MatMul(h, t) y = Add(z, b)", {"w": (4, 6), "b": (4,)}, True, 1),
    "MatMul and Relu": (-1, "z = MatMul(h, w) y = Relu(z)", {"w": (6, 4)}, True, 1),
    "Conv": (2, "y = Conv <strides = [2, 2], dilations = [2, 2]> (h, w, b)", {"w": (4, 6, 3, 2), "b": (4,)}, True, 1),
    "Conv without a bias": (1, "y = Conv(h, w)", {"w": (4, 6, 3)}, True, 1),
    "Conv, padded": (2, "y = Conv <pads = [1, 0, 2, 1]> (h, w)", {"w": (4, 6, 3, 2)}, False, 1),
    "Conv, same": (2, 'y = Conv <auto_pad = "SAME_LOWER"> (h, w)', {"w": (4, 6, 2, 2)}, False, 1),
    "groups": (2, "y = Conv <group = 2> (h, w, b)", {"w": (4, 3, 3, 3), "b": (4,)}, True, 2),
    "ConvTranspose": (2, "y = ConvTranspose(h, w)", {"w": (6, 4, 1, 1)}, True, 1),
    "ConvTranspose, overlapping": (
        2,
        "y = ConvTranspose <strides = [2, 2], pads = [1, 0, 0, 1]> (h, w, b)",
        {"w": (6, 4, 3, 3), "b": (4,)},
        False,
        1,
    ),
    "ConvTranspose, groups": (2, "y = ConvTranspose <group = 2> (h, w)", {"w": (6, 2, 1, 1)}, True, 2),
}


def layer(name: str, mix: Tensor, shift: Tensor) -> Graph:
    """Return what makes channels as ``mix`` and ``shift`` say, ``(6, 3)`` and ``(6,)``, and a layer that reads them."""
    places, body, weights, _, _ = LAYERS[name]
    shape, front, stored = MAKE[places]
    make = (mix.T if places < 0 else mix).reshape(stored)
    rank = shape.count(",") + 1
    head = f"(double[{shape}] x) => (double[{','.join(f'd{d}' for d in range(rank))}] y)"
    return graph_of(head, f"{front} {body}", weights | {"make": make.numpy(), "shift": shift.numpy()})


def kept_of(name: str, kept: list[int]) -> dict[str, list[int]]:
    places, _, _, _, groups = LAYERS[name]
    inside = [i for i in kept if i < 6 // groups]
    return {f"make[{1 if places < 0 else 0}]": inside}


def inputs_of(graph: Graph, count: int) -> Tensor:
    return torch.randn(count, *graph.example_inputs[0][0].shape[1:]).double()


@pytest.mark.parametrize("each", RECOVERIES, ids=str)
@pytest.mark.parametrize("name", [name for name, case in LAYERS.items() if case[3]])
def test_constant_channels_are_replaced_exactly(name: str, each: Pass) -> None:
    torch.manual_seed(2)
    mix, shift = torch.randn(6, 3).double(), torch.randn(6).double()
    mix[1::3], shift[1::3] = 0, torch.tensor([2.0, 3.0]).double()
    graph = layer(name, mix, shift)
    x, other = inputs_of(graph, 60), inputs_of(graph, 4)
    trial, reference = recovered(each, graph, kept_of(name, [0, 2, 3, 5]), [x.numpy()])
    assert len(trial.applied) == 1
    assert gap(reference, trial.before, other) > 1e-2
    assert gap(reference, trial.after, other) < 1e-9
    for parameter in trial.after.tensors():
        assert gap(reference, damaged(trial.after, parameter), other) > 1e-6
    assert trial.again().unchanged


@pytest.mark.parametrize("name", LAYERS)
def test_what_follows_linearly_from_the_rest_is_made_up_for(name: str) -> None:
    torch.manual_seed(2)
    groups = LAYERS[name][4]
    mix, shift, half = torch.randn(6, 3).double(), torch.randn(6).double(), 6 // groups
    for start in range(0, 6, half):  # the last third of a group's channels follows from the rest of it
        rest = half - half // 3
        factors = torch.randn(half - rest, rest).double()
        mix[start + rest : start + half] = factors @ mix[start : start + rest]
        shift[start + rest : start + half] = factors @ shift[start : start + rest]
    graph = layer(name, mix, shift)
    x, other = inputs_of(graph, 60), inputs_of(graph, 4)
    trial, reference = recovered(EXACT, graph, kept_of(name, list(range(half - half // 3))), [x])
    assert len(trial.applied) == 1
    assert gap(reference, trial.before, other) > 1e-2
    assert gap(reference, trial.after, other) < 1e-8
    for parameter in trial.after.tensors():
        assert gap(reference, damaged(trial.after, parameter), other) > 1e-6
    assert trial.again().unchanged


@pytest.mark.parametrize("name", [name for name, case in LAYERS.items() if not case[3]])
def test_zero_padding_is_approximate_and_says_so(name: str) -> None:
    torch.manual_seed(2)
    graph = layer(name, torch.randn(6, 3).double(), torch.randn(6).double())
    x = inputs_of(graph, 9)
    trial, reference = recovered(CompensateMean(), graph, kept_of(name, [0, 2, 3, 5]), [x])
    (site,) = trial.applied
    where = "where fewer taps of its kernel meet" if "Transpose" in name else "where its window reaches into the zero"
    assert where in site.reason
    missing, left = (reference.graph.run(x) - g.run(x) for g in (trial.before, trial.after))
    torch.testing.assert_close(left, missing - missing.mean((0, 2, 3), keepdim=True))  # no constant leaves less


# -- text -----------------------------------------------------------------------------------------------------------

THREE = """
    a0 = MatMul(x, up) a1 = Add(a0, up_bias) a = Relu(a1)
    b0 = MatMul(a, middle) b = Relu(b0)
    y = Gemm(b, down)
"""


def three() -> Graph:
    weights = {"up": (2, 4), "up_bias": (4,), "middle": (4, 3), "down": (3, 2)}
    return graph_of("(double[N,2] x) => (double[N,2] y)", THREE, weights)


@pytest.mark.parametrize("each", [CompensateMean(), RidgeRefit()], ids=str)
def test_text(each: Pass) -> None:
    trial, _ = recovered(each, three(), {"up[1]": [0, 2]}, [torch.randn(9, 2).double()])
    applied = [site.name for site in trial.applied]
    assert applied == ["middle", "down"]
    assert trial.text().splitlines() == [
        "-%Relu_1: float64[2?, 3] = onnx.Relu(%MatMul_1)",
        "-%Gemm_0: float64[2?, 2] = onnx.Gemm(%Relu_1, %down)",
        "+%middle_bias: float64[3] = @middle_bias",
        "+%add: float64[2?, 3] = onnx.Add(%MatMul_1, %middle_bias)",
        "+%Relu_1: float64[2?, 3] = onnx.Relu(%add)",
        "+%down_bias: float64[2] = @down_bias",
        "+%Gemm_0: float64[2?, 2] = onnx.Gemm(%Relu_1, %down, %down_bias)",
    ]
    assert calls(trial.after) == ["MatMul", "Add", "Relu", "MatMul", "Add", "Relu", "Gemm"]
    (skipped,) = trial.skipped
    assert skipped.name == "up"
    assert skipped.reason.startswith(("the mean of its output is what it was", "its output is what it was"))


def test_refusals_have_reasons() -> None:
    body = """
        h0 = MatMul(x, up) h = Relu(h0)
        a = MatMul(h, shared) b0 = Neg(h) b = MatMul(b0, shared)
        c = Gemm <alpha = 0.5> (h, scaled)
        e = Exp(computed) d = MatMul(h, e)
        s1 = Add(a, b) s2 = Add(s1, c) y = Add(s2, d)
    """
    weights = {"up": (3, 4), "shared": (4, 2), "scaled": (4, 2), "computed": (4, 2)}
    graph = graph_of("(double[N,3] x) => (double[N,2] y)", body, weights)
    trial, _ = recovered(CompensateMean(), graph, {"up[1]": [0, 2]}, [torch.randn(5, 3).double()])
    reasons = {site.name.split(" ")[0]: site.reason for site in trial.skipped}
    assert not trial.applied
    assert trial.unchanged
    assert "scales its terms (alpha 0.5, beta 1)" in reasons["scaled"]
    assert "is computed by" in reasons["computed"]
    assert reasons["shared"] == "it has no bias, and shared is shared with other layers: one bias could not serve all"


# -- the same as in torch -------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(0, 999), st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=2), st.booleans())
def test_layers_become_what_they_become_in_torch(seed: int, kept: list[int], bias: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5, bias=bias), nn.ReLU(), nn.Linear(5, 2, bias=bias)
    ).double()
    values = {f"p{name.replace('.', '_')}": value.numpy() for name, value in model.state_dict().items()}
    given = {n: f", p{n}_bias" if bias or not n else "" for n in (0, 2, 4)}
    body = f"""
        a = Gemm <transB = 1> (x, p0_weight{given[0]}) s = Tanh(a)
        b = Gemm <transB = 1> (s, p2_weight{given[2]}) t = Relu(b)
        y = Gemm <transB = 1> (t, p4_weight{given[4]})
    """
    graph = graph_of("(double[N,3] x) => (double[N,2] y)", body, values)
    data = [torch.randn(12, 3).double(), torch.randn(7, 3).double()]
    for each in (CompensateMean(), RidgeRefit()):
        ours, _ = recovered(each, graph, {"p0_weight[0]": range(kept[0]), "p2_weight[0]": range(kept[1])}, data)
        theirs, _ = recovered(
            each, capture(model, data[0]), {"0.weight[0]": range(kept[0]), "2.weight[0]": range(kept[1])}, data
        )
        expected = {f"p{name.replace('.', '_')}": value for name, value in theirs.after.tensors().items()}
        assert set(ours.after.tensors()) == set(expected)
        for name, value in ours.after.tensors().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
        assert len(ours.applied) == len(theirs.applied)


# -- in a pipeline, and out again -----------------------------------------------------------------------------------

NETWORK = """
    a0 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) a1 = BatchNormalization(a0, scale, shift, mean, variance) a = Relu(a1)
    c0 = Conv(a, w2) c = Relu(c0)
    m = ReduceMean <keepdims = 0> (c, places)
    h0 = MatMul(m, w3) h1 = Add(h0, b3) h = Relu(h1)
    y = Gemm(h, w4, b4)
"""


def network() -> onnx.ModelProto:
    """Return a small convolutional network with a batch norm, whose batch varies."""
    random = np.random.default_rng(3)
    weights: dict[str, Any] = {"w1": (8, 2, 3, 3), "b1": (8,), "scale": random.uniform(0.5, 1.5, 8), "shift": (8,)}
    weights |= {"mean": (8,), "variance": random.uniform(0.5, 1.5, 8), "w2": (12, 8, 1, 1), "w3": (12, 10)}
    weights |= {"b3": (10,), "w4": (10, 3), "b4": (3,), "places": np.array([2, 3])}
    return parsed("(float[N,2,6,6] x) => (float[N,3] y)", NETWORK, weights)


IMAGES = [torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def run_file(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("each", ["compensate-mean", "ridge-refit"])
def test_recovery_in_a_pipeline(each: str, tmp_path: Path) -> None:
    model = network()
    found = {}
    for text in ("prune-channels", f"prune-channels,{each}"):
        result = graphopt.optimize(
            model,
            target="onnx",
            budget=graphopt.Budget(flops=0.5),
            pipeline=text,
            calibration=[{"x": x.numpy()} for x in IMAGES],
            output=tmp_path / text.replace(",", "-"),
        )
        found[text] = result
    plain, better = found.values()
    assert any(site.applied for site in better.report.passes[1].sites)
    x = torch.cat(IMAGES)
    whole = capture(model).run(x)
    errors = []
    for result in (plain, better):
        written = run_file(Path(result.artifacts["onnx"]), x)
        with torch.no_grad():
            torch.testing.assert_close(written, result.module(x), rtol=1e-4, atol=1e-5)
        errors.append(float((written - whole).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_a_file_is_trained_and_written_as_trained(tmp_path: Path) -> None:
    model = network()
    x, wanted = torch.cat(IMAGES), capture(model).run(torch.cat(IMAGES))
    losses: list[float] = []

    def train(module: nn.Module) -> None:
        assert module.training
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(module(x), wanted)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    result = graphopt.optimize(
        model,
        target="onnx",
        budget=graphopt.Budget(flops=0.5),
        pipeline="prune-channels,fine-tune",
        finetune=train,
        output=tmp_path / "out",
    )
    assert len(losses) == 40
    assert losses[-1] < 0.3 * losses[0]
    written = run_file(Path(result.artifacts["onnx"]), x)
    assert nn.functional.mse_loss(written, wanted).item() < 1.5 * losses[-1]
    # The batch norm keeps the statistics of the file: it is one of inference, in training as well.
    before = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    after = onnx.load(result.artifacts["onnx"])
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    kept = result.plan.keep["mean"][0]
    np.testing.assert_array_equal(tensors["mean"], before["mean"][kept])
    assert not np.allclose(tensors["w1"], before["w1"][kept])
