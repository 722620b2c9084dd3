"""Score by chance: what every other criterion has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.importance.criterion import ScoreContext, Scores
from graphopt.importance.normalizers import normalize

__all__ = ["Random"]


@dataclass(frozen=True)
class Random:
    """Score every index by an independent draw, uniform in [0, 1).

    A group's draws depend on the seed and on its name alone, not on which other groups there are.

    Args:
        seed: seeds the draws.
        normalizer: how groups are made comparable, a key of `NORMALIZERS`.
    """

    name: ClassVar[str] = "random"
    seed: int = 0
    normalizer: str = "distortion"

    def score(self, context: ScoreContext) -> Scores:
        """Return the normalised draws."""
        drawn = {
            group.name: np.random.default_rng([self.seed, zlib.crc32(group.name.encode())]).random(group.size)
            for group in context.typing.groups
        }
        return normalize(drawn, self.normalizer, context)
