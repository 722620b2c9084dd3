"""Failures leave what replays them, and the pass and the site to blame are found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.cost import CostModel
from graphopt.debugging import Culprit, Reproducer, failure, find_culprit
from graphopt.dialects.aten import infer
from graphopt.errors import GraphOptError, LoweringError
from graphopt.graph import Graph
from graphopt.pipeline import Context, Pass, PassResult, Pipeline, Preserves, Removal
from graphopt.targets import Lowered, Target
from tests.small_models import convolutions, images

aten = torch.ops.aten


class Rectified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@dataclass(frozen=True)
class Clamp(Pass):
    """Write rectifiers as clamps."""

    name: ClassVar[str] = "clamp"
    preserves: ClassVar[Preserves] = Preserves.EXACT
    only: tuple[str, ...] = ("relu", "relu_1", "relu_2", "relu_3")

    def run(self, graph: Graph, context: Context) -> PassResult:
        for node in list(graph.nodes):
            if node.target is aten.relu.default and node.name in self.only and context.allows(node.name):
                node.target, node.args = aten.clamp_min.default, (node.args[0], 0)
                context.applied(node.name, "clamped")
        graph.module.recompile()
        return PassResult(graph)


@dataclass(frozen=True)
class Halve(Pass):
    """Halve every group."""

    name: ClassVar[str] = "halve"
    preserves: ClassVar[Preserves] = Preserves.MASKED

    def run(self, graph: Graph, context: Context) -> PassResult:
        typing = infer(graph)
        return PassResult(graph, Removal(typing, {g.atom: np.arange(g.size // 2) for g in typing.groups}))


@dataclass(frozen=True)
class Picky(Target):
    """Refuse graphs in which a node, or the rows of a weight, are not as they were."""

    name: ClassVar[str] = "picky"
    node: str = "relu_2"
    weight: str = "layers.1.weight"

    def lower(self, graph: Graph, directory: Path | None = None) -> Lowered:
        node = next(n for n in graph.nodes if n.name == self.node)
        if node.target is not aten.relu.default:
            raise LoweringError(f"{self.node} is no rectifier")
        if graph.tensor(self.weight).shape[0] != 5:
            raise LoweringError(f"{self.weight} has lost rows")
        return Lowered()


@pytest.fixture
def graph() -> Graph:
    return capture(Rectified(), torch.randn(2, 4))


def culprit(graph: Graph, *passes: Pass, target: Target | None = None) -> Culprit | None:
    context = Context(original=CostModel(infer(graph)).cost())
    chosen = target or Picky()
    return find_culprit(Pipeline(passes), graph, context, lambda g: failure(lambda: chosen.lower(g)))


class TestCulprit:
    def test_the_first_pass_that_does_harm_and_its_site(self, graph: Graph) -> None:
        found = culprit(graph, Clamp(("relu",)), Clamp(("relu_1",)), Clamp(), Clamp(("relu_3",)))
        assert found == Culprit(2, "clamp", "relu_2 is no rectifier", {"relu_2": "relu_2 is no rectifier"})
        assert str(found) == (
            "bisection: it fails first after pass 3, 'clamp' (relu_2 is no rectifier); without relu_2 that pass does "
            "no harm"
        )

    def test_the_group_that_does_harm(self, graph: Graph) -> None:
        found = culprit(graph, Clamp(("relu",)), Halve())
        assert found is not None
        assert (found.position, found.name, [*found.sites]) == (1, "halve", ["layers.1.weight[0]"])

    def test_no_pass_does_harm(self, graph: Graph) -> None:
        assert culprit(graph, Clamp(("relu",))) is None

    def test_it_fails_without_any_pass(self, graph: Graph) -> None:
        broken = Clamp().run(graph.clone(), Context(original=CostModel(infer(graph)).cost())).graph
        found = culprit(broken, Halve())
        assert str(found) == "bisection: it fails without any pass (relu_2 is no rectifier)"

    def test_optimize_tells_where_asked(self) -> None:
        passes = [Clamp(("relu", "relu_1")), Clamp(), Clamp()]
        with graphopt.debugging(bisect=True), pytest.raises(LoweringError) as raised:
            graphopt.optimize(Rectified(), torch.randn(2, 4), target=Picky(), pipeline=passes)
        (note,) = raised.value.__notes__
        assert note.startswith("bisection: it fails first after pass 2, 'clamp'")
        with pytest.raises(LoweringError) as raised:
            graphopt.optimize(Rectified(), torch.randn(2, 4), target=Picky(), pipeline=passes)
        assert not hasattr(raised.value, "__notes__")


def replayed(folder: Path) -> GraphOptError:
    with pytest.raises(GraphOptError) as raised:
        graphopt.optimize(**Reproducer.load(folder))
    return raised.value


class TestReproducer:
    def test_a_budget_that_cannot_be_met(self, tmp_path: Path) -> None:
        folder = tmp_path / "failure"
        passes = "prune-channels{importance=random budget.flops=0.8},prune-channels{budget.flops=0.0001}"
        data = [(images(), torch.tensor([1, 2])), (images(), torch.tensor([0, 2]))]
        with graphopt.debugging(reproducer=folder), pytest.raises(graphopt.BudgetError) as raised:
            graphopt.optimize(
                convolutions(),
                images(),
                pipeline=passes,
                calibration=data,
                seed=3,
                evaluate=lambda module: 1.0,
            )
        assert raised.value.__notes__[-1] == f"a reproducer was written: graphopt replay {folder}"
        settings = json.loads((folder / "reproducer.json").read_text())
        assert settings["pipeline"] == "prune-channels{budget.flops=0.0001}"
        assert settings["error"] == str(raised.value)
        assert settings["notes"] == ["evaluate is a function, and was not saved"]
        arguments = Reproducer.load(folder)
        assert arguments["seed"] == 3
        for (inputs, labels), ((saved,), kept) in zip(data, arguments["calibration"], strict=True):
            assert torch.equal(inputs, saved)
            assert torch.equal(labels, kept)
        assert isinstance(replayed(folder), graphopt.BudgetError)

    def test_fractions_refer_to_the_first_model(self, tmp_path: Path) -> None:
        """The model that is saved is smaller than the one that the budget was stated for."""
        folder = tmp_path / "failure"
        passes = "prune-channels{progress=0.5},prune-channels{constraints.min_keep=0.99}"
        with graphopt.debugging(reproducer=folder), pytest.raises(graphopt.BudgetError):
            graphopt.optimize(convolutions(), images(), pipeline=passes, budget=graphopt.Budget(flops=0.5))
        full = graphopt.inspect(convolutions(), images()).cost.flops
        assert Reproducer.load(folder)["budget"] == graphopt.Budget(flops=full / 2)
        assert isinstance(replayed(folder), graphopt.BudgetError)

    def test_a_target_that_fails(self, tmp_path: Path) -> None:
        folder = tmp_path / "failure"
        with graphopt.debugging(reproducer=folder), pytest.raises(LoweringError):
            graphopt.optimize(Rectified(), torch.randn(2, 4), target=Picky(), pipeline=[Clamp()])
        settings = json.loads((folder / "reproducer.json").read_text())
        assert (settings["target"], settings["pipeline"]) == ("picky", "")
        program = torch.export.load(folder / "model.pt2")
        assert any(node.target is aten.clamp_min.default for node in program.graph.nodes)

    def test_nothing_is_written_where_nothing_fails(self, tmp_path: Path) -> None:
        with graphopt.debugging(reproducer=tmp_path / "failure"):
            graphopt.optimize(Rectified(), torch.randn(2, 4), budget=graphopt.Budget(flops=0.5))
        assert not (tmp_path / "failure").exists()

    def test_a_folder_that_cannot_be_written_hides_no_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with graphopt.debugging(reproducer=tmp_path / "file"), pytest.raises(graphopt.BudgetError) as raised:
            graphopt.optimize(Rectified(), torch.randn(2, 4), budget=graphopt.Budget(flops=1e-4))
        assert raised.value.__notes__[-1].startswith("no reproducer could be written: cannot write to")

    @pytest.mark.parametrize("content", ["", "{}", '{"format": "x", "version": 1}', "[1]"])
    def test_what_is_no_reproducer_is_refused(self, tmp_path: Path, content: str) -> None:
        if content:
            (tmp_path / "reproducer.json").write_text(content)
        with pytest.raises(graphopt.PipelineError, match="holds no reproducer"):
            Reproducer.load(tmp_path)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2, 3),),
        ((torch.ones(2, 3), torch.zeros(1)), torch.tensor([1])),
        {"x": torch.ones(2), "a.b": torch.zeros(1)},
        ({"x": torch.ones(2)}, torch.tensor([0, 1])),
    ],
    ids=["args", "args and labels", "kwargs", "kwargs and labels"],
)
def test_batches_are_saved_and_read_back(batch: Any) -> None:
    from graphopt.debugging import _flat, _nested

    graph = capture(nn.Linear(3, 2), torch.ones(2, 3))
    tensors, left_out = _flat([batch, batch], graph)
    assert not left_out
    again, _ = _flat(_nested(tensors), graph)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
