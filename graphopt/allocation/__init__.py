"""Decide which indices stay: scores and a budget in, kept indices out; one allocator a file.

An allocator is a frozen dataclass with a name, options as fields, and one method :meth:`Allocator.allocate`.
``ALLOCATORS`` lists them by the name that pipelines use.
"""

from graphopt.allocation.allocator import Allocator, Keep
from graphopt.allocation.budget import Budget
from graphopt.allocation.constraints import Constraints
from graphopt.allocation.global_threshold import GlobalThreshold
from graphopt.allocation.knapsack import Knapsack
from graphopt.allocation.uniform import Uniform

__all__ = ["ALLOCATORS", "Allocator", "Budget", "Constraints", "GlobalThreshold", "Keep", "Knapsack", "Uniform"]

ALLOCATORS: dict[str, type[Allocator]] = {
    "uniform": Uniform,
    "global-threshold": GlobalThreshold,
    "knapsack": Knapsack,
}
"""Every allocator by its name."""
