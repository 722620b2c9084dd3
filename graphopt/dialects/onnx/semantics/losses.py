"""Losses against class labels, as models for training hold them."""

from __future__ import annotations

from typing import Any, Final

import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, results

__all__ = ["TABLE"]

_NEVER: Final = -(2**31)
"""A label that nothing has, to ignore none."""


def _likelihood(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> Tensor:
    """Return the negative log-probability of the labels, weighted by class."""
    ignored = _NEVER if ignore_index is None else ignore_index
    return F.nll_loss(x, target.long(), weight, ignore_index=ignored, reduction=reduction)


def _cross_entropy(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    outputs: int = 1,
) -> Any:
    """Return the loss of the softmax of scores, and the log-probabilities."""
    logs = F.log_softmax(scores, 1)
    loss = _likelihood(logs, labels, weights, ignore_index=ignore_index, reduction=reduction)
    return results(outputs, loss, logs)


TABLE: Final[dict[str, Function]] = {
    "NegativeLogLikelihoodLoss": _likelihood,
    "SoftmaxCrossEntropyLoss": _cross_entropy,
}
