"""Check the public functions end to end, and that every error a user can meet says what to do."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.axes.infer import Operator
from graphopt.capture import capture
from graphopt.dialects import aten as dialect
from graphopt.graph import Graph
from graphopt.optimize import Result
from graphopt.report import Inspection
from graphopt.targets import Lowered, Target
from tests.small_models import Convolutions, attention, convolutions, images, tokens

HALF = graphopt.Budget(flops=0.5)


@pytest.fixture(scope="module")
def model() -> Convolutions:
    return convolutions()


@pytest.fixture(scope="module")
def result(model: Convolutions) -> Result:
    """Halve the model once; tests look at different sides of it."""
    return graphopt.optimize(model, images(), budget=HALF)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# -- the contract ---------------------------------------------------------------------------------------------------


def test_signature() -> None:
    parameters = inspect.signature(graphopt.optimize).parameters
    assert [*parameters] == [
        "model",
        "example_inputs",
        "target",
        "budget",
        "pipeline",
        "calibration",
        "loss",
        "evaluate",
        "finetune",
        "steps",
        "own_class",
        "checkpoint",
        "output",
        "verify",
        "seed",
    ]
    keyword_only = [name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == [*parameters][2:]
    defaults = {name: p.default for name, p in parameters.items() if p.default not in (None, inspect.Parameter.empty)}
    assert defaults == {"target": "torch", "steps": 1, "own_class": False, "verify": "each", "seed": 0}


class TestResult:
    def test_the_budget_is_met(self, result: Result) -> None:
        report = result.report
        assert 0.4 < report.after.flops / report.before.flops <= 0.5
        (line,) = report.budget
        assert (line.dimension, line.met) == ("flops", True)
        assert (line.target, line.achieved) == (report.before.flops / 2, report.after.flops)

    def test_names_are_kept_and_shapes_follow_the_plan(self, model: nn.Module, result: Result) -> None:
        before, after = model.state_dict(), result.module.state_dict()
        assert [*after] == [*before]
        for name, tensor in before.items():
            kept = result.plan.keep.get(name, {})
            expected = tensor
            for dim, indices in kept.items():
                assert indices.dtype == np.int64
                assert (np.diff(indices) > 0).all()
                expected = expected.index_select(dim, torch.from_numpy(indices))
            assert torch.equal(after[name], expected)
        assert "stem.weight" in result.plan.keep

    def test_the_batch_stays_dynamic(self, result: Result) -> None:
        assert result.module(images(5)).shape == (5, 5)

    def test_it_trains(self, result: Result) -> None:
        module = copy.deepcopy(result.module).train()
        mean = weights(module)["norm.running_mean"]
        module(images(4)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        assert not torch.equal(mean, module.state_dict()["norm.running_mean"])
        assert not torch.equal(module(images(4)), module(images(4)))
        module.eval()
        assert torch.equal(module(images(4)), module(images(4)))

    def test_it_was_verified(self, result: Result) -> None:
        record = result.report.passes[-1]
        assert record.name == "prune-channels"
        assert record.comparisons
        assert all(c.passed and c.relative < 1e-4 for c in record.comparisons)

    def test_printing_it_prints_the_report(self, result: Result) -> None:
        assert str(result) == str(result.report)
        assert "Convolutions → torch" in str(result)
        assert result._repr_html_() == result.report._repr_html_()

    def test_nothing_is_written_unasked(self, result: Result) -> None:
        assert result.artifacts == {}
        assert result.onnx is None


def test_the_result_can_be_optimized_again(result: Result) -> None:
    again = graphopt.optimize(result.module, budget=HALF)
    assert again.report.before.flops == result.report.after.flops
    assert again.report.after.flops <= result.report.after.flops / 2
    whole = result.plan.then(again.plan)
    assert len(whole.keep["stem.weight"][0]) == again.module.get_parameter("stem.weight").shape[0]


def test_the_model_is_not_touched(model: nn.Module) -> None:
    before, training, attributes = weights(model), model.training, dict(vars(model))
    graphopt.optimize(model, images(), budget=HALF, evaluate=lambda module: float(module.double().training))
    assert model.training == training
    assert vars(model) == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_model(training: bool) -> None:
    assert graphopt.optimize(convolutions().train(training), images(), budget=HALF).module.training == training


def test_random_numbers_are_left_as_they_were(model: nn.Module) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    graphopt.optimize(model, images(), budget=HALF, pipeline="prune-channels{importance=random}")
    assert draw() == expected


def test_the_same_arguments_give_the_same_result(model: nn.Module) -> None:
    def plan(seed: int) -> graphopt.Plan:
        torch.rand(())  # another state of the generator makes no difference
        pipeline = "prune-channels{importance=random}"
        return graphopt.optimize(model, images(), budget=HALF, pipeline=pipeline, seed=seed).plan

    assert plan(0) == plan(0)
    assert plan(0) != plan(1)


def test_evaluate_runs_before_and_after_on_copies(model: nn.Module) -> None:
    seen: list[nn.Module] = []

    def parameters(module: nn.Module) -> float:
        assert not module.training
        seen.append(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        return float(sum(p.numel() for p in module.parameters()))

    result = graphopt.optimize(model, images(), budget=HALF, evaluate=parameters)
    assert result.report.score is not None
    assert [*result.report.score] == [result.report.before.params, result.report.after.params]
    assert len(seen) == 2
    assert all(p.abs().sum() > 0 for p in result.module.parameters())


def test_calibration_is_what_is_verified_on(model: nn.Module) -> None:
    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for size in (3, 4):
            yield images(size), torch.zeros(size, dtype=torch.int64)

    passes = [f"prune-channels{{importance=group-taylor budget.flops={share}}}" for share in (0.7, 0.5)]
    result = graphopt.optimize(model, images(), pipeline=",".join(passes), calibration=stream())
    assert [c.inputs for r in result.report.passes for c in r.comparisons][:1] == ["the first calibration batch"]
    # Both fractions are of the model that came in.
    assert 0.45 < result.report.after.flops / result.report.before.flops <= 0.5


def test_inputs_that_show_nothing_are_replaced(model: nn.Module) -> None:
    result = graphopt.optimize(model, torch.zeros(2, 3, 8, 8), budget=HALF)
    assert result.report.passes[-1].comparisons[0].inputs == "the example inputs, with noise in place of constants"


def test_a_captured_graph_keeps_its_dynamic_dimensions() -> None:
    graph = capture(attention(), tokens(), dynamic={"tokens": [1]})
    result = graphopt.optimize(graph, budget=HALF)
    assert result.module(torch.randn(1, 11, 6)).shape == (1, 3)
    assert graph.tensor("up.weight").shape == (40, 24)


@pytest.mark.parametrize("verify", ["each", "final", "off"])
def test_verification_is_reported(model: nn.Module, verify: Any) -> None:
    report = graphopt.optimize(model, images(), budget=HALF, verify=verify).report
    inside = [c for each in report.passes for c in each.comparisons]
    assert bool(inside) == (verify == "each")
    assert bool(report.comparisons) == (verify == "final")
    assert any("nothing was verified" in warning for warning in report.warnings) == (verify == "off")


# -- training between steps, and results as models ---------------------------------------------------------------------


class TestSteps:
    def test_training_follows_every_step(self, model: nn.Module) -> None:
        seen: list[tuple[int, bool]] = []

        def train(module: nn.Module) -> None:
            seen.append((sum(p.numel() for p in module.parameters()), module.training))
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.01)

        before = weights(model)
        result = graphopt.optimize(model, images(), budget=HALF, finetune=train, steps=3)
        passes = [record.name for record in result.report.passes]
        assert passes == ["remove-identities", "merge-duplicates", *["prune-channels", "fine-tune"] * 3]
        counts = [count for count, _ in seen]
        assert counts == sorted(counts, reverse=True)
        assert len(set(counts)) == 3
        assert all(training for _, training in seen)
        assert result.report.after.flops <= 0.5 * result.report.before.flops
        for name, dims in result.plan.keep.items():
            expected = model.state_dict()[name]
            for dim, kept in dims.items():
                expected = expected.index_select(dim, torch.from_numpy(kept))
            assert result.module.state_dict()[name].shape == expected.shape
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not torch.equal(result.module.state_dict()["head.bias"], before["head.bias"])

    def test_steps_without_training(self, model: nn.Module) -> None:
        report = graphopt.optimize(model, images(), budget=HALF, steps=2).report
        *_, first, second = report.passes
        assert second.after.flops <= report.before.flops / 2 < first.after.flops <= report.before.flops / 2**0.5
        whole = {site.name: (site.facts["size"], site.facts["kept"]) for site in report.groups}
        assert {site.name: site.facts["size"] for site in first.applied}.items() <= {
            n: s for n, (s, _) in whole.items()
        }.items()
        assert {site.name: site.facts["kept"] for site in second.applied}.items() <= {
            n: k for n, (_, k) in whole.items()
        }.items()
        assert not {site.name for _, site in report.left_alone} & whole.keys()
        assert [first.text, second.text] == ["prune-channels{progress=0.5}", "prune-channels"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": 2}, "steps=2 was asked for, but no pass of the pipeline '.*' prunes in steps"),
            ({"finetune": print}, "finetune was given, but nothing is pruned"),
            ({"steps": 0}, "steps must be an integer, 1 or above; found 0"),
            ({"steps": True}, "steps must be an integer, 1 or above; found True"),
            ({"own_class": 1}, "own_class must be True or False; found 1"),
            ({"own_class": True, "target": "onnx"}, "own_class gives a module back, and the target 'onnx' changes"),
            ({"pipeline": "fine-tune"}, "fine-tune has nothing to call: pass finetune="),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, model: nn.Module, options: Any, message: str) -> None:
        with pytest.raises(graphopt.PipelineError, match=message):
            graphopt.optimize(model, images(), **options)

    def test_training_that_breaks_off(self, model: nn.Module) -> None:
        def train(module: nn.Module) -> None:
            raise RuntimeError("out of data")

        with pytest.raises(graphopt.PassError, match="finetune broke off: RuntimeError: out of data"):
            graphopt.optimize(model, images(), budget=HALF, finetune=train)

    def test_training_that_diverges(self, model: nn.Module) -> None:
        def train(module: nn.Module) -> None:
            with torch.no_grad():
                next(module.parameters()).fill_(float("nan"))

        with pytest.raises(graphopt.PassError, match="holds NaN or infinity: the training diverged"):
            graphopt.optimize(model, images(), budget=HALF, finetune=train)


class TestResultAsModel:
    def test_the_plans_compose(self, model: nn.Module, result: Result) -> None:
        for again in (result, result.module):
            inputs = None if again is result else images()
            second = graphopt.optimize(again, inputs, budget=HALF)
            assert second.report.after.flops <= 0.5 * result.report.after.flops
            whole = result.plan.then(second.plan)
            left = whole.apply(model.state_dict())
            for name, tensor in second.module.state_dict().items():
                assert left[name].shape == tensor.shape
                torch.testing.assert_close(left[name], tensor, rtol=0, atol=0)

    def test_the_first_result_stays(self, result: Result) -> None:
        before = weights(result.module)
        text = result.graph.text()
        graphopt.optimize(result, budget=HALF)
        assert result.graph.text() == text
        assert all(torch.equal(tensor, before[name]) for name, tensor in result.module.state_dict().items())


# -- warnings -------------------------------------------------------------------------------------------------------


class TestWarnings:
    def test_without_a_budget_nothing_is_done_and_that_is_said(self, model: nn.Module) -> None:
        result = graphopt.optimize(model, images())
        assert result.report.warnings == [
            "nothing was done: the passes found nothing to do, and without a budget nothing is pruned. Give one, such "
            "as budget=graphopt.Budget(flops=0.5)"
        ]
        assert torch.allclose(result.module(images()), model(images()))

    def test_a_budget_that_is_met_already(self, model: nn.Module) -> None:
        (warning,) = graphopt.optimize(model, images(), budget=graphopt.Budget(flops=1.0)).report.warnings
        assert warning == "nothing was pruned: the model costs no more than the budget allows as it is"

    def test_a_budget_that_no_pass_looks_after(self, model: nn.Module) -> None:
        report = graphopt.optimize(model, images(), budget=HALF, pipeline=[]).report
        assert any(warning.startswith("the budget was not met: flops ") for warning in report.warnings)
        assert not report.budget[0].met

    def test_operators_without_a_rule(self) -> None:
        class Spectrum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return torch.linalg.matrix_exp(self.second(torch.relu(self.first(x))))

        report = graphopt.optimize(Spectrum(), torch.randn(2, 8, 4), budget=graphopt.Budget(flops=0.8)).report
        assert any("1 operator without an axis rule, aten.linalg_matrix_exp" in warning for warning in report.warnings)
        assert report.unknown[0].nodes == ("linalg_matrix_exp",)

    def test_outputs_that_prove_nothing(self) -> None:
        class Undefined(Convolutions):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) / torch.zeros(())

        report = graphopt.optimize(Undefined().eval(), images(), budget=HALF).report
        assert any("there, verification proves nothing" in warning for warning in report.warnings)

    def test_groups_that_verification_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lie_about_sigmoid(monkeypatch)
        report = graphopt.optimize(Sigmoids(), torch.randn(3, 5), budget=graphopt.Budget(params=0.7)).report
        loud = [warning for warning in report.warnings if "please report the model" in warning]
        assert sorted(warning.split(" (")[0] for warning in loud) == [
            "prune-channels left second.weight[0] alone: changing it gave a wrong model",
            "prune-channels left third.weight[1] alone: changing it gave a wrong model",
        ]


class Sigmoids(nn.Module):
    """A chain in which one operator can be lied about."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.sigmoid(self.second(torch.relu(self.first(x)))))


