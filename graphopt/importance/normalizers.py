"""Make the scores of different groups comparable.

What may live here: one function a normaliser, from the scores of one group to those of the same group, and
:func:`normalize`. All keep the order inside a group, ties apart.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from graphopt.errors import PipelineError, unknown_name
from graphopt.importance.criterion import ScoreContext, Scores
from graphopt.importance.slices import readers

__all__ = ["NORMALIZERS", "lamp", "mean", "minmax", "normalize", "total", "zscore"]

Floats = npt.NDArray[np.float64]


def unchanged(scores: Floats) -> Floats:
    """Return the scores as they are: what a slice holds in absolute terms, so large slices count more."""
    return scores


def zscore(scores: Floats) -> Floats:
    """Return the distance from the group's mean in standard deviations (unbiased); 0 where all are equal."""
    spread = scores.std(ddof=1) if len(scores) > 1 else 0.0
    return (scores - scores.mean()) / spread if spread > 0 else np.zeros_like(scores)


def minmax(scores: Floats) -> Floats:
    """Return the scores on the scale from the group's least (0) to its greatest (1); 0 where all are equal."""
    spread = scores.max() - scores.min()
    return (scores - scores.min()) / spread if spread > 0 else np.zeros_like(scores)


def total(scores: Floats) -> Floats:
    """Return each score's share of the group's sum: a small group's indices count more."""
    whole = scores.sum()
    return scores / whole if whole > 0 else np.zeros_like(scores)


def mean(scores: Floats) -> Floats:
    """Return the scores relative to the group's mean, so that an average index scores 1 in every group."""
    middle = scores.mean()
    return scores / middle if middle > 0 else np.zeros_like(scores)


def lamp(scores: Floats) -> Floats:
    """Return each score's share of what is left once all lower ones are gone.

    In ascending order ``s_i / (s_i + s_(i+1) + …)``: the relative loss of removing index i after all lesser ones.
    The greatest index scores 1 whatever its group, so a global ranking empties no group before all others are down
    to one index. Adding these scores up adds up, to first order, the logarithms of the shares that are kept.

    Source: Lee et al. 2021, arXiv:2010.07611, equation 3, applied to the indices of a group.
    """
    order = np.argsort(scores, kind="stable")
    ascending = scores[order]
    left = np.cumsum(ascending[::-1])[::-1]
    found = np.zeros_like(scores)
    found[order] = np.divide(ascending, left, out=np.zeros_like(ascending), where=left > 0)
    return found


def distortion(scores: Floats) -> Floats:
    """Return what each index adds to the ratio of removed to kept when it goes after all lower ones.

    A group that keeps R of its sum S has lost (S - R) / R times what it kept: noise over signal, which grows without
    bound as the group empties. In ascending order, with R_i = s_i + s_(i+1) + … left, index i adds
    ``S / R_(i+1) - S / R_i = s_i S / (R_i R_(i+1))``, so scores of removed indices add up to the ratio exactly, and one
    of four heads is dearer than a quarter of many channels, taken bit by bit. The greatest index, which stays, gets
    ``S / s``. The loss rises faster than the share falls, so where the widths of two groups multiply in one cost, an
    allocator takes from both; under ``lamp`` it would empty one of them first.
    """
    order = np.argsort(scores, kind="stable")
    ascending = scores[order]
    left = np.cumsum(ascending[::-1])[::-1]
    after = np.append(left[1:], left[-1:])
    found = np.zeros_like(scores)
    added = np.divide(ascending, left, out=np.zeros_like(ascending), where=left > 0)
    found[order] = added * np.divide(left[0], after, out=np.zeros_like(ascending), where=after > 0)
    return found


NORMALIZERS: dict[str, Callable[[Floats], Floats]] = {
    "none": unchanged,
    "zscore": zscore,
    "minmax": minmax,
    "sum": total,
    "mean": mean,
    "lamp": lamp,
    "distortion": distortion,
}
"""Every normaliser by its name.

:func:`normalize` multiplies ``distortion`` by the number of layers that read the group
(:func:`~graphopt.importance.slices.readers`), which adds up noise over signal over the layers that suffer it: so a
residual width is dearer than the width inside one block.
"""


def normalize(scores: Scores, name: str, context: ScoreContext) -> Scores:
    """Return the scores of every group under the normaliser of that name.

    Raises:
        PipelineError: there is no such normaliser.
    """
    function = NORMALIZERS.get(name)
    if function is None:
        raise PipelineError(unknown_name("normalizer", name, NORMALIZERS))
    found = {group: function(values) for group, values in scores.items()}
    if name == "distortion":
        layers = readers(context)
        found = {group: values * layers[group] for group, values in found.items()}
    return found
