"""Check the command line: what it prints and where, exit codes, and that no user's mistake ends in a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

import graphopt
from graphopt import cli
from tests.small_models import Convolutions, images

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(10, 6), nn.Linear(6, 12), nn.Linear(12, 3)
    def forward(self, ids, scale=None):
        x = self.down(torch.relu(self.up(self.table(ids))))
        return x if scale is None else x * scale

def net():
    return Net()

def with_inputs():
    return Net(), torch.randn(3, 4)

def words():
    return Words()

def hollow():
    import graphopt

    with graphopt.without_weights():
        return Net(), torch.randn(3, 4)

def broken():
    raise RuntimeError("the weights are gone")

class Holder:
    model = Net()

def data():
    return [(torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1]))]

def score(module):
    return float(sum(p.numel() for p in module.parameters()))

number = 3
"""


@dataclass
class Ended:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command line in a folder that holds some models, in this process."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "wrong.py").write_text("import lost_module_of_nets\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")

    def called(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["graphopt", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 1, captured.out, captured.err)

    with torch.random.fork_rng(devices=[]):
        yield called
    for name in ("nets", "wrong", "syntax"):
        sys.modules.pop(name, None)


# -- optimize -------------------------------------------------------------------------------------------------------


def test_optimize_prints_the_report(run: Run) -> None:
    ended = run("optimize", "nets:with_inputs", "--flops", "0.5")
    assert (ended.code, ended.err) == (0, "")
    assert "nets:with_inputs → torch" in ended.out
    assert "first.weight[0]" in ended.out
    assert "≤ 144, met" in ended.out
    assert "Nothing was written: -o FOLDER" in ended.out


def test_optimize_writes_what_it_made(run: Run, tmp_path: Path) -> None:
    ended = run("optimize", "nets:with_inputs", "--flops", "0.5", "-o", "out", "--quiet", "--report", "page.html")
    assert ended == Ended(0, "", "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "model.pt2",
        "plan.safetensors",
        "report.html",
        "report.json",
    ]
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    again = run("optimize", "out/model.pt2", "--params", "0.6", "--json", "--report", "page.json")
    assert again.code == 0
    report = json.loads(again.out)
    assert report["cost"]["after"]["params"] <= 0.6 * report["cost"]["before"]["params"]
    assert json.loads((tmp_path / "page.json").read_text()) == report
    assert report["model"] == "model.pt2"


def test_optimize_reads_values_from_a_checkpoint(run: Run, tmp_path: Path) -> None:
    state = {"first.weight": (8, 4), "first.bias": (8,), "second.weight": (2, 8), "second.bias": (2,)}
    source = tmp_path / "model.safetensors"
    safetensors.torch.save_file({name: torch.randn(shape) for name, shape in state.items()}, source)
    flags = ("--params", "0.6", "--checkpoint", str(source), "-o", str(tmp_path / "out"))
    found = run("optimize", "nets:hollow", *flags, "--json")
    assert found.code == 0, found.err
    pruned = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert pruned.keys() == state.keys()
    assert len(pruned["first.bias"]) < 8
    assert "no output was compared" in json.loads(found.out)["warnings"][0]
    refused = run("optimize", "nets:hollow", "--params", "0.6")
    assert refused.code == 2
    assert "checkpoint=PATH" in refused.err


def test_optimize_takes_data_and_a_metric(run: Run) -> None:
    arguments = ["--flops", "0.5", "--pipeline", "prune-channels{importance=group-taylor}", "--json", "--seed", "3"]
    ended = run(
        "optimize",
        "nets:net",
        "--calibration",
        "nets:data",
        "--evaluate",
        "nets:score",
        "--example-shape",
        "3,4",
        *arguments,
    )
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["score"] == {"before": 58.0, "after": report["cost"]["after"]["params"]}
    assert report["seed"] == 3
    assert report["passes"][0]["comparisons"][0]["inputs"] == "the first calibration batch"


def test_a_function_gives_the_same_model_in_every_run(run: Run) -> None:
    reports = [run("optimize", "nets:with_inputs", "--flops", "0.5", "--json").out for _ in range(2)]
    first, second = (json.loads(report)["passes"][0]["comparisons"] for report in reports)
    assert first == second


def test_optimize_shows_what_passes_did(run: Run) -> None:
    options = ["--pipeline", "prune-channels{budget.flops=0.75},prune-channels{budget.flops=0.5}", "--time", "--stats"]
    ended = run("optimize", "nets:with_inputs", *options, "--print-after-change")
    assert ended.code == 0
    assert ended.err.count("// after prune-channels (pass ") == 2
    assert "%first_weight: float32[4, 4] = @first.weight" in ended.err
    assert "  2. prune-channels{budget.flops=0.5}" in ended.out
    assert "of verification, changed, 1 applied, 0 skipped, 216 → 144 flops" in ended.out
    stopped = run("optimize", "nets:with_inputs", *options, "--stop-after", "1", "--json")
    assert json.loads(stopped.out)["pipeline"] == "prune-channels{budget.flops=0.75}"
    assert "1. prune-channels{budget.flops=0.75}" in stopped.err


def test_optimize_reads_pipelines_from_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "passes.toml").write_text('[[pass]]\nname = "prune-channels"\nimportance = "l1"\nbudget.flops = 0.5\n')
    ended = run("optimize", "nets:with_inputs", "--pipeline", "passes.toml", "--json")
    assert json.loads(ended.out)["pipeline"] == "prune-channels{importance=l1 budget.flops=0.5}"


