"""Score by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.importance.criterion import ScoreContext, Scores
from graphopt.importance.normalizers import normalize
from graphopt.importance.slices import in_float, slice_sums

__all__ = ["L1"]


@dataclass(frozen=True)
class L1:
    """Score an index by the sum of the absolute values of the parameters in its slice, its L1 norm.

    Running statistics and other buffers do not count.

    Args:
        normalizer: how groups are made comparable, a key of `NORMALIZERS`.

    Source: Li et al. 2017, arXiv:1608.08710, over all coupled slices as in Fang et al. 2023, arXiv:2301.12900.
    """

    name: ClassVar[str] = "l1"
    normalizer: str = "distortion"

    def score(self, context: ScoreContext) -> Scores:
        """Return the normalised sums of absolute values."""
        return normalize(slice_sums(context, context.parameters, _magnitudes), self.normalizer, context)


def _magnitudes(weight: Tensor) -> Tensor:
    return in_float(weight).abs()