def lie_about_sigmoid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Type the sigmoid as if its result had nothing to do with its argument."""
    fresh = Operator(lambda t, call: tuple(t.fresh(n) for n in t.shape()))
    assert isinstance(dialect.OPERATORS, dict)
    monkeypatch.setitem(dialect.OPERATORS, torch.ops.aten.sigmoid.default, fresh)


# -- artifacts ------------------------------------------------------------------------------------------------------


class Failing(Target):
    """Write half of something, and fail."""

    name: ClassVar[str] = "failing"

    def lower(self, graph: Graph, directory: Path | None = None) -> Lowered:
        assert directory is not None
        (directory / "half.bin").write_bytes(b"half")
        raise graphopt.LoweringError("node relu has no translation for 'failing'; use target='torch'")


class Kept(Target):
    """Write a file, and want multiples of eight."""

    name: ClassVar[str] = "kept"

    def lower(self, graph: Graph, directory: Path | None = None) -> Lowered:
        if directory is None:
            return Lowered(notes=("nothing to write",))
        path = directory / "model.txt"
        path.write_text(graph.text(), encoding="utf-8")
        return Lowered(artifacts={"text": path}, notes=("written as text",))


class TestArtifacts:
    def test_everything_is_written_with_hashes(self, model: nn.Module, tmp_path: Path) -> None:
        output = tmp_path / "deep" / "out"
        result = graphopt.optimize(model, images(), budget=HALF, target=Kept(channel_multiple=8), output=output)
        assert {kind: path.name for kind, path in result.artifacts.items()} == {
            "text": "model.txt",
            "plan": "plan.safetensors",
            "report": "report.html",
            "manifest": "manifest.json",
        }
        assert sorted(path.name for path in output.iterdir()) == sorted(
            [*(path.name for path in result.artifacts.values()), "report.json"]
        )
        manifest = json.loads((output / "manifest.json").read_text())
        assert (manifest["target"], manifest["seed"]) == ("kept", 0)
        assert manifest["pipeline"] == Kept().pipeline(HALF)
        assert manifest["versions"]["graphopt"] == graphopt.__version__
        for kind in ("text", "plan", "report"):
            entry = manifest["artifacts"][kind]
            data = (output / entry["file"]).read_bytes()
            assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert graphopt.Plan.load(output / "plan.safetensors") == result.plan
        assert json.loads((output / "report.json").read_text())["artifacts"]["text"] == str(output / "model.txt")
        assert "written as text" in result.report.notes
        assert all(site.facts["kept"] % 8 == 0 for site in result.report.groups)

    def test_the_torch_target_writes_a_program(self, model: nn.Module, tmp_path: Path) -> None:
        result = graphopt.optimize(model, images(), budget=HALF, output=tmp_path)
        loaded = torch.export.load(result.artifacts["pt2"]).module()
        assert torch.allclose(loaded(images(3)), result.module(images(3)), atol=1e-6)
        again = graphopt.optimize(result.artifacts["pt2"], budget=HALF)
        assert again.report.model == "model.pt2"
        assert again.report.after.flops <= result.report.after.flops / 2

    def test_a_second_run_replaces_the_first(self, model: nn.Module, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        for budget in (HALF, graphopt.Budget(flops=0.8)):
            result = graphopt.optimize(model, images(), budget=budget, target=Kept(), output=tmp_path)
        assert graphopt.Plan.load(tmp_path / "plan.safetensors") == result.plan
        assert (tmp_path / "mine.txt").read_text() == "mine"

    def test_nothing_is_left_of_a_failure(self, model: nn.Module, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        graphopt.optimize(model, images(), budget=HALF, target=Kept(), output=kept)
        before = {path: path.read_bytes() for path in kept.iterdir()}
        with pytest.raises(graphopt.LoweringError, match="node relu has no translation"):
            graphopt.optimize(model, images(), budget=HALF, target=Failing(), output=kept)
        assert {path: path.read_bytes() for path in kept.iterdir()} == before
        with pytest.raises(graphopt.LoweringError):
            graphopt.optimize(model, images(), budget=HALF, target=Failing(), output=tmp_path / "a" / "b")
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]

    def test_a_folder_that_cannot_be_written_is_refused_at_once(self, model: nn.Module, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(
            graphopt.LoweringError, match=r"cannot write to .*file/out: .*file is no folder; choose another"
        ):
            graphopt.optimize(model, images(), budget=HALF, output=tmp_path / "file" / "out")


# -- errors ---------------------------------------------------------------------------------------------------------


class Decides(nn.Module):
    """Look at its data to decide what to do."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class TestErrors:
    def test_capture(self) -> None:
        with pytest.raises(graphopt.CaptureError, match=r"no example inputs, .* pass example_inputs"):
            graphopt.optimize(Convolutions())
        with pytest.raises(graphopt.CaptureError, match="makes a decision or a size from the values of a tensor"):
            graphopt.optimize(Decides(), images())
        with pytest.raises(graphopt.CaptureError, match="pickles run code when they are read and are not loaded"):
            graphopt.optimize("model.pth")
        with pytest.raises(graphopt.CaptureError, match=r"there is no file .*lost\.pt2"):
            graphopt.optimize("lost.pt2")

    def test_capture_of_calibration(self, model: nn.Module) -> None:
        with pytest.raises(graphopt.CaptureError) as raised:
            graphopt.optimize(model, images(), budget=HALF, calibration=[torch.randn(2, 4, 8, 8)])
        assert str(raised.value).startswith(
            "the captured model does not run on the first calibration batch: ValueError: "
        )
        assert str(raised.value).endswith("Give inputs of the shapes and types of the example inputs")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target": "onx"}, "unknown target 'onx'; did you mean 'onnx'? Valid names: onnx, torch."),
            ({"pipeline": "prune-chanels"}, "unknown pass 'prune-chanels'; did you mean 'prune-channels'?"),
            (
                {"pipeline": "prune-channels{importance=l7}"},
                "unknown value of prune-channels, importance: 'l7'. Valid names: ",
            ),
            ({"verify": "every"}, "unknown value of verify: 'every'. Valid names: each, final, off."),
            ({"seed": -1}, "seed must be an integer, 0 or above; found -1"),
            ({"pipeline": "prune-channels{importance=group-taylor}"}, "pass calibration=[(inputs, labels), …]"),
            (
                {"evaluate": lambda module: module.lost},
                "evaluate broke off (evaluate before): AttributeError: 'Convolutions' object has no attribute 'lost'",
            ),
            (
                {"pipeline": "prune-channels{constraints.exclude=[hed]}"},
                "the pattern 'hed' matches no parameter that can be pruned; did you mean 'head'?",
            ),
        ],
    )
    def test_pipeline(self, model: nn.Module, options: dict[str, Any], message: str) -> None:
        with pytest.raises(graphopt.PipelineError, match=re.escape(message)):
            graphopt.optimize(model, images(), budget=HALF, **options)

    def test_budget(self, model: nn.Module) -> None:
        with pytest.raises(
            graphopt.BudgetError, match=r"the budget cannot be met: flops=0\.001 asks for at most"
        ) as raised:
            graphopt.optimize(model, images(), budget=graphopt.Budget(flops=0.001))
        smallest = raised.value.smallest["flops"]
        assert 0.001 < smallest < 0.2
        within = graphopt.optimize(model, images(), budget=graphopt.Budget(flops=smallest * 1.0001))
        assert within.report.budget[0].met
        with pytest.raises(graphopt.BudgetError, match=r"budget must be a graphopt\.Budget, .*; found float 0\.5"):
            graphopt.optimize(model, images(), budget=0.5)  # type: ignore[arg-type]
        with pytest.raises(graphopt.BudgetError, match="there is no table of measured latency"):
            graphopt.optimize(model, images(), budget=graphopt.Budget(latency=0.01))

    def test_verification(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lie_about_sigmoid(monkeypatch)
        with pytest.raises(graphopt.VerificationError) as raised:
            graphopt.optimize(Sigmoids(), torch.randn(3, 5), budget=graphopt.Budget(params=0.3))
        assert str(raised.value).startswith("pass 3 'prune-channels' of the pipeline ")
        assert re.search(
            r": changing .* gave a wrong model .* Without them the budget cannot be met", str(raised.value)
        )
        with pytest.raises(graphopt.VerificationError, match=r"did not keep its promise .* verify='each' finds"):
            graphopt.optimize(Sigmoids(), torch.randn(3, 5), budget=graphopt.Budget(params=0.5), verify="final")

    def test_pass(self, model: nn.Module) -> None:
        with torch.no_grad():
            broken = copy.deepcopy(model)
            broken.get_parameter("widen.weight")[0] = float("nan")
        with pytest.raises(graphopt.PassError) as raised:
            graphopt.optimize(broken, images(), budget=HALF)
        assert "pass 3 'prune-channels' of the pipeline" in str(raised.value)
        assert "the parameter widen.weight holds NaN or infinity, so its indices cannot be ranked" in str(raised.value)

    def test_missing_dependency(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str, *rest: Any) -> Any:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr("graphopt.targets.base.importlib.import_module", absent)
        with pytest.raises(
            graphopt.MissingDependencyError, match=r"needs the package 'onnx', .*pip install 'graphopt\[onnx\]'"
        ):
            graphopt.optimize(model, images(), budget=HALF, target="onnx")

    def test_every_error_derives_from_one(self) -> None:
        names = [name for name in graphopt.__all__ if name.endswith("Error")]
        assert len(names) == 10
        assert all(issubclass(getattr(graphopt, name), graphopt.GraphOptError) for name in names)


# -- inspect and explain --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return graphopt.inspect(attention(), tokens())


class TestInspect:
    def test_groups(self, inspection: Inspection) -> None:
        groups = {row.name: row for row in inspection.groups}
        hidden = groups["up.weight[0]"]
        assert (hidden.size, hidden.places) == (40, ("up.weight[0]", "up.bias[0]", "down.weight[1]"))
        assert hidden.params == 40 * 24 + 40 + 24 * 40
        assert hidden.flops == 2 * 2 * 7 * 2 * 40 * 24
        assert hidden.normalised == ()
        assert groups["embed.weight[0]"].normalised == ("layer_norm", "layer_norm_1")
        assert {"heads", "head dim"} & {row.role for row in inspection.groups}

    def test_frozen(self, inspection: Inspection) -> None:
        reasons = {row.reason: row for row in inspection.frozen}
        assert reasons["a dimension of the model's output"].places == ("head.weight[0]", "head.bias[0]")
        assert reasons["a dimension of the model's output"].params == 3 * 24 + 3
        assert reasons["a dimension of the model's input"].places == ("embed.weight[1]",)
        assert reasons["a dimension of the model's input"].flops == 2 * 2 * 7 * 6 * 24

    def test_layers_add_up(self, inspection: Inspection) -> None:
        assert sum(layer.macs for layer in inspection.layers) == inspection.cost.macs
        assert sum(layer.params for layer in inspection.layers) == inspection.cost.params
        assert inspection.smallest.params < inspection.cost.params / 20

    def test_as_data(self, inspection: Inspection) -> None:
        data = json.loads(json.dumps(inspection.to_dict()))
        assert data["model"] == "Attention"
        assert data["cost"]["params"] == inspection.cost.params
        assert [*data["groups"][0]] == ["name", "role", "size", "places", "params", "flops", "normalised", "layer"]

    def test_as_text(self, inspection: Inspection) -> None:
        text = str(inspection)
        for part in (
            "Attention: ",
            "Groups (",
            "up.weight[0]",
            "Dimensions that cannot shrink",
            "Cost by layer",
            "qkv",
        ):
            assert part in text

    def test_coupling(self, inspection: Inspection, tmp_path: Path) -> None:
        coupling = inspection.coupling
        assert "group up.weight[0]" in coupling.nx
        assert coupling.dot().startswith("graph coupling {")
        coupling.write_graphml(tmp_path / "coupling.graphml")
        assert "graphml" in (tmp_path / "coupling.graphml").read_text()


class TestExplain:
    def test_what_goes_together(self, capsys: pytest.CaptureFixture[str]) -> None:
        graphopt.explain(attention(), "down.weight", 1, tokens())
        out = capsys.readouterr().out
        assert out.splitlines() == [
            "down.weight, dimension 1: 40 positions",
            "",
            out.splitlines()[2],
            "    up.weight[0]  through linear_4 in down → gelu → linear_3 in up",
            "    up.bias[0]  through linear_4 in down → gelu → linear_3 in up",
        ]
        assert out.splitlines()[2].endswith(
            "can shrink: 40 indices (channels), which stand or fall in 3 places together."
        )

    def test_what_must_stay(self, capsys: pytest.CaptureFixture[str]) -> None:
        graphopt.explain(attention(), "head.weight", 0, tokens())
        out = capsys.readouterr().out
        assert "(3) must stay whole: a dimension of the model's output, at the model's output." in out
        assert "The way there: through linear_5 in head → the model's output" in out

    def test_what_is_made_of_parts(self, capsys: pytest.CaptureFixture[str]) -> None:
        graphopt.explain(attention(), "qkv.weight", -2, tokens())
        out = capsys.readouterr().out
        assert "It is made of several parts" in out
        assert "4 indices (heads)" in out
        assert "Normalised over" not in out

    def test_what_does_not_exist(self) -> None:
        with pytest.raises(graphopt.PipelineError) as raised:
            graphopt.explain(attention(), "dwon.weight", 1, tokens())
        assert str(raised.value) == "Attention reads no parameter 'dwon.weight'; did you mean 'down.weight'?"
        with pytest.raises(graphopt.PipelineError) as raised:
            graphopt.explain(attention(), "down.weight", 2, tokens())
        assert str(raised.value) == "down.weight has 2 dimensions, numbered from 0; there is no dimension 2"


def test_a_model_that_costs_nothing_keeps_any_budget() -> None:
    result = graphopt.optimize(nn.ReLU(), torch.randn(2, 8), target="torch", budget=graphopt.Budget(flops=0.5))
    assert result.plan.keep == {}
    assert [line.met for line in result.report.budget] == [True]
