"""Score by the scale of the batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor, fx

from graphopt.dialects.products import operator_key
from graphopt.errors import PipelineError
from graphopt.graph import Call, Graph
from graphopt.importance.criterion import ScoreContext, Scores
from graphopt.importance.fallback import with_magnitudes
from graphopt.importance.normalizers import normalize
from graphopt.importance.slices import in_float, slice_sums

__all__ = ["BNGamma"]

aten = torch.ops.aten

BATCH_NORMS: Final[dict[Any, str]] = {
    aten.batch_norm.default: "weight",
    aten._native_batch_norm_legit_no_training.default: "weight",
    "BatchNormalization": "scale",
}
"""The argument of each batch norm that holds its scale."""


@dataclass(frozen=True)
class BNGamma:
    """Score an index by the absolute scale |γ| of the batch norms over it.

    A batch norm makes its input's deviation 1 and multiplies by γ, so |γ| is the deviation of what a channel hands on:
    the size of its signal, whatever the weights before it are scaled by. The shift β does not count: a channel with
    γ = 0 hands on a constant, which the bias of what reads it can take over.

    A group that several batch norms have, as a residual width, scores their mean or their sum. A group that none has
    (the hidden width of a perceptron, a head) scores its squared magnitude in place of it, scaled to the same mean,
    and the report says so of each. Folding batch norms into their convolutions takes the criterion's ground away: score
    before.

    Args:
        over: what a group with several batch norms scores: the mean of their |γ|, or the sum.
        normalizer: how groups are made comparable, a key of `NORMALIZERS`.

    Source: Liu et al. 2017 (network slimming), arXiv:1708.06519, section 3.
    """

    name: ClassVar[str] = "bn-gamma"
    over: Literal["mean", "sum"] = "mean"
    normalizer: str = "distortion"

    def score(self, context: ScoreContext) -> Scores:
        """Return the normalised scales.

        Raises:
            PipelineError: no group has a batch norm with a scale.
        """
        scales = {
            name: context.parameters[name] for name in _scales(context.typing.graph) if name in context.parameters
        }
        sums = slice_sums(context, scales, _magnitudes)
        counts = slice_sums(context, scales, _ones)
        found = {g: sums[g] / counts[g] if self.over == "mean" else sums[g] for g in sums if counts[g].all()}
        if not found:
            count = sum(1 for _ in _batch_norms(context.typing.graph))
            raise PipelineError(
                f"the criterion {self.name} needs a group with a batch norm that has a weight; the graph has {count} "
                f"batch norms, none of them with a weight over a group that can shrink: score before they are folded "
                "away, or choose a criterion that needs none, such as l2"
            )
        return normalize(with_magnitudes(found, context, "no batch norm has it"), self.normalizer, context)


def _batch_norms(graph: Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "call_function" and operator_key(node) in BATCH_NORMS)


def _scales(graph: Graph) -> dict[str, None]:
    """Return the names of the tensors that batch norms scale by, each once, in graph order."""
    weights = [Call(node)[BATCH_NORMS[operator_key(node)]] for node in _batch_norms(graph)]
    return dict.fromkeys(str(w.target) for w in weights if isinstance(w, fx.Node) and w.op == "get_attr")


def _magnitudes(weight: Tensor) -> Tensor:
    return in_float(weight).abs()


def _ones(weight: Tensor) -> Tensor:
    return torch.ones_like(in_float(weight))
