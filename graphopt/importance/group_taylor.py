"""Score by the squared first-order change of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from graphopt.errors import PassError, PipelineError
from graphopt.importance.calibration import Batch, batches, classification_loss
from graphopt.importance.criterion import ScoreContext, Scores
from graphopt.importance.normalizers import normalize
from graphopt.importance.slices import in_float, slice_sums

if TYPE_CHECKING:
    from graphopt.axes.groups import Group

__all__ = ["GroupTaylor"]

HEADS = frozenset({"heads", "kv heads", "query heads per kv head"})
DIVISORS = {**dict.fromkeys(HEADS, 6), "qk dim": 2, "head dim": 2}
"""NViT's constants by role; that of an embedding channel is counted."""


@dataclass(frozen=True)
class GroupTaylor:
    """Score an index by the squared first-order change of the loss when its whole slice goes.

    With S the parameters in the slice of an index and L the loss of one batch the score is the mean over the batches
    of ``(Σ_{w in S} w · ∂L/∂w)²``. The square is taken after the sum: contributions of opposite sign inside a slice
    cancel, as they do in the loss. For a loss that is linear in the parameters it equals the true squared change.
    Scores are in one unit, the loss's square, and comparable across groups as they are.

    Batches should be small. A trained model's gradient averages out over a large batch, and what is left of it is
    noise; squared batch by batch it estimates the curvature of the loss (the empirical Fisher information), the better
    the smaller the batch. One sample a batch is best, and costs a backward pass a sample.

    Slices of different kinds are of different size: an embedding channel of a transformer runs through every block.
    With ``component=nvit`` the sum of a slice is divided, before it is squared, by a constant of its kind, as in NViT:
    an embedding channel by the number of blocks it runs through, a head by 6, an index of the query-key width by 2,
    any other by 1. Kinds are told by the group's role; blocks are counted by the groups of heads whose projections
    have the channel, so a stage of a hierarchical transformer counts its own. A head width that queries, keys and
    values share is divided as the query-key width; 6 is half of NViT's number of blocks, and not adapted. A constant
    for a whole group cancels under a normaliser that is relative to the group, so this asks for ``normalizer=none``.

    Needs calibration data with labels, or with a loss that takes none.

    Args:
        batches: how many batches to use; 0 for all.
        component: ``nvit`` divides the sums by constants of their kind; ``none`` does not.
        normalizer: how groups are made comparable, a key of `NORMALIZERS`; as they are, by default.

    Raises:
        PipelineError: a component normaliser is combined with one that cancels it.

    Source: Molchanov et al. 2019, arXiv:1906.10771, equation 8; Yang et al. 2023 (NViT), arXiv:2110.04869, section 3.
    """

    name: ClassVar[str] = "group-taylor"
    batches: int = 0
    component: Literal["none", "nvit"] = "none"
    normalizer: str = "none"

    def __post_init__(self) -> None:
        if self.component != "none" and self.normalizer != "none":
            raise PipelineError(
                f"{self.name}: component={self.component} scales whole groups, and normalizer={self.normalizer} is "
                "relative to the group, so one would undo the other: leave one of them out"
            )

    def score(self, context: ScoreContext) -> Scores:
        """Return the normalised scores.

        Raises:
            PipelineError: there is no calibration data, or the loss is not a scalar tensor.
            PassError: the loss of a batch is not finite.
        """
        if context.calibration is None:
            raise PipelineError(
                f"the criterion {self.name} needs gradients: pass calibration=[(inputs, labels), …], "
                "or choose a criterion that looks at the parameters alone, such as l2"
            )
        hollow = context.typing.graph.hollow
        if hollow:
            raise PipelineError(
                f"the criterion {self.name} needs gradients, and {hollow[0]} has no values in memory: load them, or "
                "choose a criterion that reads them one by one, such as l2"
            )
        totals: Scores = {}
        divisors = nvit_divisors(context.typing.groups) if self.component == "nvit" else {}
        count = 0
        found = batches(context.calibration, context.typing.graph)
        for batch in islice(found, self.batches or None):
            products = self._products(context, batch, count)
            for group, sums in slice_sums(context, products).items():
                totals[group] = totals.get(group, 0.0) + (sums / divisors.get(group, 1)) ** 2
            count += 1
        if count == 0:
            raise PipelineError(f"the criterion {self.name} needs gradients, and the calibration data holds no batch")
        return normalize({g: s / count for g, s in totals.items()}, self.normalizer, context)

    def _products(self, context: ScoreContext, batch: Batch, index: int) -> dict[str, Tensor]:
        """Return parameter times gradient, by name. The graph's own tensors and gradients are not touched."""
        weights = {n: p.detach().requires_grad_() for n, p in context.parameters.items()}
        with torch.enable_grad():
            outputs = functional_call(context.typing.graph.module, weights, batch.args, batch.kwargs)
            loss: Any = (context.loss or classification_loss)(outputs, batch.labels)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise PipelineError(f"the loss must return a tensor with one element; found {shape} for batch {index}")
            if not torch.isfinite(loss):
                raise PassError(
                    f"the loss of calibration batch {index} is {loss.item()}; look at the batch, or leave it out"
                )
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                loss.reshape(()), list(weights.values()), allow_unused=True
            )
        return {
            name: in_float(weight) * in_float(gradient)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            if gradient is not None
        }


def nvit_divisors(groups: Sequence[Group]) -> dict[str, int]:
    """Return what the sums of each group's slices are divided by."""
    tensors = {group.name: {place.tensor for place in group.places} for group in groups}
    blocks = [tensors[group.name] for group in groups if group.role in HEADS - {"query heads per kv head"}]

    def divisor(group: Group) -> int:
        if group.role != "channels":
            return DIVISORS.get(group.role, 1)
        return max(1, sum(not block.isdisjoint(tensors[group.name]) for block in blocks))

    return {group.name: divisor(group) for group in groups}
