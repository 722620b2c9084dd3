"""Hold every exception a user of graphopt can meet.

The tree, with the exit status the command line ends with::

    GraphOptError                   4
    ├── CaptureError                3   the model could not be turned into a graph
    ├── UnsupportedOperatorError    3   the graph holds an operator that a stage has to know and does not
    ├── PipelineError               2   unknown pass, target or criterion; bad option; text that does not parse
    │   └── PlanError               2   a plan does not fit a module, or a module's code cannot follow it
    ├── BudgetError                 2   the budget cannot be met; `smallest` says what can
    ├── PassError                   4   a pass broke off
    ├── VerificationError           5   a rewrite did not keep its promise
    ├── LoweringError               4   a target could not write its artifacts
    └── MissingDependencyError      2   an optional dependency is not installed; `extra` says which to install

A message names the node or file, what was required, what was found, and what to do. An error that only travels
through a layer keeps its type; a layer that adds what it knows raises its own error `from` the first one.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import ClassVar

__all__ = [
    "BudgetError",
    "CaptureError",
    "GraphOptError",
    "LoweringError",
    "MissingDependencyError",
    "PassError",
    "PipelineError",
    "PlanError",
    "UnsupportedOperatorError",
    "VerificationError",
    "nearest_name",
    "unknown_name",
]


class GraphOptError(Exception):
    """Be the root of every error that graphopt raises on purpose."""

    exit_code: ClassVar[int] = 4
    """Exit status of the command line when this error ends it."""


class CaptureError(GraphOptError):
    """Say that a model could not be turned into a graph: no example inputs, not exportable, damaged file."""

    exit_code: ClassVar[int] = 3


class UnsupportedOperatorError(GraphOptError):
    """Say that a stage met an operator which it has to know and does not.

    Typing never raises this: an operator without a rule freezes the axes it touches and is reported.
    """

    exit_code: ClassVar[int] = 3


class PipelineError(GraphOptError):
    """Say that a pipeline, a target or an option was asked for which does not exist or does not parse."""

    exit_code: ClassVar[int] = 2


class PlanError(PipelineError):
    """Say that a plan cannot be applied to a module: it is another model's, or the code has a size written into it.

    Args:
        message: what does not fit, and what to do.
        module: qualified name of the module whose code cannot follow; empty where it is none's fault.
        code: the line of that code.
        exclude: patterns of the groups without which the code could follow, for the constraints of `prune-channels`.
    """

    def __init__(self, message: str, *, module: str = "", code: str = "", exclude: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.module = module
        self.code = code
        self.exclude = tuple(exclude)


class BudgetError(GraphOptError):
    """Say that a budget cannot be met.

    Args:
        message: what was asked for, what is reachable, and what to relax.
        smallest: smallest reachable value of each dimension of the budget (`flops`, `params`, `memory`, `latency`), in
            the unit in which the budget counts it; empty when the budget is malformed rather than infeasible.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, smallest: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.smallest: dict[str, float] = dict(smallest or {})


class PassError(GraphOptError):
    """Say that a pass broke off; the cause is chained, and the graph is the one from before the pass."""

    exit_code: ClassVar[int] = 4


class VerificationError(GraphOptError):
    """Say that a rewrite did not keep its promise: outputs differ, or a plan and a model disagree."""

    exit_code: ClassVar[int] = 5


class LoweringError(GraphOptError):
    """Say that a target could not write its artifacts; nothing partial is left behind."""

    exit_code: ClassVar[int] = 4


class MissingDependencyError(GraphOptError):
    """Say that an optional dependency is not installed, and which extra of graphopt brings it.

    Args:
        extra: the extra to install, as in `pip install "graphopt[onnx]"`.
        package: the distribution that was not found.
        purpose: what it was needed for, as the start of a sentence ("writing an ONNX file").
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, extra: str, *, package: str | None = None, purpose: str | None = None) -> None:
        super().__init__(extra)
        self.extra = extra
        self.package = package
        self.purpose = purpose

    def __str__(self) -> str:
        """Return one sentence with the purpose, the package and the command that installs it."""
        missing = f"the package '{self.package}'" if self.package else f"what the extra '{self.extra}' brings"
        found = "is not installed" if self.package else "not all of it is installed"
        return f"{self.purpose or 'this'} needs {missing}, and it {found}: pip install 'graphopt[{self.extra}]'"


def nearest_name(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name that `name` most likely stands for, or None where none is close.

    Case, and whether words are joined by `-`, `_` or a blank, make no difference.
    """
    by_key = {_spelling(candidate): candidate for candidate in valid}
    close = difflib.get_close_matches(_spelling(name), by_key, n=1, cutoff=0.6)
    return by_key[close[0]] if close else None


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """Return the message for a name that nothing goes by, with the nearest valid name and all valid ones.

    Args:
        kind: what was looked up, in the singular ("pass", "target", "option of prune-channels").
        name: the name that was given.
        valid: every name that would have been found.
    """
    names = sorted(valid)
    nearest = nearest_name(name, names)
    hint = f"; did you mean '{nearest}'?" if nearest else "."
    known = f" Valid names: {', '.join(names)}." if names else " There are no valid names here."
    return f"unknown {kind} '{name}'{hint}{known}"


def _spelling(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")
