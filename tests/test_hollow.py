"""Models without values: captured, typed and planned on the meta device, scored and pruned from a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import graphopt
from graphopt.capture import capture
from graphopt.checkpoint import Checkpoint, Weights
from graphopt.dialects.aten import infer
from graphopt.errors import CaptureError, LoweringError, PipelineError
from graphopt.graph import Call, Graph
from graphopt.importance import CRITERIA, InputFluctuation, ScoreContext
from graphopt.rewrite import rewrite
from graphopt.sweep import Inputs, Sweep, lockstep
from graphopt.verify import shape_mismatch

TOKENS = torch.tensor([[1, 4, 2], [7, 7, 0]])
BUDGET = graphopt.Budget(flops=0.5)


class Language(nn.Module):
    """A small language model: a tied classifier, positions made in forward, a buffer that no checkpoint holds."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.register_buffer("scale", torch.linspace(1, 2, 8), persistent=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) * self.scale + places[:, None] / 10
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


def on_meta() -> Language:
    with torch.device("meta"):
        return Language()


def unweighted() -> Language:
    with graphopt.without_weights():
        return Language()


def faked() -> Language:
    with FakeTensorMode():
        return Language()


def real() -> Language:
    torch.manual_seed(0)
    return Language()


def stored(folder: Path, model: nn.Module) -> Path:
    """Write a checkpoint in two files, as libraries do: one name of a shared tensor, no transient buffers."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    names = list(state)
    folder.mkdir(parents=True)
    parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, part in parts.items():
        safetensors.torch.save_file({n: state[n] for n in part}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {' + ", ".join(f'"{n}": "{f}"' for f, p in parts.items() for n in p) + "}}")
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in ("a.safetensors", "b.safetensors"):
        found |= safetensors.torch.load_file(folder / file)
    return found


@pytest.mark.parametrize("make", [on_meta, faked, unweighted])
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS.to("meta")])
def test_the_graph_is_that_of_the_model_with_values(make: Callable[[], Language], tokens: Tensor) -> None:
    graph, full = capture(make(), (tokens,)), capture(real(), (TOKENS,))
    assert graph.text() == full.text()
    assert graph.aliases == full.aliases
    assert graph.hollow == [n for n in graph.tensors() if n != "scale" or make is not unweighted]
    assert [n.meta.get("train_arguments") for n in graph.nodes] == [n.meta.get("train_arguments") for n in full.nodes]
    typing, expected = infer(graph), infer(full)
    assert [(g.name, g.size, g.role) for g in typing.groups] == [(g.name, g.size, g.role) for g in expected.groups]


def test_the_model_is_left_as_it_was() -> None:
    model = on_meta()
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    capture(model, (TOKENS,))
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert all(tensor.is_meta for tensor in model.parameters())


def test_a_captured_graph_runs_once_it_is_given_values() -> None:
    """What forward makes beside the parameters is not on the meta device."""
    model = real().eval()
    graph = capture(on_meta(), (TOKENS,))
    graph.module.load_state_dict(model.state_dict(), assign=True)
    graph.set_tensor("scale", model.scale)
    assert torch.equal(graph.run(TOKENS), model(TOKENS))


def test_sizes_that_only_a_run_shows_are_refused() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight)[x[0] > 0]

    with torch.device("meta"):
        model = Chosen()
    with pytest.raises(CaptureError, match="weight has no values: load the weights"):
        capture(model, (torch.ones(5, 5),))


@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "random"])
def test_scores_from_a_checkpoint_are_those_from_memory(tmp_path: Path, criterion: str) -> None:
    model = real()
    hollow = capture(on_meta(), (TOKENS,))
    with pytest.raises(PipelineError, match="checkpoint=PATH"):
        list(ScoreContext(infer(hollow)).parameters.values())
    result = graphopt.optimize(
        hollow,
        checkpoint=stored(tmp_path / "in", model),
        budget=BUDGET,
        pipeline=f"prune-channels{{importance={criterion}}}",
    )
    expected = graphopt.optimize(model, (TOKENS,), budget=BUDGET, pipeline=f"prune-channels{{importance={criterion}}}")
    assert criterion in CRITERIA
    assert result.plan == expected.plan
    assert len(result.plan) > 0


def test_scores_from_activations_are_those_from_memory(tmp_path: Path) -> None:
    """Calibration data runs through a model of which one layer's weights are in memory at a time."""
    calibration = [TOKENS, TOKENS.flip(0), TOKENS.flip(1)]
    pipeline = "prune-channels{importance=input-fluctuation}"
    model = real()
    found = graphopt.optimize(
        unweighted(),
        (TOKENS,),
        checkpoint=stored(tmp_path / "in", model),
        budget=BUDGET,
        pipeline=pipeline,
        calibration=calibration,
    )
    expected = graphopt.optimize(model, (TOKENS,), budget=BUDGET, pipeline=pipeline, calibration=calibration)
    assert found.plan == expected.plan
    scores = [InputFluctuation().score(ScoreContext(infer(graph), calibration)) for graph in bound(tmp_path / "in")]
    assert scores[0].keys() == scores[1].keys()
    assert all(np.allclose(scores[0][group], scores[1][group], rtol=1e-12, atol=0) for group in scores[0])