def test_inputs_are_described_on_the_command_line(run: Run) -> None:
    shapes = [
        "--example-shape",
        "int64:2,5",
        "--example-shape",
        "scale=2,5,3",
        "--dynamic",
        "ids:1",
        "--dynamic",
        "scale:1",
    ]
    ended = run("optimize", "nets:words", *shapes, "--params", "0.7", "-o", "out", "-q")
    assert ended.code == 0, ended.err
    module = torch.export.load("out/model.pt2").module()
    assert module(torch.zeros(3, 7, dtype=torch.int64), scale=torch.ones(3, 7, 3)).shape == (3, 7, 3)


def test_without_a_budget_the_warning_is_loud(run: Run) -> None:
    ended = run("optimize", "nets:with_inputs")
    assert ended.code == 0
    assert "Warnings" in ended.out
    assert "without a budget nothing is pruned" in " ".join(ended.out.replace("│", "").split())


# -- the other commands ---------------------------------------------------------------------------------------------


def test_inspect(run: Run, tmp_path: Path) -> None:
    ended = run("inspect", "nets:with_inputs", "--dot", "net.dot", "--graphml", "net.graphml")
    assert (ended.code, ended.err) == (0, "")
    for part in (
        "nets:with_inputs: ",
        "Groups (1)",
        "first.weight[0]",
        "Dimensions that cannot shrink",
        "Cost by layer",
    ):
        assert part in ended.out
    assert (tmp_path / "net.dot").read_text().startswith("graph coupling {")
    assert "graphml" in (tmp_path / "net.graphml").read_text()
    data = json.loads(run("inspect", "nets:Holder.model", "--example-shape", "3,4", "--json").out)
    assert data["groups"][0]["places"] == ["first.weight[0]", "first.bias[0]", "second.weight[1]"]


def test_explain(run: Run) -> None:
    ended = run("explain", "nets:with_inputs", "second.weight", "1")
    assert (ended.code, ended.err) == (0, "")
    assert "can shrink: 8 indices (channels)" in ended.out
    assert "first.weight[0]  through linear_1 in second → relu → linear in first" in ended.out


def test_passes(run: Run) -> None:
    ended = run("passes")
    assert (ended.code, ended.err) == (0, "")
    assert "prune-channels  preserves: masked" in ended.out
    assert "importance = l2  l1 | l2 | random | " in ended.out
    assert "how indices are scored." in ended.out
    options = {
        option["name"]: option for option in json.loads(run("passes", "--json").out)["prune-channels"]["options"]
    }
    assert options["constraints.normalised"]["takes"] == "after | together | never"
    assert all(option["help"] for option in options.values())


def test_targets(run: Run) -> None:
    ended = run("targets")
    assert (ended.code, ended.err) == (0, "")
    assert "onnx  needs pip install 'graphopt[onnx]'" in ended.out
    assert "torch  needs no extra" in ended.out
    data = json.loads(run("targets", "--json").out)
    assert [*data] == ["torch", "onnx"]
    assert all(option["help"] for row in data.values() for option in row["options"])


def test_version_and_help(run: Run) -> None:
    assert run("--version").out == f"graphopt {graphopt.__version__}\n"
    for command in ("optimize", "inspect", "explain", "passes", "targets"):
        assert command in run("--help").out
        assert run(command, "--help").code == 0


def test_no_arguments_show_the_help(run: Run) -> None:
    ended = run()
    assert "Usage: graphopt" in ended.out + ended.err


# -- mistakes -------------------------------------------------------------------------------------------------------

