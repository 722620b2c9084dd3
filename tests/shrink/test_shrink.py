"""Modules in their own class: the copy computes what the pruned graph does, or the line that cannot follow is named."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.axes.algebra import Atom, Indices
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.errors import CaptureError, PipelineError, PlanError
from graphopt.plan import Plan
from graphopt.rewrite import rewrite
from graphopt.shrink.module import shrink
from tests.shrink import modules
from tests.shrink.modules import (
    Attention,
    Cached,
    Convolutions,
    Crossed,
    Fused,
    Literal,
    Parts,
    Stack,
    Switched,
    Tied,
    Trap,
)

Inputs = tuple[Tensor, ...]

FOLLOWED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (Convolutions, (2, 3, 6, 6)),
    "attention": (Attention, (2, 5, 20)),
    "switched": (Switched, (2, 5, 20)),
    "stack": (Stack, (2, 5, 20)),
    "parts": (Parts, (2, 24)),
    "cached": (Cached, (3, 6)),
}


@dataclass
class Case:
    """A module, the typing of its graph, and inputs."""

    module: nn.Module
    inputs: Inputs
    typing: Typing


def case(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Case:
    torch.manual_seed(0)
    module = make().double().eval()
    if isinstance(module, Parts):
        module.table = module.table.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    inputs = tuple(torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    if isinstance(module, Tied):
        inputs = (torch.arange(11).reshape(1, 11),)
    return Case(module, inputs, infer(capture(module, inputs)))


def drawn(typing: Typing, seed: int, least: int = 1) -> dict[Atom, Indices]:
    """Keep another number of other indices of every group."""
    rng = np.random.default_rng(seed)
    return {
        g.atom: np.sort(rng.permutation(g.size)[: rng.integers(min(least, g.size - 1), g.size)]) for g in typing.groups
    }


def apart(found: Any, expected: Any) -> float:
    with torch.no_grad():
        return float((found - expected).abs().max())


# -- what is given back --


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("seed", range(2))
def test_the_own_class_computes_what_the_pruned_graph_does(name: str, seed: int) -> None:
    each = case(*FOLLOWED[name])
    keep = drawn(each.typing, seed)
    plan = Plan.of(each.typing, keep)
    small = plan.apply(each.module, each.inputs)
    assert type(small) is type(each.module)
    expected = rewrite(each.typing, keep).run(*each.inputs)
    assert apart(small(*each.inputs), expected) < 1e-12
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in each.module.parameters())


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_the_plan_makes_of_the_state_dict_loads(name: str) -> None:
    each = case(*FOLLOWED[name])
    plan = Plan.of(each.typing, drawn(each.typing, 0))
    small = plan.apply(each.module, each.inputs)
    state = plan.apply(each.module.state_dict(), strict=False)
    assert small.state_dict().keys() == each.module.state_dict().keys()
    before = small(*each.inputs)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    small.load_state_dict(state)
    small.train().eval()
    assert torch.equal(small(*each.inputs), before)


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_module_is_not_touched_and_the_copy_trains(name: str) -> None:
    each = case(*FOLLOWED[name])
    state = {n: t.clone() for n, t in each.module.state_dict().items()}
    before = each.module(*each.inputs)
    attributes = {path: dict(vars(part)) for path, part in each.module.named_modules()}
    small = Plan.of(each.typing, drawn(each.typing, 1, least=2)).apply(each.module, each.inputs)
    assert all(torch.equal(t, state[n]) for n, t in each.module.state_dict().items())
    assert torch.equal(each.module(*each.inputs), before)
    for path, part in each.module.named_modules():
        assert vars(part).keys() == attributes[path].keys()
        assert all(vars(part)[name] is value for name, value in attributes[path].items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in small.modules())

    small.train()
    optimiser = torch.optim.SGD(small.parameters(), lr=1e-6)
    first = small(*each.inputs).square().sum()
    first.backward()
    assert all(p.grad is not None for p in small.parameters())
    optimiser.step()
    assert small(*each.inputs).square().sum() < first


@settings(max_examples=6)
@given(data=st.data())
def test_any_index_sets_of_a_convolutional_network_are_followed(data: st.DataObject) -> None:
    each = case(*FOLLOWED["convolutions"])
    keep = {
        g.atom: np.array(sorted(data.draw(st.sets(st.integers(0, g.size - 1), min_size=1))), dtype=np.int64)
        for g in each.typing.groups
    }
    small = Plan.of(each.typing, keep).apply(each.module, each.inputs)
    assert apart(small(*each.inputs), rewrite(each.typing, keep).run(*each.inputs)) < 1e-12


def test_the_attributes_of_layers_are_those_of_their_tensors() -> None:
    each = case(*FOLLOWED["convolutions"])
    keep = drawn(each.typing, 3)
    small = Plan.of(each.typing, keep).apply(each.module, each.inputs)
    assert isinstance(small, Convolutions)
    for layer in (small.stem, small.grouped, small.depthwise, small.mix):
        assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
    assert small.up.weight.shape[:2] == (small.up.in_channels, small.up.out_channels // small.up.groups)
    assert small.depthwise.groups == small.depthwise.in_channels
    assert small.norm.num_features == small.stem.out_channels
    assert (small.head.in_features, small.head.out_features) == (small.up.out_channels, 5)
    assert small.scale.num_channels == small.mix.out_channels
    assert small.scale.num_channels % small.scale.num_groups == 0
    assert small.bend.num_parameters == small.grouped.out_channels


def test_heads_and_head_dims_follow_and_the_scale_stays() -> None:
    each = case(*FOLLOWED["attention"])
    heads, dims = (next(g for g in each.typing.groups if g.size == n) for n in (4, 6))
    keep = {heads.atom: np.array([0, 2, 3]), dims.atom: np.array([1, 5])}
    small = Plan.of(each.typing, keep).apply(each.module, each.inputs)
    assert isinstance(small, Attention)
    assert (small.num_heads, small.head_dim, small.inner) == (3, 2, 6)
    assert small.scale == 6**-0.5
    assert small.fused is True


def test_a_fused_attention_is_switched_off_only_where_its_scale_would_change() -> None:
    each = case(*FOLLOWED["switched"])
    heads, dims = (next(g for g in each.typing.groups if g.size == n) for n in (4, 6))
    fewer = Plan.of(each.typing, {heads.atom: np.array([0, 2])}).apply(each.module, each.inputs)
    assert isinstance(fewer, Switched)
    assert (fewer.fused, fewer.num_heads, fewer.head_dim) == (True, 2, 6)
    narrow = Plan.of(each.typing, {dims.atom: np.array([0, 2])}).apply(each.module, each.inputs)
    assert isinstance(narrow, Switched)
    assert (narrow.fused, narrow.num_heads, narrow.head_dim) == (False, 4, 2)


def test_layers_that_share_a_configuration_get_their_own_where_they_differ() -> None:
    each = case(*FOLLOWED["stack"])
    keep = {g.atom: np.arange(2 + (".1." in g.name)) for g in each.typing.groups if g.size == 6}
    assert len(keep) == 2
    small = Plan.of(each.typing, keep).apply(each.module, each.inputs)
    assert isinstance(small, Stack)
    assert isinstance(each.module, Stack)
    assert [layer.config.head_dim for layer in small.layers] == [2, 3]  # type: ignore[union-attr]
    assert each.module.config.head_dim == 6
    assert small.config.lengths == {"window": 6}


def test_numbers_that_only_happen_to_equal_a_size_stay() -> None:
    each = case(*FOLLOWED["parts"])
    keep = {g.atom: np.arange(3) for g in each.typing.groups}
    assert {g.size for g in each.typing.groups} >= {4, 8}
    small = Plan.of(each.typing, keep).apply(each.module, each.inputs)
    assert isinstance(small, Parts)
    assert (small.sizes, small.window) == ((3, 3), 4)
    assert small.options == {"gate": [3], "name": "parts"}
    assert small.plain.normalized_shape == (3,)
    assert small.table.shape == (3,)


def test_shared_parameters_stay_shared() -> None:
    each = case(Tied)
    keep = drawn(each.typing, 0)
    small = Plan.of(each.typing, keep).apply(each.module, each.inputs)
    assert isinstance(small, Tied)
    assert small.head.weight is small.embed.weight
    assert small.embed.embedding_dim == small.head.in_features == small.embed.weight.shape[1] < 8
    assert apart(small(*each.inputs), rewrite(each.typing, keep).run(*each.inputs)) < 1e-12


def test_what_a_module_computed_before_is_forgotten() -> None:
    each = case(*FOLLOWED["cached"])
    each.module(*each.inputs)
    assert isinstance(each.module, Cached)
    assert each.module.cache
    small = Plan.of(each.typing, drawn(each.typing, 0)).apply(each.module, each.inputs)
    assert isinstance(small, Cached)
    assert not small.cache
    assert each.module.cache


def test_modes_and_hooks_are_those_of_the_module() -> None:
    each = case(*FOLLOWED["convolutions"])
    assert isinstance(each.module, Convolutions)
    called: list[str] = []
    each.module.head.register_forward_hook(lambda *_: called.append("head"))
    each.module.get_parameter("stem.bias").requires_grad = False
    each.module.train()
    each.module.norm.eval()
    small = Plan.of(each.typing, drawn(each.typing, 0)).apply(each.module, each.inputs)
    assert [part.training for part in small.modules()] == [part.training for part in each.module.modules()]
    assert not small.norm.training
    assert not small.stem.bias.requires_grad  # type: ignore[union-attr]
    called.clear()
    small(*each.inputs)
    assert called == ["head"]


def test_torchs_attention_follows_the_width_of_keys_and_values() -> None:
    each = case(Crossed, (2, 4, 16), (2, 6, 5))
    width = next(g for g in each.typing.groups if g.size == 12)
    keep = {width.atom: np.array([0, 3, 7])}
    small = Plan.of(each.typing, keep).apply(each.module, each.inputs)
    assert isinstance(small, Crossed)
    assert (small.attention.kdim, small.attention.vdim, small.attention.embed_dim) == (3, 3, 16)
    assert apart(small(*each.inputs), rewrite(each.typing, keep).run(*each.inputs)) < 1e-12


# -- what is refused --


def line(name: str) -> int:
    """Return the number of the line that is to blame in a class of ``modules``."""
    lines = Path(modules.__file__).read_text().splitlines()
    start = lines.index(next(each for each in lines if each.startswith(f"class {name}(")))
    return start + 1 + next(i for i, each in enumerate(lines[start:]) if "the line that is to blame" in each)


def refused(each: Case, keep: dict[Atom, Indices]) -> PlanError:
    with pytest.raises(PlanError) as caught:
        Plan.of(each.typing, keep).apply(each.module, each.inputs)
    return caught.value


def channels(each: Case) -> Atom:
    return next(g.atom for g in each.typing.groups if g.size == 8)


def test_a_size_in_the_code_is_named_with_file_and_line() -> None:
    each = case(Literal, (2, 3, 6, 6))
    error = refused(each, {channels(each): np.array([0, 2, 3, 4, 6])})
    assert str(error) == (
        "Literal cannot be given back in its own class: its own forward (Literal) has a size written into its code at "
        f"{modules.__file__}:{line('Literal')} "
        "(`logits: Tensor = self.head(pooled.reshape(-1, 8))  # the line that is to blame`): "
        "reshape with sizes (-1, 8), and shape (2, 5) is wanted (shape '[-1, 8]' is invalid for input of size 10). "
        "Use result.module, which computes it, or keep the class by keeping whole conv.weight[0] (constraints.exclude)"
    )
    assert error.module == ""
    assert "pooled.reshape(-1, 8)" in error.code
    assert error.exclude == ("conv.weight[0]",)


def test_a_literal_that_fits_by_chance_is_noticed() -> None:
    each = case(Literal, (2, 3, 6, 6))
    error = refused(each, {channels(each): np.array([0, 2, 3, 4])})
    assert "reshape gives shape (1, 8), and shape (2, 4) is wanted" in str(error)


@pytest.mark.parametrize(("make", "shape"), [(Trap, (3, 5)), (Fused, (2, 5, 20))])
def test_a_number_that_is_derived_from_a_size_is_refused(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    each = case(make, shape)
    keep = {g.atom: np.arange(g.size - 2) for g in each.typing.groups if g.size in (16, 6)}
    error = refused(each, keep)
    assert f"{modules.__file__}:{line(make.__name__)}" in str(error)
    assert "gives other values than in the pruned graph: it derives a number, such as an attention's scale" in str(
        error
    )


def test_excluding_what_a_refusal_names_keeps_the_class() -> None:
    each = case(Literal, (2, 3, 6, 6))
    budget = graphopt.Budget(flops=0.5)
    text = "prune-channels"
    result = graphopt.optimize(each.module, each.inputs, budget=budget, pipeline=text)
    with pytest.raises(PlanError) as caught:
        result.plan.apply(each.module)
    exclude = ", ".join(f'"{pattern}"' for pattern in caught.value.exclude)
    text = f"prune-channels{{constraints.exclude=[{exclude}]}}"
    result = graphopt.optimize(each.module, each.inputs, budget=budget, pipeline=text)
    small = result.plan.apply(each.module)
    assert small.get_parameter("stem.weight").shape[0] < 12
    assert apart(small(*each.inputs), result.module(*each.inputs)) < 1e-12


def test_the_code_of_torch_is_named_like_any_other() -> None:
    each = case(Crossed, (2, 4, 16), (2, 6, 5))
    inner = [g for g in each.typing.groups if g.size != 12]
    error = refused(each, {inner[0].atom: np.arange(inner[0].size - 1)})
    assert error.module == "attention"
    assert "MultiheadAttention" in str(error)


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    each = case(*FOLLOWED["attention"])
    each.module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(PlanError, match=r"Attention cannot be copied.*deepcopy says TypeError: cannot pickle"):
        Plan.of(each.typing, drawn(each.typing, 0)).apply(each.module, each.inputs)


def test_a_module_without_values_is_refused() -> None:
    each = case(*FOLLOWED["attention"])
    plan = Plan.of(each.typing, drawn(each.typing, 0))
    with pytest.raises(PlanError, match=r"cannot be run, for qkv.weight has no values: apply the plan to its files"):
        plan.apply(each.module.to("meta"), each.inputs)


def test_another_models_plan_is_refused() -> None:
    each, other = case(*FOLLOWED["attention"]), case(*FOLLOWED["convolutions"])
    plan = Plan.of(each.typing, drawn(each.typing, 0))
    with pytest.raises(PlanError, match=r"the plan shrinks proj.weight, and the module has no such parameter"):
        plan.apply(other.module, other.inputs)
    wider = case(lambda: Attention(width=20, heads=5), (2, 5, 20))
    with pytest.raises(PlanError, match="in a way that the module's own code cannot compute with"):
        plan.apply(wider.module, wider.inputs)


def test_a_cut_that_no_code_can_follow_is_refused() -> None:
    each = case(*FOLLOWED["attention"])
    kept = {"qkv.weight": {0: np.arange(71)}, "qkv.bias": {0: np.arange(71)}}
    with pytest.raises(PlanError, match="keeps 71 of the 72 indices in dimension 0 of qkv"):
        shrink(each.module, kept, each.inputs)


def test_a_graph_has_no_class_of_its_own() -> None:
    each = case(*FOLLOWED["attention"])
    with pytest.raises(PlanError, match="is no class of your own, but a graph"):
        Plan.of(each.typing, {}).apply(each.typing.graph.module, each.inputs)


def test_a_state_dict_takes_no_inputs() -> None:
    with pytest.raises(PipelineError, match="are for modules"):
        Plan().apply({}, (torch.zeros(1),))  # type: ignore[call-overload]


# -- what the plan remembers of its run --


@pytest.fixture
def trained() -> tuple[Case, Any]:
    each = case(*FOLLOWED["convolutions"])
    result = graphopt.optimize(each.module, each.inputs, budget=graphopt.Budget(flops=0.5), pipeline="prune-channels")
    return each, result


def test_the_plan_of_a_run_needs_nothing_else(trained: tuple[Case, Any]) -> None:
    each, result = trained
    small = result.plan.apply(each.module)
    assert apart(small(*each.inputs), result.module(*each.inputs)) < 1e-12


def test_a_loaded_plan_needs_inputs(trained: tuple[Case, Any], tmp_path: Path) -> None:
    each, result = trained
    result.plan.save(tmp_path / "plan.safetensors")
    plan = Plan.load(tmp_path / "plan.safetensors")
    with pytest.raises(CaptureError, match="pass example_inputs"):
        plan.apply(each.module)
    small = plan.apply(each.module, each.inputs)
    assert apart(small(*each.inputs), result.module(*each.inputs)) < 1e-12


def test_the_values_are_those_of_the_smaller_model_as_it_is_now(trained: tuple[Case, Any]) -> None:
    each, result = trained
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.add_(0.1)
    small = result.plan.apply(each.module)
    assert apart(small(*each.inputs), result.module(*each.inputs)) < 1e-12
    result.module.train()
    assert result.plan.apply(each.module).training is False
    assert result.module.training


def test_a_model_that_was_written_to_keeps_its_own_values(trained: tuple[Case, Any]) -> None:
    each, result = trained
    with torch.no_grad():
        each.module.get_parameter("head.bias").add_(1.0)
    small = result.plan.apply(each.module)
    assert torch.equal(small.head.bias, each.module.get_parameter("head.bias"))
    assert apart(small(*each.inputs), result.module(*each.inputs) + 1.0) < 1e-12
    taken = result.plan.apply(each.module, reference=result.module)
    assert apart(taken(*each.inputs), result.module(*each.inputs)) < 1e-12


def test_another_model_of_the_class_keeps_its_own_values(trained: tuple[Case, Any]) -> None:
    each, result = trained
    other = copy.deepcopy(each.module)
    with torch.no_grad():
        other.get_parameter("head.bias").add_(1.0)
    assert apart(result.plan.apply(other)(*each.inputs), result.module(*each.inputs) + 1.0) < 1e-12


def test_a_reference_that_computes_something_else_is_noticed(trained: tuple[Case, Any]) -> None:
    each, result = trained
    with torch.no_grad():
        result.module.get_parameter("head.bias").add_(1.0)
    del result.module.norm.num_batches_tracked  # it can no longer be taken over
    with pytest.raises(PlanError, match="does not compute what"):
        result.plan.apply(each.module, reference=result.module)


def test_a_plan_keeps_no_model_alive_and_leaves_its_run_behind() -> None:
    each = case(*FOLLOWED["convolutions"])
    budget = graphopt.Budget(flops=0.5)
    plan = graphopt.optimize(each.module, each.inputs, budget=budget, pipeline="prune-channels").plan
    gc.collect()
    assert plan.origin is not None
    assert plan.origin.result() is None
    assert torch.equal(plan.apply(each.module).get_parameter("head.bias"), each.module.get_parameter("head.bias"))
    sent = pickle.loads(pickle.dumps(plan))
    assert sent == plan
    assert sent.origin is None


class Plain(nn.Module):
    """Convolutions without biases, a batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.second, self.head = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        scores: Tensor = self.head(torch.relu(self.second(x)).mean((2, 3)))
        return scores


