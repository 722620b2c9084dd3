"""Accumulate first and second moments of values that come batch by batch.

What may live here: sums that merge. They are in float64 and centred: a mean that is large against the spread costs no
digits, however the values are cut into batches.

Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", The American Statistician 37(3),
equations 2.1a and 2.1b.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["CoMoments", "Moments", "rows"]

_CHUNK: Final = 1 << 22
"""How many entries are turned into float64 at a time."""


def rows(values: Tensor, dim: int) -> Tensor:
    """Return ``values`` as ``(count, n)``: dimension ``dim``, of size n, last, and all others as one."""
    return values.detach().movedim(dim, -1).reshape(-1, values.shape[dim])


class Moments:
    """Accumulate count, mean and variance of each index of one dimension, over all other dimensions.

    Attributes:
        count: How many values there were for each index.
        mean: Their mean, ``(n,)``, float64.
        scatter: The sum of their squared deviations from the mean, ``(n,)``, float64.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, values: Tensor, dim: int = -1) -> None:
        """Take in ``values``, whose dimension ``dim`` is the one that is kept."""
        for chunk in _chunks(rows(values, dim)):
            found = Moments.__new__(Moments)
            found.count = len(chunk)
            found.mean = chunk.mean(0)
            found.scatter = (chunk - found.mean).square().sum(0)
            self.merge(found)

    def merge(self, other: Moments) -> None:
        """Take in all that another one has seen."""
        count = self.count + other.count
        if other.count:
            gap = other.mean - self.mean
            self.scatter = self.scatter + other.scatter + gap.square() * (self.count * other.count / count)
            self.mean = self.mean + gap * (other.count / count)
        self.count = count

    @property
    def variance(self) -> Tensor:
        """The mean squared deviation from the mean (the population's variance, divided by the count)."""
        return self.scatter / max(self.count, 1)

    @property
    def mean_square(self) -> Tensor:
        """The mean of the squares."""
        return self.variance + self.mean.square()


class CoMoments:
    """Accumulate means and the centred matrix of products of paired rows: a Gram matrix where both are the same.

    With rows ``x_i`` of size n and ``y_i`` of size m, the matrix is ``Σ_i (x_i − mean x)(y_i − mean y)ᵀ``. There may be
    several such pairs side by side, the groups of a convolution: then everything has a dimension in front, of size g.

    Attributes:
        count: How many pairs of rows there were.
        means: Their means, ``(g, n)`` and ``(g, m)``, float64.
        scatter: The centred matrices of products, ``(g, n, m)``, float64.
    """

    def __init__(self, size: int, other: int, groups: int = 1, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.means = (
            torch.zeros(groups, size, dtype=torch.float64, device=device),
            torch.zeros(groups, other, dtype=torch.float64, device=device),
        )
        self.scatter = torch.zeros(groups, size, other, dtype=torch.float64, device=device)

    def add(self, left: Tensor, right: Tensor | None = None) -> None:
        """Take in rows ``(g, count, n)`` and those they are paired with, ``(g, count, m)``; by default themselves."""
        step = max(1, _CHUNK // max(1, left.shape[0] * left.shape[2]))
        for start in range(0, left.shape[1], step):
            x = left[:, start : start + step].detach().double()
            y = x if right is None else right[:, start : start + step].detach().double()
            means = (x.mean(1), y.mean(1))
            centred = x - means[0].unsqueeze(1)
            other = centred if right is None else y - means[1].unsqueeze(1)
            self._take(x.shape[1], means, centred.mT @ other)

    def merge(self, other: CoMoments) -> None:
        """Take in all that another one has seen."""
        self._take(other.count, other.means, other.scatter)

    @property
    def products(self) -> Tensor:
        """The matrices of products of the rows as they are, not centred: ``Σ_i x_i y_iᵀ``."""
        return torch.baddbmm(
            self.scatter, self.means[0].unsqueeze(2), self.means[1].unsqueeze(1), alpha=float(self.count)
        )

    @property
    def covariance(self) -> Tensor:
        """The covariances of paired rows (the population's, divided by the count), ``(g, n, m)``."""
        return self.scatter / max(self.count, 1)

    def _take(self, added: int, means: tuple[Tensor, Tensor], scatter: Tensor) -> None:
        count = self.count + added
        if added:
            gaps = (means[0] - self.means[0], means[1] - self.means[1])
            # In place, for the matrix is the one thing here that can be large; it is nobody else's.
            self.scatter += scatter
            self.scatter.baddbmm_(gaps[0].unsqueeze(2), gaps[1].unsqueeze(1), alpha=self.count * added / count)
            self.means = (self.means[0] + gaps[0] * (added / count), self.means[1] + gaps[1] * (added / count))
        self.count = count


def _chunks(values: Tensor) -> list[Tensor]:
    return [chunk.double() for chunk in values.split(max(1, _CHUNK // max(1, values.shape[1])))] if len(values) else []
