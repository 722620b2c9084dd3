"""Say what a criterion is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from graphopt.errors import PipelineError
from graphopt.importance.calibration import Loss

if TYPE_CHECKING:
    from graphopt.axes.infer import Typing
    from graphopt.checkpoint import Weights

__all__ = ["Criterion", "Parameters", "ScoreContext", "Scores"]

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
            Those that are not in memory are read from the graph's checkpoint at every access: ask for one at a time.
    """

    typing: Typing
    calibration: Iterable[Any] | None = None
    loss: Loss | None = None
    notes: dict[str, str] = field(default_factory=dict)
    parameters: Parameters = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = dict.fromkeys(place.tensor for group in self.typing.groups for place in group.places)
        tensors = {name: self.typing.graph.tensor(name) for name in names}
        held = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.is_floating_point()}
        object.__setattr__(self, "parameters", Parameters(held, self.typing.graph.weights))


class Parameters(Mapping[str, Tensor]):
    """Parameters by name; what is not in memory is read when it is asked for, and held by the caller alone."""

    def __init__(self, held: Mapping[str, Tensor], weights: Weights | None) -> None:
        """Stand for the tensors ``held``, the values of those on the meta device being in ``weights``."""
        self._held = held
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._held[name]
        return self._stored(name)[name] if tensor.is_meta else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def only(self, wanted: Callable[[Tensor], bool]) -> Parameters:
        """Return those of the wanted shapes and types, by which alone they are to be judged."""
        return Parameters({name: tensor for name, tensor in self._held.items() if wanted(tensor)}, self._weights)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the rows of a parameter, those of one that is not in memory a few at a time."""
        tensor = self._held[name]
        if tensor.is_meta:
            yield from self._stored(name).blocks(name)
        else:
            yield tensor

    def _stored(self, name: str) -> Weights:
        if self._weights is None or name not in self._weights:
            raise PipelineError(
                f"the parameter {name} has no values: give optimize(…, checkpoint=PATH) the files that hold "
                "them, load them into the model, or choose a criterion that looks at none, such as random"
            )
        return self._weights


@runtime_checkable
class Criterion(Protocol):
    """Score every index of every group. Implementations are frozen dataclasses whose fields are their options."""

    name: ClassVar[str]

    def score(self, context: ScoreContext) -> Scores:
        """Return finite scores for all groups of the typing; removing an index loses about its score."""
        ...