def test_what_a_refit_made_comes_along_with_its_biases() -> None:
    torch.manual_seed(0)
    model, images = Plain().eval(), torch.randn(16, 3, 8, 8)
    budget = graphopt.Budget(flops=0.5)
    result = graphopt.optimize(
        model, images, budget=budget, pipeline="prune-channels,ridge-refit", calibration=[images]
    )
    assert "second.bias" in result.module.state_dict()
    small = result.plan.apply(model)
    assert type(small) is Plain
    assert small.second.bias is not None
    assert model.second.bias is None
    torch.testing.assert_close(small(images), result.module(images))


def test_values_without_a_place_in_the_class_are_refused() -> None:
    torch.manual_seed(0)
    model, images = Plain().eval(), torch.randn(16, 3, 8, 8)
    passes = "prune-channels,ridge-refit,fold-batch-norm"
    result = graphopt.optimize(model, images, budget=graphopt.Budget(flops=0.5), pipeline=passes, calibration=[images])
    with pytest.raises(graphopt.PlanError, match="gave that model values that this class has no place for"):
        result.plan.apply(model)


class Halves(nn.Module):
    """A gate written for halves of equal size, beside a layer that anything can be taken from."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(6, 32), nn.Linear(16, 6)
        self.up, self.down = nn.Linear(6, 64), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.gate(x)[:, :16], self.gate(x)[:, 16:]
        hidden: Tensor = self.down(torch.relu(self.up(self.out(value * torch.sigmoid(gate)))))
        return hidden


def test_what_the_class_cannot_follow_is_kept_whole_on_demand() -> None:
    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(5, 6)
    budget = graphopt.Budget(params=0.6)
    with pytest.raises(PlanError):
        graphopt.optimize(model, x, budget=budget).plan.apply(model)
    seen: list[int] = []
    result = graphopt.optimize(model, x, budget=budget, own_class=True, finetune=lambda m: seen.append(1))
    assert type(result.model) is Halves
    assert seen == [1]
    assert result.report.after.params <= 0.6 * result.report.before.params
    assert result.model.gate.weight.shape == model.gate.weight.shape
    torch.testing.assert_close(result.model(x), result.module(x))
    assert "constraints.exclude" in result.report.pipeline
    with pytest.raises(graphopt.BudgetError) as raised:
        graphopt.optimize(model, x, budget=graphopt.Budget(params=0.2), own_class=True)
    assert any("own_class keeps whole gate.weight[0]" in note for note in raised.value.__notes__)


def test_own_class_is_for_modules() -> None:
    graph = capture(Halves().eval(), torch.randn(5, 6))
    with pytest.raises(PipelineError, match="own_class is for modules with code of their own"):
        graphopt.optimize(graph, budget=graphopt.Budget(params=0.6), own_class=True)
