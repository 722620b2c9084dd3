"""Check that the models of the zoo are what a test of graphopt needs: random throughout, sensible, exportable."""

import subprocess
import sys
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo import ZOO, Arguments, calibrate, cast, in_float64, quiet, randomise

# What a model holds but never uses, so that no gradient can reach it: timm and transformers share these modules with
# other heads and tasks.
UNUSED = {
    "dinov2": {"dinov2.embeddings.mask_token"},
    "mask2former": {
        "model.pixel_level_module.encoder.swin.layernorm.weight",
        "model.pixel_level_module.encoder.swin.layernorm.bias",
    },
    # The first decoder layer attends from queries that are all zero, so its values are its bias.
    "detr": {"model.decoder.layers.0.self_attn.v_proj.weight"},
}


def call(module: nn.Module, inputs: Arguments) -> dict[int, Tensor]:
    """Run a model and number its floating-point output tensors."""
    with quiet():
        leaves = pytree.tree_leaves(module(*inputs.args, **inputs.kwargs))
    return {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_the_zoo_holds_sixty_models_under_their_own_names() -> None:
    assert len(ZOO) == 60
    assert all(name == model.name for name, model in ZOO.items())
    assert {model.family for model in ZOO.values()} == {
        "convnet",
        "vision-transformer",
        "language",
        "multimodal",
        "dense",
    }


def test_importing_the_zoo_imports_no_model_library() -> None:
    libraries = ("timm", "torchvision", "transformers", "diffusers")
    code = f"import sys, tests.zoo; print([name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_inputs_depend_on_their_seed_and_batch_alone() -> None:
    for name, model in ZOO.items():
        first, again, other = (pytree.tree_leaves(model.inputs(seed=seed)) for seed in (1, 1, 2))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True)), name
        assert any(not torch.equal(x, y) for x, y in zip(first, other, strict=True)), name
        for batch in (1, 3):
            assert all(len(leaf) == batch for leaf in pytree.tree_leaves(model.inputs(batch=batch))), name


def test_randomise_depends_on_its_seed_alone() -> None:
    def states(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)).to(dtype)
        randomise(module, seed)
        return {name: value.double() for name, value in module.state_dict().items()}

    first = states(3, torch.float32)
    for name, value in states(3, torch.float64).items():
        assert torch.equal(value, first[name])
    other = states(4, torch.float32)
    assert all(not torch.equal(other[name], value) for name, value in first.items() if "num_batches" not in name)


def test_randomise_reaches_what_initialisation_leaves_trivial() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.gamma = nn.Parameter(1e-6 * torch.ones(6))
            self.gain = nn.Parameter(torch.zeros(()))
            self.pos_embed = nn.Parameter(torch.zeros(1, 4, 6))

    module = Scaled()
    randomise(module, 0)
    assert 0.5 <= module.gain.item() <= 1.5
    for values in (module.gamma, module.norm.weight, module.norm.running_var):
        assert isinstance(values, Tensor)
        assert values.min() >= 0.5
        assert values.max() <= 1.5
        assert values.std() > 0.1
    for values in (module.pos_embed, module.norm.bias, module.norm.running_mean):
        assert isinstance(values, Tensor)
        assert 0.05 < values.std() < 1


def test_calibrate_holds_the_signal_of_a_deep_network() -> None:
    layers = [layer for _ in range(60) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))]
    module = nn.Sequential(*layers).eval()
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        randomise(module, 0)
        for layer in layers[::2]:
            layer.weight.mul_(3)
        assert module(x).std() > 1e6
        calibrate(module, (x,), {}, 0)
        assert 0.1 < module(x).std() < 10


@pytest.fixture(scope="module", params=ZOO)
def built(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """Build each model once for all the tests that share it."""
    return request.param, ZOO[request.param].build()


@pytest.fixture
def model(built: tuple[str, nn.Module]) -> tuple[str, nn.Module]:
    """Hand out a model that remembers nothing of the calls before: some keep what they computed in eval mode."""
    built[1].float().train().eval().zero_grad()
    return built


@pytest.mark.zoo
def test_builds_the_same_model_every_time(model: tuple[str, nn.Module]) -> None:
    name, module = model
    first, again = module.state_dict(), ZOO[name].build()
    assert not again.training
    assert first.keys() == again.state_dict().keys()
    assert all(torch.equal(value, first[key]) for key, value in again.state_dict().items())


@pytest.mark.zoo
def test_every_parameter_shows_in_the_outputs(model: tuple[str, nn.Module]) -> None:
    name, module = model
    constant = [key for key, value in module.named_parameters() if value.numel() > 1 and value.std() == 0]
    assert not constant
    generator = torch.Generator().manual_seed(3)
    loss = torch.zeros(())
    for value in call(module.requires_grad_(True), ZOO[name].inputs()).values():
        loss = loss + (value * torch.randn(value.shape, generator=generator)).sum()
    torch.autograd.backward(loss)
    silent = {key for key, value in module.named_parameters() if value.grad is None or not value.grad.any()}
    assert silent == UNUSED.get(name, set())


@pytest.mark.zoo
def test_outputs_have_a_sensible_size_and_depend_on_the_input(model: tuple[str, nn.Module]) -> None:
    name, module = model
    with torch.no_grad():
        single, changed = call(module, ZOO[name].inputs()), call(module, ZOO[name].inputs(seed=2))
        with in_float64():
            double = call(module.double(), cast(ZOO[name].inputs(), torch.float64))
    assert single
    for i, value in single.items():
        assert value.isfinite().all(), f"output {i}"
        assert 1e-3 < value.std() < 1e3, f"output {i}"
        assert error(changed[i], value) > 1e-3, f"output {i}"
        assert double[i].dtype is torch.float64, f"output {i}"
        assert error(value.double(), double[i]) < 2e-5, f"output {i}"


@pytest.mark.slow
@pytest.mark.zoo
def test_exports_with_a_dynamic_batch(model: tuple[str, nn.Module]) -> None:
    name, module = model
    inputs = ZOO[name].inputs()
    bound = signature(module.forward).bind(*inputs.args, **inputs.kwargs).arguments
    dynamic: dict[str, Any] = pytree.tree_map(lambda _: {0: torch.export.Dim.AUTO}, dict(bound))
    with quiet(), torch.no_grad():
        program = torch.export.export(module, *inputs, dynamic_shapes=dynamic, strict=False)
        exported = program.module()
        for batch in (1, 3):
            other = ZOO[name].inputs(batch=batch, seed=batch)
            expected = call(module, other)
            for i, value in call(exported, other).items():
                assert error(value, expected[i]) < 1e-5, f"output {i}"
