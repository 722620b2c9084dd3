"""Score the groups that a criterion can say nothing about.

What may live here: what stands in for a missing score, and that it is said aloud. Nothing here decides what is missing.
"""

from __future__ import annotations

import numpy as np

from graphopt.importance.criterion import ScoreContext, Scores
from graphopt.importance.slices import squared_magnitudes

__all__ = ["with_magnitudes"]


def with_magnitudes(scores: Scores, context: ScoreContext, why: str) -> Scores:
    """Return scores of all groups: those without any get squared magnitudes, and a note that says so.

    Squared magnitudes come in a unit of their own. They are scaled such that the mean index of these groups scores
    what the mean index of the others does: a ranking across groups then treats them as average, whatever normaliser
    follows, and no group is kept or emptied for the sake of its unit.

    Args:
        scores: what the criterion found, before normalisation, by group; at least one group.
        context: the groups; its notes say which groups got a stand-in.
        why: why these groups have no score of their own, to follow a colon.
    """
    missing = [group.name for group in context.typing.groups if group.name not in scores]
    if not missing:
        return scores
    magnitudes = squared_magnitudes(context)
    mean_found = np.concatenate(list(scores.values())).mean()
    mean_magnitude = np.concatenate([magnitudes[name] for name in missing]).mean()
    scale = mean_found / mean_magnitude if mean_found > 0 and mean_magnitude > 0 else 1.0
    for name in missing:
        context.notes[name] = f"scored by squared magnitude: {why}"
    every = scores | {name: magnitudes[name] * scale for name in missing}
    return {group.name: every[group.name] for group in context.typing.groups}
