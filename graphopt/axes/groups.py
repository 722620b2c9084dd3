"""What inference finds, in the words of pruning: coupled groups and the places where they occur."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.axes.algebra import Atom, Axis


@dataclass(frozen=True, slots=True)
class Place:
    """One dimension of one tensor in which a group's indices occur; ``axis`` is its solved expression."""

    tensor: str
    dim: int
    axis: Axis

    def __str__(self) -> str:
        return f"{self.tensor}[{self.dim}]"


@dataclass(eq=False, slots=True)
class Group:
    """Indices that stand or fall together, wherever they occur.

    ``normalised`` names the nodes that normalise over the group (a mean, a layer norm …): removing an index then
    renormalises over the kept ones, so the group is pruned after the exact ones unless the user says otherwise.
    ``least`` is how many indices must stay, as where an operator takes the k largest of them.
    """

    name: str
    atom: Atom
    size: int
    places: tuple[Place, ...]
    normalised: tuple[str, ...] = ()
    role: str = "channels"
    least: int = 1

    def __repr__(self) -> str:
        return f"Group({self.name}, {self.role} {self.size}, {len(self.places)} places)"