def bound(folder: Path) -> tuple[Graph, Graph]:
    """Return a graph that reads a checkpoint, and one that holds its values."""
    graph = capture(unweighted(), (TOKENS,))
    tensors = {name: (graph.tensor(name), graph.names(name)) for name in graph.hollow}
    graph.weights = Weights.bind(Checkpoint.open(folder), tensors)
    return graph, capture(real(), (TOKENS,))


def test_a_checkpoint_is_pruned_as_the_model_in_memory_is(tmp_path: Path) -> None:
    model = real()
    source = stored(tmp_path / "in", model)
    result = graphopt.optimize(on_meta(), (TOKENS,), checkpoint=source, budget=BUDGET, output=tmp_path / "out")
    expected = graphopt.optimize(model, (TOKENS,), budget=BUDGET)
    found = loaded(tmp_path / "out")
    state = expected.module.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert {"checkpoint", "shard 1", "shard 2", "plan", "report", "manifest"} == result.artifacts.keys()
    assert all(path.is_file() for path in result.artifacts.values())
    assert any("no output was compared" in sentence for sentence in result.report.warnings)
    assert any("no model.pt2 was written" in note for note in result.report.notes)
    assert not result.report.passes[0].comparisons
    result.module.load_state_dict({**found, "head.weight": found["embed.weight"]}, assign=True)
    result.module.scale = expected.module.scale
    assert torch.equal(result.module.eval()(TOKENS), expected.module.eval()(TOKENS))


def test_pruning_twice_reads_what_the_first_left(tmp_path: Path) -> None:
    """The second pass scores what the first kept of each tensor, not the checkpoint's tensors."""
    model = real()
    twice = "prune-channels{budget.flops=0.8},prune-channels{importance=l1 budget.flops=0.5}"
    found = graphopt.optimize(on_meta(), (TOKENS,), checkpoint=stored(tmp_path / "in", model), pipeline=twice)
    assert found.plan == graphopt.optimize(model, (TOKENS,), pipeline=twice).plan


def test_a_plan_that_shrinks_a_transient_buffer_fits_checkpoints_and_state_dicts(tmp_path: Path) -> None:
    typing = infer(capture(real(), (TOKENS,)))
    (group,) = (g for g in typing.groups if any(p.tensor == "scale" for p in g.places))
    plan = graphopt.Plan.of(typing, {group.atom: np.array([0, 3])})
    assert plan.transient == {"scale"}
    plan.save(tmp_path / "plan.safetensors")
    assert graphopt.Plan.load(tmp_path / "plan.safetensors") == plan
    assert plan.apply(real().state_dict())["embed.weight"].shape == (11, 2)
    plan.apply_files(stored(tmp_path / "in", real()), tmp_path / "out")
    assert loaded(tmp_path / "out")["embed.weight"].shape == (11, 2)


