"""Read, write and prune what torch's exporters make of the sixty models.

`onnx_exports.json` says what the exporters refuse, `onnx_coverage.json` what is free in each file. After a change that
is meant to alter them, write them anew with `python -m tests.zoo.onnx_files` and `python -m tests.zoo.onnx_coverage`,
and read the difference. Of each model one exporter's file is tested, and of every third the whole of `optimize`; with
GRAPHOPT_ZOO_FILES=both, all of all.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import graphopt
from graphopt.capture import capture
from graphopt.dialects import infer
from graphopt.dialects.onnx import runtime
from graphopt.graph import Graph
from graphopt.targets.onnx import OnnxTarget
from tests.zoo import ZOO, quiet
from tests.zoo.exactness import measure
from tests.zoo.onnx_coverage import COVERAGE, file_coverage
from tests.zoo.onnx_files import EXPORTERS, REFUSED, Exporter, ExportError, exported, feeds
from tests.zoo.onnx_names import Origin, origins, signatures

pytestmark = pytest.mark.zoo

EXPECTED_REFUSALS: dict[str, dict[str, str]] = json.loads(REFUSED.read_text())

EXPECTED: dict[str, dict[str, Any]] = json.loads(COVERAGE.read_text())

ALONE = 4
"""How many groups of each file are pruned alone."""

SAME = ("bert", "qwen2", "llama_gqa", "gpt2", "opt", "t5", "clip", "segformer", "vit_tiny_patch16_224", "resnet50")
"""Models whose files the dynamo exporter writes with the module's tensors, renamed or transposed at most."""

SAME_WEIGHTS = ("bert", "qwen2", "gpt2", "opt", "clip", "vit_tiny_patch16_224")
"""Those of them with the module's values, too, so that scores, and what is kept, are the same."""

BOTH = os.environ.get("GRAPHOPT_ZOO_FILES") == "both"
"""Whether each model is tested as both exporters write it; else as one of them does, in turn."""


def exporters(number: int, name: str) -> list[Exporter]:
    """Return which exporters' files of a model are tested."""
    able = [exporter for exporter in EXPORTERS if name not in EXPECTED_REFUSALS[exporter]]
    if BOTH or len(able) < 2:
        return able
    return ["dynamo"] if name in SAME else [able[number % 2]]


FILES = [
    pytest.param(name, exporter, id=f"{name}-{exporter}", marks=pytest.mark.xdist_group(name))
    for number, name in enumerate(ZOO)
    for exporter in exporters(number, name)
]


@lru_cache(maxsize=1)
def captured(name: str, exporter: Exporter) -> tuple[Path, Graph]:
    """Export and read a model; the tests do not change the graph."""
    path = exported(name, exporter)
    with quiet():
        return path, capture(path)


