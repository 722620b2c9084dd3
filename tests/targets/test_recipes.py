"""The passes that run by default: that they exist, what they leave trainable, and that they leave nothing undone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.graph import Graph
from graphopt.pipeline import Pipeline, registered
from graphopt.targets import TARGETS, Lowered, Target
from graphopt.targets.recipes import deployment, training

HALF = graphopt.Budget(flops=0.5)
aten = torch.ops.aten


class Files(Target):
    """Write nothing: what the default passes leave is looked at."""

    name = "files"

    def lower(self, graph: Graph, directory: object = None) -> Lowered:
        return Lowered()


class Block(nn.Module):
    """Convolutions with batch norms, two branches that are summed, dropout, and a packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.wide_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.point, self.point_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.packed, self.head = nn.Dropout(0.2), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.wide_norm(self.wide(x)) + self.point_norm(self.point(x)))
        q, k, v = self.packed(self.drop(x.mean((2, 3)))).chunk(3, -1)
        scores: Tensor = self.head(torch.sigmoid((q * k).sum(-1, keepdim=True)) * v)
        return scores


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    model = Block()
    with torch.no_grad():
        for norm in (model.norm, model.wide_norm, model.point_norm):
            norm.running_mean.normal_()  # type: ignore[union-attr]  # it has one
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    return model.eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def operators(result: object) -> list[object]:
    module = result.module  # type: ignore[attr-defined]
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("budget", [None, HALF])
@pytest.mark.parametrize("calibration", [False, True])
@pytest.mark.parametrize("recipe", [training, deployment])
def test_every_pass_exists_and_prunes_only_for_a_budget(recipe: object, budget: object, calibration: bool) -> None:
    passes = Pipeline.parse(recipe(budget, calibration))  # type: ignore[operator]
    names = [each.name for each in passes]
    assert set(names) <= registered().keys()
    assert ("prune-channels" in names) == (budget is not None)
    assert ("ridge-refit" in names) == (budget is not None and calibration)


@pytest.mark.parametrize("name", TARGETS)
def test_targets_have_a_recipe(name: str) -> None:
    found = Pipeline.parse(TARGETS[name]().pipeline(HALF))
    assert str(found) in (training(HALF, False), deployment(HALF, False))


@pytest.mark.parametrize("budget", [None, HALF])
def test_what_is_trained_keeps_its_names_and_its_norms(model: Block, budget: graphopt.Budget | None) -> None:
    result = graphopt.optimize(model, images(), budget=budget)
    assert result.module.state_dict().keys() == model.state_dict().keys()
    assert operators(result).count(aten.batch_norm.default) == 3
    assert aten.dropout.default in operators(result)
    result.module.train()
    assert not torch.equal(result.module(images()), result.module(images()))


@pytest.mark.parametrize("budget", [None, HALF])
def test_what_is_deployed_has_nothing_left_to_compute_beforehand(model: Block, budget: graphopt.Budget | None) -> None:
    result = graphopt.optimize(model, images(), budget=budget, target=Files())
    left = operators(result)
    assert aten.batch_norm.default not in left
    assert aten.dropout.default not in left
    assert left.count(aten.conv2d.default) == 2
    assert left.count(aten.linear.default) == 2
    if budget is None:
        assert result.report.after.flops < result.report.before.flops
        torch.testing.assert_close(result.module(images(5)), model(images(5)), rtol=1e-4, atol=1e-5)


def test_the_plan_speaks_of_the_caller_s_model(model: Block) -> None:
    result = graphopt.optimize(model, images(), budget=graphopt.Budget(params=0.3), target=Files())
    small = result.plan.apply(model.state_dict())
    assert result.plan.keep.keys() <= model.state_dict().keys()
    widths = {small[f"{name}.{part}"].shape[0] for name in ("wide_norm", "point_norm") for part in ("weight", "bias")}
    assert widths == {small["wide.weight"].shape[0]} == {small["packed.weight"].shape[1]}
    assert small["packed.weight"].shape[0] == small["packed.bias"].shape[0] < 24


def test_training_takes_the_place_of_the_refit(model: Block) -> None:
    data = [(images(),)]
    names = [r.name for r in graphopt.optimize(model, images(), budget=HALF, calibration=data).report.passes]
    assert "ridge-refit" in names
    trained = graphopt.optimize(model, images(), budget=HALF, calibration=data, finetune=lambda module: None)
    names = [r.name for r in trained.report.passes]
    assert "ridge-refit" not in names
    assert "fine-tune" in names