def test_a_size_that_was_not_rewritten_is_found_on_shapes_alone() -> None:
    typing = infer(capture(on_meta(), (TOKENS,)))
    (group,) = (g for g in typing.groups if g.name == "blocks.1.0.weight[0]")
    pruned = rewrite(typing, {group.atom: np.arange(5)})
    assert shape_mismatch(pruned) is None
    pruned.set_tensor("blocks.1.3.weight", nn.Parameter(torch.empty(8, 6, device="meta")))
    assert "does not run on shapes" in str(shape_mismatch(pruned))
    intact = typing.graph.clone()
    (node, *_) = (n for n in intact.nodes if n.op == "call_function" and "linear" in str(n.target))
    node.meta["spec"] = Call(node).out.resized((2, 3, 23))
    assert "should yield [2, 3, 23]" in str(shape_mismatch(intact))


def test_models_without_weights_have_their_buffers_and_ties() -> None:
    model, full = unweighted(), real()
    assert torch.equal(model.scale, full.scale)
    assert model.head.weight is model.embed.weight
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}
    assert all(p.is_meta and p.requires_grad for p in model.parameters())
    assert not any(p.is_meta for p in nn.Linear(2, 2).parameters())


def test_a_sweep_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    """Calibration data runs through a model whose weights stay in files, with the same values at every call."""
    graph, full = bound(stored(tmp_path / "in", real()))
    batches: list[Inputs] = [((TOKENS,), {}), ((TOKENS.flip(0),), {})]
    read: list[str] = []

    def watched(name: str) -> Tensor:
        read.append(name)
        return graph.value(name)

    hollow, whole = Sweep(graph, batches, tensor=watched), Sweep(full, batches)
    most = 0
    for node, other in lockstep(hollow, whole):
        assert node is not None
        assert other is not None
        for found, expected in zip(hollow.operands(node), whole.operands(other), strict=True):
            pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
        most = max(most, sum(t.numel() for n, t in hollow._held.items() if n != "scale"))
    # The embedding is also the classifier, and stays from one end to the other.
    largest = max(t.numel() for n, t in graph.tensors().items() if "blocks" in n)
    assert most <= 11 * 8 + largest + 24
    assert sorted(read) == sorted(graph.tensors())


def test_buffers_without_values_are_asked_for(tmp_path: Path) -> None:
    graph = capture(on_meta(), (TOKENS,))
    with pytest.raises(PipelineError, match=r"the buffer scale has no values.*graphopt.without_weights\(\)"):
        graph.value("scale")
    with pytest.raises(PipelineError, match=r"the parameter blocks.0.0.bias has no values.*checkpoint=PATH"):
        graph.value("blocks.0.0.bias")


def test_what_needs_values_is_refused_in_plain_words(tmp_path: Path) -> None:
    source = stored(tmp_path / "in", real())
    with pytest.raises(PipelineError, match="evaluate needs a model that runs"):
        graphopt.optimize(on_meta(), (TOKENS,), checkpoint=source, budget=BUDGET, evaluate=lambda _: 1.0)
    with pytest.raises(LoweringError, match="the target 'onnx' needs all values"):
        graphopt.optimize(on_meta(), (TOKENS,), checkpoint=source, budget=BUDGET, target="onnx")
    with pytest.raises(PipelineError, match=r"group-taylor needs gradients, and .* has no values in memory"):
        graphopt.optimize(
            on_meta(),
            (TOKENS,),
            checkpoint=source,
            budget=BUDGET,
            calibration=[(TOKENS, TOKENS[:, 0])],
            pipeline="prune-channels{importance=group-taylor}",
        )
    with pytest.raises(PipelineError, match="values are in memory, so a checkpoint is of no use"):
        graphopt.optimize(real(), (TOKENS,), checkpoint=source, budget=BUDGET)
    with pytest.raises(PipelineError, match="give optimize"):
        graphopt.optimize(on_meta(), (TOKENS,), budget=BUDGET)


def test_planning_by_chance_needs_no_checkpoint() -> None:
    result = graphopt.optimize(on_meta(), (TOKENS,), budget=BUDGET, pipeline="prune-channels{importance=random}")
    (line,) = result.report.budget
    assert line.met
    assert all(p.is_meta for p in result.module.parameters())


def test_nothing_whole_is_read_where_blocks_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda *_: pytest.fail("a whole tensor was read"))
    source = stored(tmp_path / "in", real())
    graphopt.optimize(on_meta(), (TOKENS,), checkpoint=source, budget=BUDGET, output=tmp_path / "out")