def run_model(model: bytes, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def relative(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    assert expected.shape == found.shape
    a, b = expected.astype(np.float64), found.astype(np.float64)
    return float(np.abs(a - b).max(initial=0.0) / max(np.abs(a).max(initial=0.0), 1e-30))


@pytest.mark.slow
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_the_exporters_refuse_what_they_are_known_to_refuse(exporter: Exporter) -> None:
    for name, reason in EXPECTED_REFUSALS[exporter].items():
        with pytest.raises(ExportError) as refusal:
            exported(name, exporter)
        assert str(refusal.value).split(":")[0] == reason.split(":")[0], name


@pytest.mark.parametrize(("name", "exporter"), FILES)
def test_reads_and_writes_without_changing_an_output(name: str, exporter: Exporter) -> None:
    """Run the graph with torch and as it is written in ONNX Runtime, on another batch size than the example's."""
    path, graph = captured(name, exporter)
    inputs = feeds(name, path, batch=3)
    expected = run_model(path.read_bytes(), inputs)
    tensors = [torch.from_numpy(inputs[value.name]) for value in graph.module.meta["onnx"].inputs]
    with torch.no_grad():
        computed = [leaf for leaf in pytree.tree_leaves(graph.module(*tensors)) if isinstance(leaf, torch.Tensor)]
    written = runtime.outputs(graph, tensors)
    assert written is not None
    for a, b, c in zip(expected, computed, written, strict=True):
        assert relative(a, b.numpy()) <= 2e-5
        assert relative(a, c.numpy()) <= 2e-6


@pytest.mark.parametrize(("name", "exporter"), FILES)
def test_groups_alone_and_together_are_exact(name: str, exporter: Exporter) -> None:
    """Compare with the masked original in float64, computed by torch."""
    typing = infer(captured(name, exporter)[1])
    assert file_coverage(typing) == EXPECTED[exporter][name]
    step = max(1, len(typing.groups) // ALONE)
    found = measure(typing, typing.groups[::step][:ALONE])
    assert found.alone <= 1e-10, found.worst
    assert found.together <= 1e-10
    assert found.single <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exporter"), FILES if BOTH else FILES[::3])
def test_half_the_multiply_adds_are_removed_and_the_rest_runs_in_onnx_runtime(name: str, exporter: Exporter) -> None:
    path, _ = captured(name, exporter)
    before = path.read_bytes()
    target = OnnxTarget(channel_multiple=1)
    with quiet():
        result = graphopt.optimize(path, target=target, budget=graphopt.Budget(flops=0.5))
    report = result.report.to_dict()
    (budget,) = report["budget"]
    assert budget["achieved"] <= budget["target"] == 0.5 * budget["original"]
    (pruning,) = (each for each in report["passes"] if each["name"] == "prune-channels")
    assert pruning["comparisons"]
    for each in report["passes"]:
        assert all(c["passed"] for c in each["comparisons"])
        assert (each["left_alone"], each["left_out"]) == ({}, "")
    ran = [c for c in report["comparisons"] if "onnxruntime" in c["subject"]]
    assert ran
    assert all(c["passed"] for c in ran)
    inputs = feeds(name, path, batch=3)
    expected, found = run_model(before, inputs), run_model(result.onnx.SerializeToString(), inputs)
    assert [a.shape for a in found] == [a.shape for a in expected]
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SAME])
def test_a_file_has_the_groups_of_its_module(name: str) -> None:
    with quiet():
        of_module = infer(capture(ZOO[name].build(), ZOO[name].inputs()))
    of_file = infer(captured(name, "dynamo")[1])
    tensors = of_module.graph.tensors()
    known = origins(of_file.graph.tensors(), tensors)
    kept = {each.name for each in known.values()}
    own = {key: Origin(key, tuple(range(tensor.dim()))) for key, tensor in tensors.items() if key in kept}
    expected, found = signatures(of_module, own), signatures(of_file, known)
    assert len(found) == len(of_file.groups) == len(of_module.groups)
    assert set(found.values()) == set(expected.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SAME_WEIGHTS])
def test_a_file_is_pruned_as_its_module(name: str) -> None:
    module, (path, graph) = ZOO[name].build(), captured(name, "dynamo")
    target, budget = OnnxTarget(channel_multiple=1, check=False), graphopt.Budget(flops=0.5)
    with quiet():
        program = capture(module, ZOO[name].inputs())
        plans = [
            graphopt.optimize(model, target=target, budget=budget, pipeline="prune-channels", verify="off").plan
            for model in (program, path)
        ]
    known = origins(graph.tensors(), dict(module.state_dict()))
    there = {each.name for each in known.values()}  # under one of its names, if it is shared, and not what was folded
    expected = {
        (key, dim): kept.tolist() for key, dims in plans[0].keep.items() if key in there for dim, kept in dims.items()
    }
    found = {
        (known[key].name, known[key].dims[dim]): kept.tolist()
        for key, dims in plans[1].keep.items()
        if key in known
        for dim, kept in dims.items()
    }
    assert found
    assert found == expected
