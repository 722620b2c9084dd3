"""Language models without values: planned, scored and pruned from the files that their library writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.checkpoint import INDEX, Checkpoint, Weights, spelled
from graphopt.dialects.aten import infer
from graphopt.graph import Graph
from graphopt.importance import CRITERIA, ScoreContext
from graphopt.rewrite import rewrite
from tests.zoo import ZOO, quiet

pytestmark = pytest.mark.zoo

ROUTED = "prune-channels{constraints.normalised=together}"
"""Experts are normalised over, and go along with everything else."""


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "mixtral"])
def test_scores_and_files_are_those_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    model: Any = ZOO[name].build()
    inputs = ZOO[name].inputs()
    folder = tmp_path / "in"
    with quiet():
        model.save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    with graphopt.without_weights():
        hollow = ZOO[name].build()
    assert all(p.is_meta for p in hollow.parameters())
    graph, full = capture(hollow, inputs), capture(model, inputs)
    assert graph.text() == full.text()
    tensors = {each: (graph.tensor(each), graph.names(each)) for each in graph.hollow}
    graph.weights = Weights.bind(Checkpoint.open(folder), tensors)
    calibration = [inputs.kwargs or inputs.args]
    for criterion in ("l2", "lamp", "input-fluctuation"):
        found, expected = (CRITERIA[criterion]().score(ScoreContext(infer(g), calibration)) for g in (graph, full))
        assert found.keys() == expected.keys()
        # Products of activations may differ in the last bit from call to call, with where tensors lie in memory.
        assert all(np.allclose(found[group], expected[group], rtol=1e-12, atol=0) for group in found), criterion
    options: dict[str, Any] = {"budget": graphopt.Budget(params=0.6), "pipeline": ROUTED}
    result = graphopt.optimize(hollow, inputs, checkpoint=folder, output=tmp_path / "out", **options)
    expected_state = graphopt.optimize(model, inputs, **options).module.state_dict()
    written = Checkpoint.open(tmp_path / "out")
    assert written.keys() == {*json.loads((tmp_path / "out" / f"model{INDEX}").read_text())["weight_map"]}
    spelling = spelled(expected_state, written)
    assert len(spelling) >= len(expected_state) - 1  # a shared tensor is written once
    assert all(torch.equal(written[held], expected_state[each]) for each, held in spelling.items())
    assert sum(each in result.plan.keep for each in spelling) >= 6
    experts = [each for each in result.plan.keep if each.endswith(".experts.down_proj")]
    assert all(0 in result.plan.keep[each] for each in experts)
    assert bool(experts) == (name == "mixtral")


def test_a_mixtral_with_fewer_experts_is_the_one_its_library_builds() -> None:
    """Experts deleted by hand from the weights of a smaller configuration compute what the pruned graph does."""
    model: Any = ZOO["mixtral"].build().double()
    inputs = ZOO["mixtral"].inputs()
    typing = infer(capture(model, inputs))
    groups = [group for group in typing.groups if group.role == "experts"]
    assert len(groups) == model.config.num_hidden_layers
    for kept in ([0, 2], [1, 3, 4]):
        config = copy.deepcopy(model.config)
        config.num_local_experts = len(kept)
        with quiet():
            kind: Any = type(model)
            smaller = kind(config).double().eval()
        smaller.set_experts_implementation("eager")  # the fused product takes no float64
        smaller.load_state_dict({name: without(name, tensor, kept) for name, tensor in model.state_dict().items()})
        pruned = rewrite(typing, {group.atom: np.array(kept) for group in groups})
        found, expected, before = (logits(each, inputs) for each in (pruned.module, smaller, typing.graph.module))
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert (found - before).abs().max() > 1e-3 * expected.abs().max()


def without(name: str, tensor: Tensor, kept: list[int]) -> Tensor:
    return tensor[kept] if ".mlp.gate." in name or ".experts." in name else tensor


def logits(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad(), quiet():
        found: Tensor = model(*inputs.args, **inputs.kwargs).logits
    return found


def test_large_models_are_planned_without_their_weights() -> None:
    """Llama-7B-shaped: thirty-two layers of width 4096, in as much memory as its graph takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with graphopt.without_weights():
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008))
    graph: Graph = capture(model, (torch.zeros(1, 16, dtype=torch.long),))
    assert sum(t.numel() for t in graph.tensors().values()) > 6.7e9
    assert sum(t.numel() for t in graph.tensors().values() if not t.is_meta) < 1000
    pipeline = "prune-channels{importance=random}"
    result = graphopt.optimize(graph, budget=graphopt.Budget(flops=0.5), pipeline=pipeline)
    (line,) = result.report.budget
    assert line.met
    assert all(p.is_meta for p in result.module.parameters())
