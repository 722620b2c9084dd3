"""Check the moments that are accumulated batch by batch against those of all values at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import moments
from graphopt.moments import CoMoments, Moments, rows

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=50)
@given(lengths, st.sampled_from([0.0, 1e4]), st.integers(0, 99))
def test_moments_are_those_of_all_values(counts: list[int], offset: float, seed: int) -> None:
    values = (drawn(seed, sum(counts), 3) + offset).float()
    found = Moments(3)
    for part in values.split(counts):
        found.add(part)
    exact = values.double()
    assert found.count == sum(counts)
    torch.testing.assert_close(found.mean, exact.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.variance, exact.var(0, unbiased=False), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.mean_square, exact.square().mean(0), rtol=1e-12, atol=1e-12)


@settings(max_examples=50)
@given(lengths, st.sampled_from([0.0, 1e4]), st.integers(0, 99))
def test_products_are_those_of_all_rows(counts: list[int], offset: float, seed: int) -> None:
    x, y = (drawn(seed, 2, sum(counts), 3) + offset).float(), drawn(seed + 1, 2, sum(counts), 2) - 2 * offset
    gram, cross = CoMoments(3, 3, groups=2), CoMoments(3, 2, groups=2)
    for a, b in zip(x.split(counts, 1), y.split(counts, 1), strict=True):
        gram.add(a)
        cross.add(a, b)
    left, right = x.double() - x.double().mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    torch.testing.assert_close(gram.scatter, left.mT @ left, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cross.scatter, left.mT @ right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cross.means, (x.double().mean(1), y.mean(1)), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(cross.products, x.double().mT @ y, rtol=1e-12, atol=1e-9)
    assert gram.count == cross.count == sum(counts)


@settings(max_examples=50)
@given(lengths, st.sampled_from([0.0, 1e4]), st.integers(0, 99))
def test_blocks_have_the_covariances_of_all_rows(counts: list[int], offset: float, seed: int) -> None:
    values = (drawn(seed, sum(counts), 4, 3) + offset).float()
    found, first, second = (CoMoments(3, 3, groups=4) for _ in range(3))
    for i, part in enumerate(values.split(counts)):
        found.add(part.transpose(0, 1))
        (first if i % 2 else second).add(part.transpose(0, 1))
    first.merge(second)
    for block in range(4):
        exact = torch.cov(values[:, block].double().mT, correction=0)
        torch.testing.assert_close(found.covariance[block], exact, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(first.covariance[block], exact, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.means[0], values.double().mean(0), rtol=1e-12, atol=1e-12)
    assert found.count == first.count == sum(counts)


@settings(max_examples=30)
@given(lengths, lengths, st.integers(0, 99))
def test_merging_is_seeing_both(first: list[int], second: list[int], seed: int) -> None:
    x = drawn(seed, sum(first) + sum(second), 4) + 7
    left, right, both = Moments(4), Moments(4), Moments(4)
    grams = CoMoments(4, 4), CoMoments(4, 4), CoMoments(4, 4)
    parts = x.split([*first, *second])
    for i, part in enumerate(parts):
        (left if i < len(first) else right).add(part)
        grams[0 if i < len(first) else 1].add(part[None])
        both.add(part)
        grams[2].add(part[None])
    left.merge(right)
    grams[0].merge(grams[1])
    torch.testing.assert_close(left.scatter, both.scatter)
    torch.testing.assert_close(grams[0].scatter, grams[2].scatter)
    assert left.count == both.count == grams[0].count == grams[2].count


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_all_dimensions_but_one_are_summed_over(dim: int) -> None:
    x = drawn(0, 3, 4, 5)
    found = Moments(x.shape[dim])
    found.add(x, dim)
    others = [d for d in range(3) if d != dim % 3]
    assert found.count == 60 // x.shape[dim]
    torch.testing.assert_close(found.mean, x.mean(others))
    torch.testing.assert_close(found.variance, x.var(others, unbiased=False))
    assert rows(x, dim).shape == (found.count, x.shape[dim])


def test_long_values_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(0, 50, 3) + 100
    whole, cut = (Moments(3), CoMoments(3, 3)), (Moments(3), CoMoments(3, 3))
    whole[0].add(x)
    whole[1].add(x[None])
    monkeypatch.setattr(moments, "_CHUNK", 7)
    cut[0].add(x)
    cut[1].add(x[None])
    torch.testing.assert_close(whole[0].scatter, cut[0].scatter)
    torch.testing.assert_close(whole[1].scatter, cut[1].scatter)
    assert cut[0].count == cut[1].count == 50


def test_nothing_seen_is_no_division_by_zero() -> None:
    found = Moments(2)
    found.add(torch.empty(0, 2))
    assert found.count == 0
    assert found.variance.tolist() == [0.0, 0.0]
