"""Score by what the operators that read a group lose when its fluctuation goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from graphopt.axes.algebra import Atom, Axis
from graphopt.axes.infer import Typing
from graphopt.errors import PassError, PipelineError
from graphopt.importance.calibration import batches
from graphopt.importance.consumers import Consumer, Contraction, consumer_of, contraction_of
from graphopt.importance.criterion import ScoreContext, Scores
from graphopt.importance.fallback import with_magnitudes
from graphopt.importance.normalizers import normalize
from graphopt.importance.slices import project
from graphopt.moments import CoMoments, Moments
from graphopt.sweep import Sweep

__all__ = ["InputFluctuation"]

Floats = npt.NDArray[np.float64]
OUTPUTS = 1 << 22
"""How many entries of a weight are held in float64 at a time."""

Metric = Literal["wifv", "ifv", "wifn"]


@dataclass(frozen=True)
class InputFluctuation:
    """Score an index by the fluctuation of what its consumers read there, weighted with how they read it.

    A consumer (a linear layer, a convolution, a product with a parameter) is read in columns: column p of a row sees
    the values ``x_pk`` of taps k, one for a matrix, as many as the kernel has places for a convolution, and adds
    ``Σ_k w_pok x_pk`` to output o. Over all rows of all calibration batches (for a convolution over n, h and w of its
    result), with the covariance C_p of the taps and population moments, a column scores by ``metric``:

    - ``wifv``: ``Σ_o w_poᵀ C_p w_po``, for a matrix ``Var(x_p) ‖w_p‖²``. That is exactly the expected squared error of
      the consumer's output, summed over outputs, when the column is deleted and the mean of what it added,
      ``Σ_k w_pok mean(x_pk)``, goes into the bias. At places whose windows reach into zero padding the taps see other
      values, and the same bias, a constant, is less right there: the score counts that, too. Where no window does,
      and the taps' means agree, the bias is that of the kernel-summed weight times the channel's mean.
    - ``ifv``: ``Var(x_p)``, each value once.
    - ``wifn``: ``mean_ok |w_pok| √(mean x_p²)``.

    An index scores the sum over its columns (a head has one a head dimension) and over all consumers. That leaves out
    covariances between columns, as FLAP does; FLAP's mean over the columns of a head differs by a factor that every
    relative normaliser cancels. A matrix that reads and writes the same group counts the rows that go along.

    The width of queries and keys meets no constants. Its column adds ``q_l k_s`` to the product of query l and key s,
    and softmax is blind to what all keys of a query have in common. In attention it scores
    ``mean_l q_l² · Var_s(k_s)``, the squared error that softmax sees, averaged over samples and heads; in a product
    written out, of which it is not known what follows, ``mean_l q_l² · mean_s k_s²``. (``ifv`` leaves out the first
    factor; ``wifn`` is as above, with |q_l| for the weight.) Any other group that nothing reads scores its squared
    magnitude, scaled to the same mean, and the report says so.

    Needs calibration data without labels. The model runs once; moments are in float64 and centred, whatever the
    batches' sizes.

    Args:
        metric: what a column scores.
        batches: how many batches to use; 0 for all.
        normalizer: how groups are made comparable, a key of `NORMALIZERS`. FLAP's own is ``zscore``, which says how
            far an index is from its group's mean, and nothing of how much the group can lose: weighed against cost,
            it empties groups.

    Source: An et al. 2024 (FLAP), arXiv:2312.11983, section 3; covariance of taps and query-key widths are our own.
    """

    name: ClassVar[str] = "input-fluctuation"
    metric: Metric = "wifv"
    batches: int = 0
    normalizer: str = "distortion"

    def score(self, context: ScoreContext) -> Scores:
        """Return the normalised scores.

        Raises:
            PipelineError: there is no calibration data, or no group is read by an operator with constant weights.
            PassError: the values of some consumer are not finite.
        """
        if context.calibration is None:
            raise PipelineError(
                f"the criterion {self.name} needs activations: pass calibration=[inputs, …], "
                "or choose a criterion that looks at the parameters alone, such as l2"
            )
        typing = context.typing
        found = islice(batches(context.calibration, typing.graph), self.batches or None)
        sweep = Sweep(typing.graph, [(batch.args, batch.kwargs) for batch in found])
        losses = _Losses(typing)
        for node in sweep:
            if sweep.batch_count == 0:
                raise PipelineError(
                    f"the criterion {self.name} needs activations, and the calibration data holds no batch"
                )
            consumer = consumer_of(node, typing, sweep.is_constant)
            if consumer is not None and losses.concern(consumer.summed):
                losses.add(node, consumer.axis, consumer.summed, self._of_consumer(consumer, sweep))
                continue
            contraction = contraction_of(node, typing, sweep.is_constant)
            if contraction is not None and losses.concern(contraction.summed):
                losses.add(node, contraction.axis, contraction.summed, self._of_contraction(contraction, sweep))
        if not losses.by_group():
            raise PipelineError(
                f"the criterion {self.name} needs a group that a linear layer, a convolution or a matrix product "
                "reads, and the graph has none: choose a criterion that looks at the parameters alone, such as l2"
            )
        scores = with_magnitudes(losses.by_group(), context, "no linear layer, convolution or matrix product reads it")
        return normalize(scores, self.normalizer, context)

    def _of_consumer(self, consumer: Consumer, sweep: Sweep) -> Tensor:
        """Return the score of each column of a consumer."""
        weight = consumer.columns(sweep.value(consumer.weight, 0).detach())
        values = sweep.values(consumer.source)
        if self.metric == "wifv":
            blocks = CoMoments(weight.shape[2], weight.shape[2], groups=weight.shape[0], device=weight.device)
            for x in values:
                for piece in consumer.taps(x):
                    blocks.add(piece.transpose(0, 1))
            covariance = blocks.covariance
            return _over_outputs(weight, lambda w: torch.einsum("pok,pkl,pol->p", w, covariance, w))
        moments = Moments(len(weight), weight.device)
        for x in values:
            moments.add(consumer.rows(x))
        if self.metric == "ifv":
            return moments.variance
        mean = _over_outputs(weight, lambda w: w.abs().sum((1, 2))) / (weight.shape[1] * weight.shape[2])
        return mean * moments.mean_square.sqrt()

    def _of_contraction(self, contraction: Contraction, sweep: Sweep) -> Tensor:
        """Return the score of each column of a product of queries and keys, averaged over samples and heads."""
        total, count = torch.zeros(contraction.axis.size, dtype=torch.float64), 0
        pairs = zip(sweep.values(contraction.query), sweep.values(contraction.key), strict=True)
        for query, keys in pairs:
            q, k = contraction.lay(query.detach().double(), keys.detach().double())
            read, weighed = self._of_keys(k, contraction.in_softmax), self._of_queries(q)
            if weighed.dim() > 1 and weighed.shape[-2] % read.shape[-2] == 0:
                # Several query heads may share a key head.
                weighed = weighed.unflatten(-2, (read.shape[-2], -1)).mean(-2)
            scores = (weighed * read).reshape(-1, len(total))
            total = total.to(scores.device) + scores.sum(0)
            count += len(scores)
        return total / max(count, 1)

    def _of_keys(self, keys: Tensor, in_softmax: bool) -> Tensor:
        if self.metric == "wifn":
            return keys.square().mean(-2).sqrt()
        return keys.var(-2, correction=0) if in_softmax or self.metric == "ifv" else keys.square().mean(-2)

    def _of_queries(self, queries: Tensor) -> Tensor:
        if self.metric == "ifv":
            return torch.ones_like(queries[..., 0, :])
        return queries.abs().mean(-2) if self.metric == "wifn" else queries.square().mean(-2)


def _over_outputs(weight: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Add up what some outputs at a time of ``(columns, outputs, taps)`` score, in float64: a copy is never whole."""
    count = max(1, OUTPUTS // max(1, weight.shape[0] * weight.shape[2]))
    total = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for some in weight.split(count, dim=1):
        total += score(some.double())
    return total


class _Losses:
    """Add up what columns score by the indices that they hold."""

    def __init__(self, typing: Typing) -> None:
        self._names = {group.atom: group.name for group in typing.groups}
        self._sums: dict[Atom, Floats] = {}

    def concern(self, atoms: frozenset[Atom]) -> bool:
        """Say whether one of the atoms is that of a group."""
        return not atoms.isdisjoint(self._names)

    def add(self, node: fx.Node, axis: Axis, summed: frozenset[Atom], columns: Tensor) -> None:
        """Add the scores of the columns of a node, one a position of the axis, to the groups that it sums over."""
        if not bool(torch.isfinite(columns).all()):
            raise PassError(
                f"what {node.name} reads in the calibration data is not finite: look at the data and at the layers "
                "before it"
            )
        for atom in summed & self._names.keys():
            self._sums.setdefault(atom, np.zeros(atom.size))
        project(axis, columns.numpy(force=True), {a: s for a, s in self._sums.items() if a in summed})

    def by_group(self) -> Scores:
        """Return the scores of the groups that something reads."""
        return {self._names[atom]: sums for atom, sums in self._sums.items()}
