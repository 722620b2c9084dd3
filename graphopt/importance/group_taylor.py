"""Score by the squared first-order change of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from graphopt.errors import PassError, PipelineError
from graphopt.importance.calibration import Batch, batches, classification_loss
from graphopt.importance.criterion import ScoreContext, Scores
from graphopt.importance.normalizers import normalize
from graphopt.importance.slices import in_float, slice_sums

__all__ = ["GroupTaylor"]


@dataclass(frozen=True)
class GroupTaylor:
    """Score an index by the squared first-order change of the loss when its whole slice goes.

    With S the parameters in the slice of an index and L the loss of one batch the score is the mean over the batches
    of ``(Σ_{w in S} w · ∂L/∂w)²``. The square is taken after the sum: contributions of opposite sign inside a slice
    cancel, as they do in the loss. For a loss that is linear in the parameters it equals the true squared change.

    Needs calibration data with labels, or with a loss that takes none.

    Args:
        batches: how many batches to use; 0 for all.
        normalizer: how groups are made comparable, a key of `NORMALIZERS`.

    Source: Molchanov et al. 2019, arXiv:1906.10771, equation 8; Yang et al. 2023 (NViT), arXiv:2110.04869, section 3.
    """

    name: ClassVar[str] = "group-taylor"
    batches: int = 0
    normalizer: str = "distortion"

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
        totals: Scores = {}
        count = 0
        found = batches(context.calibration, context.typing.graph)
        for batch in islice(found, self.batches or None):
            products = self._products(context, batch, count)
            for group, sums in slice_sums(context, products).items():
                totals[group] = totals.get(group, 0.0) + sums**2
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
