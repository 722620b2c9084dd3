"""Make neural networks smaller and faster, and prove every rewrite.

The public names; everything else may change.

- :func:`optimize` makes a model meet a :class:`Budget`, through a :class:`Pipeline` of passes
- :func:`inspect` says what a model is made of, :func:`explain` why a dimension goes with others or cannot shrink
- :class:`Plan` says which indices of a model's tensors are left, and prunes a checkpoint, or a module in its own class
- :class:`Pass` is what a pass of your own derives from
- :func:`debugging` lets a failure leave files that replay it
- :func:`without_weights` builds a model whose weights do not fit in memory
- every error derives from :class:`GraphOptError`
"""

from importlib.metadata import version

from graphopt.allocation import Budget
from graphopt.capture import without_weights
from graphopt.debugging import debugging
from graphopt.errors import (
    BudgetError,
    CaptureError,
    GraphOptError,
    LoweringError,
    MissingDependencyError,
    PassError,
    PipelineError,
    PlanError,
    UnsupportedOperatorError,
    VerificationError,
)
from graphopt.optimize import explain, inspect, optimize
from graphopt.pipeline import Pass, Pipeline
from graphopt.plan import Plan

__all__ = [
    "Budget",
    "BudgetError",
    "CaptureError",
    "GraphOptError",
    "LoweringError",
    "MissingDependencyError",
    "Pass",
    "PassError",
    "Pipeline",
    "PipelineError",
    "Plan",
    "PlanError",
    "UnsupportedOperatorError",
    "VerificationError",
    "__version__",
    "debugging",
    "explain",
    "inspect",
    "optimize",
    "without_weights",
]

__version__ = version("graphopt")
