"""Solve ridge regressions from moments.

What may live here: the linear algebra of :mod:`~graphopt.passes.recover.ridge_refit`. Nothing here knows graphs.

Throughout, ``a`` are inputs, ``r`` what is missing of the outputs, both per group g; a change ``D (g, n, m)`` of the
weights (transposed) turns what is missing into ``r − a D − c`` with an intercept c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.moments import CoMoments

__all__ = ["Regression", "solve"]


@dataclass(frozen=True)
class Regression:
    """Hold the moments of one regression.

    Attributes:
        gram: Those of the inputs.
        cross: Those of the inputs and what is missing.
        intercept: Whether a constant may be added; without one, moments are about zero.
    """

    gram: CoMoments
    cross: CoMoments
    intercept: bool

    @classmethod
    def empty(
        cls, inputs: int, outputs: int, groups: int, device: torch.device | str = "cpu", *, intercept: bool = True
    ) -> Regression:
        """Make one that has seen nothing."""
        square, oblong = (CoMoments(inputs, other, groups, device) for other in (inputs, outputs))
        return cls(square, oblong, intercept)

    @property
    def count(self) -> int:
        """How many samples there were."""
        return self.gram.count

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Take in samples, ``(g, count, n)`` and ``(g, count, m)``."""
        self.gram.add(inputs)
        self.cross.add(inputs, missing)

    def change(self, strength: float, pull: Tensor) -> Tensor:
        """Return ``argmin_D Σ ‖r − a D − c‖² + λ ‖pull + D‖²``, λ = strength · mean diag of the centred Gram matrix."""
        shrinkage = strength * self.gram.scatter.diagonal(dim1=1, dim2=2).mean(1)
        gram, cross = self._moments()
        return solve(gram, cross - shrinkage[:, None, None] * pull, shrinkage)

    def constant(self, change: Tensor) -> Tensor:
        """Return the intercept that goes best with a change of the weights, ``(g, m)``."""
        if not self.intercept:
            return torch.zeros_like(self.cross.means[1])
        return self.cross.means[1] - torch.einsum("gnm,gn->gm", change, self.gram.means[0])

    def _moments(self) -> tuple[Tensor, Tensor]:
        return (self.gram.scatter, self.cross.scatter) if self.intercept else (self.gram.products, self.cross.products)


def solve(gram: Tensor, cross: Tensor, shrinkage: Tensor) -> Tensor:
    """Return ``(gram + shrinkage · I)⁻¹ cross``, group by group; the least solution where there are many.

    Args:
        gram: positive semidefinite, ``(g, n, n)``.
        cross: ``(g, n, m)``.
        shrinkage: ``(g,)``.
    """
    system = gram.clone()
    system.diagonal(dim1=1, dim2=2).add_(shrinkage[:, None])
    factor, failed = torch.linalg.cholesky_ex(system)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    # A factor with a pivot that is round-off would blow up what is round-off in the right-hand side.
    unsound = (failed != 0) | ~(diagonal.min(1).values > 1e-7 * diagonal.max(1).values)
    if bool(unsound.any()):
        factor = torch.where(unsound[:, None, None], torch.eye(gram.shape[1]).to(gram), factor)
    found = torch.cholesky_solve(cross, factor)
    for g in unsound.nonzero().flatten().tolist():
        values, vectors = torch.linalg.eigh(system[g])
        large = values > values.max().clamp(min=0) * gram.shape[1] * torch.finfo(values.dtype).eps
        inverse = torch.where(large, 1 / torch.where(large, values, 1.0), 0.0)
        found[g] = vectors @ (inverse[:, None] * (vectors.mT @ cross[g]))
    return found
