"""Score by squared magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.importance.criterion import ScoreContext, Scores
from graphopt.importance.normalizers import normalize
from graphopt.importance.slices import squared_magnitudes

__all__ = ["L2"]


@dataclass(frozen=True)
class L2:
    """Score an index by the sum of the squares of the parameters in its slice, its squared L2 norm.

    The square is what adds up: the score of several indices is what their removal takes from the squared norm.
    Running statistics and other buffers do not count.

    Args:
        normalizer: how groups are made comparable, a key of `NORMALIZERS`.

    Source: Li et al. 2017, arXiv:1608.08710, over all coupled slices as in Fang et al. 2023, arXiv:2301.12900.
    """

    name: ClassVar[str] = "l2"
    normalizer: str = "distortion"

    def score(self, context: ScoreContext) -> Scores:
        """Return the normalised sums of squares."""
        return normalize(squared_magnitudes(context), self.normalizer, context)
