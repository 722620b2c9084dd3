"""Check that errors carry what a person needs to act on."""

import pickle

import pytest

from graphopt import errors


def subclasses(cls: type[errors.GraphOptError]) -> set[type[errors.GraphOptError]]:
    """Return every class below `cls`, however deep."""
    return {found for child in cls.__subclasses__() for found in {child, *subclasses(child)}}


def test_docstring_states_every_class_with_its_exit_code() -> None:
    lines = [line.lstrip("│├└─ ").split() for line in (errors.__doc__ or "").splitlines()]
    stated = {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
    defined: list[type[errors.GraphOptError]] = [errors.GraphOptError, *subclasses(errors.GraphOptError)]
    assert stated == {cls.__name__: cls.exit_code for cls in defined if cls.__module__ == errors.__name__}


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (errors.PipelineError, 2),
        (errors.PlanError, 2),
        (errors.BudgetError, 2),
        (errors.MissingDependencyError, 2),
        (errors.CaptureError, 3),
        (errors.UnsupportedOperatorError, 3),
        (errors.PassError, 4),
        (errors.LoweringError, 4),
        (errors.VerificationError, 5),
    ],
)
def test_exit_code_tells_usage_model_pass_and_verification_apart(cls: type[errors.GraphOptError], code: int) -> None:
    assert issubclass(cls, errors.GraphOptError)
    assert cls.exit_code == code


def test_budget_error_keeps_its_own_copy_of_the_smallest_values() -> None:
    smallest = {"flops": 0.21}
    error = errors.BudgetError("flops=0.1 cannot be met; the smallest reachable is 0.21", smallest=smallest)
    smallest["flops"] = 0.0
    assert error.smallest == {"flops": 0.21}
    assert errors.BudgetError("flops must be positive").smallest == {}


def test_missing_dependency_says_what_to_install() -> None:
    error = errors.MissingDependencyError("onnx", package="onnxscript", purpose="writing an ONNX file")
    assert str(error) == (
        "writing an ONNX file needs the package 'onnxscript', and it is not installed: pip install 'graphopt[onnx]'"
    )
    assert "pip install 'graphopt[zoo]'" in str(errors.MissingDependencyError("zoo"))


@pytest.mark.parametrize(
    "error",
    [
        errors.BudgetError("too small", smallest={"params": 3.0}),
        errors.MissingDependencyError("onnx", package="onnx", purpose="reading it"),
        errors.PassError("fold-batch-norm broke off"),
    ],
)
def test_errors_survive_the_way_between_processes(error: errors.GraphOptError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("prune-chanels", "prune-channels"),
        ("Prune_Channels", "prune-channels"),
        ("fold batch norm", "fold-batch-norm"),
        ("quantize", None),
    ],
)
def test_nearest_name(name: str, nearest: str | None) -> None:
    assert errors.nearest_name(name, ["fold-batch-norm", "prune-channels", "sparsify"]) == nearest


def test_unknown_name_lists_what_is_valid() -> None:
    assert errors.unknown_name("target", "torhc", ["torch", "onnx"]) == (
        "unknown target 'torhc'; did you mean 'torch'? Valid names: onnx, torch."
    )
    assert errors.unknown_name("target", "gpu", ["torch", "onnx"]) == "unknown target 'gpu'. Valid names: onnx, torch."
    assert errors.unknown_name("pass", "x", []) == "unknown pass 'x'. There are no valid names here."
