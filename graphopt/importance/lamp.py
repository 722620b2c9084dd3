"""Score by the relative distortion of single weight tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from graphopt.importance import normalizers
from graphopt.importance.criterion import ScoreContext, Scores
from graphopt.importance.fallback import with_magnitudes
from graphopt.importance.normalizers import normalize
from graphopt.importance.slices import in_float, slice_sums

__all__ = ["LAMP"]


@dataclass(frozen=True)
class LAMP:
    """Score an index by what its slice takes from each weight tensor, relative to what is left of that tensor.

    In one tensor, of squares in ascending order, the score is ``s_u / (s_u + s_(u+1) + …)``: the squared relative
    Frobenius distortion of removing u after all smaller ones. Squares are those of single weights, whose scores are
    added up over the slice and divided by the number of tensors, or those of the tensor's part of the slice,
    whose scores are averaged over the tensors. Either way the factor by which a layer is scaled cancels *tensor by
    tensor*. That is the difference from ``l2{normalizer=lamp}``, which first adds up the squares of all coupled
    tensors and then takes one relative distortion of the group: there the layer of the largest weights decides.

    The greatest weight, or part of a slice, of each tensor scores exactly 1; ties go by position. Parameters of one
    dimension (biases, norms) do not count. A group that is in no weight scores its squared magnitude in place of it,
    scaled to the same mean, and the report says so.

    Args:
        unit: what the distortion is measured of, ``weight`` by ``weight`` as published, or a tensor's whole
            ``channel``.
        scope: whom scores are compared with. Of one ``role`` (heads, channels …) they are turned into ranks, from 0
            to 1 in each role, so that one threshold for all cuts the same share of each; ``model`` leaves them.
        normalizer: how groups are made comparable, a key of `NORMALIZERS`.

    Source: Lee et al. 2021 (LAMP), arXiv:2010.07611, equation 3; the ranking by module class as in DIMAP.
    """

    name: ClassVar[str] = "lamp"
    unit: Literal["weight", "channel"] = "channel"
    scope: Literal["model", "role"] = "model"
    normalizer: str = "distortion"

    def score(self, context: ScoreContext) -> Scores:
        """Return the normalised scores."""
        weights = context.parameters.only(lambda parameter: parameter.dim() > 1)
        found = by_weight(context, weights) if self.unit == "weight" else by_channel(context, weights)
        scores = normalize(with_magnitudes(found, context, "it is in no weight"), self.normalizer, context)
        return _ranks(scores, context) if self.scope == "role" else scores


def by_weight(context: ScoreContext, weights: Mapping[str, Tensor]) -> Scores:
    """Return the mean over the tensors of the sum of the weights' scores, for the groups that are in one."""
    sums = slice_sums(context, _WeightScores(weights))
    tensors = _tensors_of(context, weights)
    return {group: sums[group] / len(names) for group, names in tensors.items() if names}


def by_channel(context: ScoreContext, weights: Mapping[str, Tensor]) -> Scores:
    """Return the mean over the tensors of the scores of a tensor's slices, for the groups that are in one."""
    found = {}
    tensors = _tensors_of(context, weights)
    held: dict[str, list[str]] = {}
    for group, names in tensors.items():
        for name in names:
            held.setdefault(name, []).append(group)
    squares: dict[str, Scores] = {}
    for name, groups in held.items():
        sums = slice_sums(context, {name: weights[name]}, _squares)
        squares[name] = {group: sums[group] for group in groups}
    for group, names in tensors.items():
        if names:
            found[group] = np.mean([normalizers.lamp(squares[name][group]) for name in names], axis=0)
    return found


class _WeightScores(Mapping[str, Tensor]):
    """The scores of the single weights of each tensor, in float64; made when asked for, as they are large."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        squares = _squares(weight).flatten().numpy(force=True)
        return torch.from_numpy(normalizers.lamp(squares)).reshape(weight.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights


def _tensors_of(context: ScoreContext, weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return, for each group, the weights that hold its indices."""
    return {
        group.name: list(dict.fromkeys(place.tensor for place in group.places if place.tensor in weights))
        for group in context.typing.groups
    }


def _squares(weight: Tensor) -> Tensor:
    return in_float(weight).double().square()


def _ranks(scores: Scores, context: ScoreContext) -> Scores:
    """Return the share of its role's indices that each index outranks, itself included; ties go by position."""
    roles: dict[str, list[str]] = {}
    for group in context.typing.groups:
        roles.setdefault(group.role, []).append(group.name)
    ranks: Scores = {}
    for names in roles.values():
        together = np.concatenate([scores[name] for name in names])
        found = np.empty_like(together)
        found[np.argsort(together, kind="stable")] = np.arange(1, len(together) + 1) / len(together)
        ends = np.cumsum([len(scores[name]) for name in names])
        ranks |= dict(zip(names, np.split(found, ends[:-1]), strict=True))
    return ranks