SMALL = ["--example-shape", "3,4"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        # 2: usage
        (["optimize"], 2, "Missing argument 'MODEL'"),
        (["optimise"], 2, "No such command 'optimise'"),
        (["optimize", "nets"], 2, "MODEL must be an .onnx or .pt2 file or package.module:name; found 'nets'"),
        (["optimize", "nets:net", "--flop", "0.5"], 2, "No such option"),
        (["optimize", "nets:net", "--flops", "half"], 2, "--flops"),
        (["optimize", "nets:1st"], 2, "MODEL must be package.module:name; found 'nets:1st'"),
        (["inspect", "nets:net", "--example-shape", "3x4"], 2, "--example-shape must be like 1,3,224,224"),
        (["inspect", "nets:net", "--example-shape", "int63:3,4"], 2, "there is no type 'int63'; did you mean int64?"),
        (["inspect", "nets:net", "--example-shape", "x=3,4", "--example-shape", "3"], 2, "without a name come first"),
        (["inspect", "nets:net", *SMALL, "--dynamic", "x"], 2, "--dynamic must be INPUT:DIM, such as input_ids:1"),
        (["optimize", "nets:net", *SMALL, "--target", "onx"], 2, "unknown target 'onx'; did you mean 'onnx'?"),
        (
            ["optimize", "nets:net", *SMALL, "--pipeline", "prune-chanel"],
            2,
            "unknown pass 'prune-chanel'; did you mean 'prune-channels'?",
        ),
        (["optimize", "nets:net", *SMALL, "--pipeline", "lost.toml"], 2, "cannot read the pipeline lost.toml"),
        (
            ["optimize", "nets:net", *SMALL, "--verify", "ech"],
            2,
            "unknown value of verify: 'ech'; did you mean 'each'?",
        ),
        (
            ["optimize", "nets:net", *SMALL, "--flops", "0.001"],
            2,
            "the budget cannot be met: flops=0.001 asks for at most",
        ),
        (["optimize", "nets:net", *SMALL, "--flops", "-1"], 2, "the budget's flops must be positive and finite"),
        (["explain", "nets:with_inputs", "frist.weight", "0"], 2, "did you mean 'first.weight'?"),
        (["explain", "nets:with_inputs", "first.weight", "2"], 2, "first.weight has 2 dimensions, numbered from 0"),
        (["inspect", "nets:with_inputs", "--dot", "no/folder.dot"], 2, "cannot write no/folder.dot: No such file"),
        # 3: the model
        (["optimize", "net.onnx"], 3, "net.onnx: the path: found nothing that can be read"),
        (["optimize", "net.pth"], 3, "pickles run code when they are read and are not loaded"),
        (["optimize", "net.pt2"], 3, "there is no file net.pt2"),
        (["inspect", "nets:net"], 3, "on the command line, that is --example-shape 1,3,224,224"),
        (["inspect", "nets:nett"], 3, "nets has no 'nett'; did you mean 'net'?"),
        (["inspect", "netz:net"], 3, "there is no module 'netz' in "),
        (["inspect", "wrong:net"], 3, "importing wrong failed at "),
        (["inspect", "syntax:net"], 3, "importing syntax failed"),
        (["inspect", "nets:broken"], 3, "RuntimeError: the weights are gone"),
        (["inspect", "nets:number", *SMALL], 3, "int"),
        (["inspect", "nets:net", "--example-shape", "3,5"], 3, "cannot be exported at "),
        # 4: a pass or a target
        (
            ["optimize", "nets:net", *SMALL, "--flops", "0.5", "-o", "nets.py/out"],
            4,
            "nets.py is no folder; choose another",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(run: Run, arguments: list[str], code: int, message: str) -> None:
    ended = run(*arguments)
    assert ended.out == ""
    assert message in " ".join(ended.err.replace("│", "").split())
    assert ended.code == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (graphopt.CaptureError("c"), 3),
        (graphopt.UnsupportedOperatorError("u"), 3),
        (graphopt.PassError("p"), 4),
        (graphopt.LoweringError("l"), 4),
        (graphopt.VerificationError("v"), 5),
        (graphopt.MissingDependencyError("onnx", package="onnx"), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_become_exit_codes(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    error.add_note("in pass 1 of a pipeline")

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "optimize_model", failing)
    ended = run("optimize", "nets:with_inputs", "--flops", "0.5")
    assert (ended.code, ended.out, ended.err) == (code, "", f"graphopt: {error}\nin pass 1 of a pipeline\n")


def test_stopping_is_no_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "optimize_model", interrupted)
    ended = run("optimize", "nets:with_inputs", "--flops", "0.5")
    assert ended.code == 130


def test_the_installed_command_runs(tmp_path: Path) -> None:
    program = torch.export.export(Convolutions().eval(), (images(),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "model.pt2")
    command = [sys.executable, "-m", "graphopt.cli", "optimize", "model.pt2", "--flops", "0.5", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["budget"][0]["met"]
    assert all(comparison["passed"] for comparison in report["passes"][0]["comparisons"])


def test_a_failure_is_replayed(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "failure"
    ended = run("optimize", "nets:with_inputs", "--flops", "0.0001", "--reproducer", str(folder))
    assert ended.code == 2
    assert f"a reproducer was written: graphopt replay {folder}" in ended.err
    again = run("replay", str(folder))
    assert again.code == 2
    assert "the budget cannot be met" in again.err
    assert "reproducer" not in again.err
    stopped = run("replay", str(folder), "--stop-after", "0")
    assert stopped.code == 0


def test_what_is_no_reproducer_cannot_be_replayed(run: Run, tmp_path: Path) -> None:
    ended = run("replay", str(tmp_path))
    assert ended.code == 2
    assert "holds no reproducer" in ended.err
