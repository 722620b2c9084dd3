"""Say what a criterion is given and what it returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import nn

from graphopt.importance.calibration import Loss

if TYPE_CHECKING:
    from graphopt.axes.infer import Typing

__all__ = ["Criterion", "ScoreContext", "Scores"]

Scores = dict[str, npt.NDArray[np.float64]]
"""One score an index of each group, by the group's name; the higher, the more it matters."""


@dataclass(frozen=True, slots=True)
class ScoreContext:
    """What a criterion may look at.

    Attributes:
        typing: The typed graph, with its groups and its tensors. Criteria change neither.
        calibration: Batches of the model's inputs, or of `(inputs, labels)`; iterated anew by each criterion.
        loss: Makes a scalar of the model's outputs and the labels; cross entropy where it is not given.
        notes: What a criterion says of single groups, by name: where it had to score one otherwise than it scores.
        parameters: The floating-point parameters that hold an index of some group, by name; buffers are no parameters.
    """

    typing: Typing
    calibration: Iterable[Any] | None = None
    loss: Loss | None = None
    notes: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = dict.fromkeys(place.tensor for group in self.typing.groups for place in group.places)
        tensors = {name: self.typing.graph.tensor(name) for name in names}
        held = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.is_floating_point()}
        object.__setattr__(self, "parameters", held)


@runtime_checkable
class Criterion(Protocol):
    """Score every index of every group. Implementations are frozen dataclasses whose fields are their options."""

    name: ClassVar[str]

    def score(self, context: ScoreContext) -> Scores:
        """Return finite scores for all groups of the typing; removing an index loses about its score."""
        ...
