"""Say what a criterion is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from graphopt.dialects.onnx.quantized import real_value
from graphopt.importance.calibration import Loss

if TYPE_CHECKING:
    from graphopt.axes.infer import Typing
    from graphopt.dialects.onnx.quantized import real_value
from graphopt.graph import Graph

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
        parameters: The parameters that hold an index of some group, by name; buffers are no parameters. Those that are
            stored as whole numbers are given as the real numbers for which they stand.
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
        held = [n for n, t in tensors.items() if isinstance(t, nn.Parameter)]
        object.__setattr__(self, "parameters", Parameters(self.typing.graph, held))


class Parameters(Mapping[str, Tensor]):
    """Some parameters of a graph by name; what is not in memory is read when it is asked for, for the caller alone."""

    def __init__(self, graph: Graph, names: Iterable[str]) -> None:
        """Stand for the tensors of these names."""
        self._graph = graph
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._graph.value(name)
        return tensor if tensor.is_floating_point() else real_value(self._graph, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def only(self, wanted: Callable[[Tensor], bool]) -> Parameters:
        """Return those of the wanted shapes and types, by which alone they are to be judged."""
        return Parameters(self._graph, [name for name in self._names if wanted(self._graph.tensor(name))])

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the rows of a parameter, those of one that is not in memory a few at a time."""
        weights = self._graph.weights
        if weights is not None and name in weights and self._graph.tensor(name).is_meta:
            yield from weights.blocks(name)
        else:
            yield self[name]


@runtime_checkable
class Criterion(Protocol):
    """Score every index of every group. Implementations are frozen dataclasses whose fields are their options."""

    name: ClassVar[str]

    def score(self, context: ScoreContext) -> Scores:
        """Return finite scores for all groups of the typing; removing an index loses about its score."""
        ...
