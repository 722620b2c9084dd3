"""Inference as an adversary would test it: what must be tied, what must be free, what is normalised over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.dialects.checks import check, reasons, typed


def normalised(module: nn.Module, *inputs: Tensor) -> dict[str, bool]:
    """Check a module; return for each place of a group whether it is normalised over."""
    found = check(module, inputs)
    return {str(place): bool(g.normalised) for g in found.typing.groups for place in g.places}


# -- sums over what is not zero ----------------------------------------------------------------------------------------


class ComputedWeight(nn.Module):
    """Contract with weights that are computed, so that removed entries of neither operand are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(5, 8), nn.Parameter(torch.zeros(3, 8))
        self.plain, self.scale = nn.Linear(5, 6), nn.Parameter(torch.zeros(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        exposed = functional.linear(self.first(x).sigmoid(), self.weight.sigmoid())
        return exposed + functional.linear(self.plain(x), self.scale.sigmoid())


def test_a_computed_weight_renormalises_where_no_operand_vanishes() -> None:
    found = normalised(ComputedWeight(), torch.randn(4, 5).double())
    assert found["weight[1]"]
    assert not found["scale[1]"]


class StandardisedWeight(nn.Module):
    """Standardise a convolution's weights over their input channels."""

    def __init__(self, groups: int, transposed: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(12, 2, 1)
        self.conv = nn.ConvTranspose2d(8, 12, 3, groups=groups) if transposed else nn.Conv2d(8, 12, 3, groups=groups)
        self.dims = (0, 2, 3) if transposed else (1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        mean = weight.mean(self.dims, keepdim=True)
        weight = (weight - mean) / (weight.var(self.dims, keepdim=True, unbiased=False) + 1e-5).sqrt()
        function = functional.conv_transpose2d if isinstance(self.conv, nn.ConvTranspose2d) else functional.conv2d
        return self.last(function(self.first(x).sigmoid(), weight, self.conv.bias, groups=self.conv.groups))


def test_weight_standardisation_normalises_over_input_channels_alone() -> None:
    x = torch.randn(2, 3, 5, 5).double()
    for transposed in (False, True):
        found = normalised(StandardisedWeight(1, transposed=transposed), x)
        assert [found["first.weight[0]"], found["last.weight[1]"]] == [True, False]
        check(StandardisedWeight(4, transposed=transposed), [x])


class SummedTwice(nn.Module):
    """Sum one axis under two letters, over an operand that vanishes and over one that does not."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.first, self.equation = nn.Linear(5, 8), equation

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.einsum(self.equation, y, y.sigmoid())


def test_every_letter_of_an_einsum_is_asked_for() -> None:
    x = torch.randn(3, 5).double()
    assert normalised(SummedTwice("bi,bj->b"), x)["first.weight[0]"]
    assert normalised(SummedTwice("bj,bi->b"), x)["first.weight[0]"]
    assert not normalised(SummedTwice("bi,bi->b"), x)["first.weight[0]"]


def test_a_zero_at_one_face_is_not_zero_at_the_other() -> None:
    """Products of a vector that vanishes with one that does not, on the same indices."""

    def zero(y: Tensor) -> tuple[Tensor, Tensor]:
        return y.mean(1), y.mean(1).sigmoid()

    def outer(y: Tensor) -> Tensor:
        a, b = zero(y)
        return (a[:, :, None] * b[:, None, :]).square().sum((1, 2))

    def outer_sum(y: Tensor) -> Tensor:
        a, _ = zero(y)
        return (a[:, :, None] + a[:, None, :]).square().sum((1, 2))

    def matrix(y: Tensor) -> Tensor:
        a, b = zero(y)
        return (torch.bmm(b[:, :, None], a[:, None, :]) @ b[:, :, None]).square().sum((1, 2))

    def spread(y: Tensor) -> Tensor:
        a, _ = zero(y)
        wide = a[:, :, None].expand(-1, -1, a.shape[1])
        return (wide * a.exp()[:, None, :]).square().sum((1, 2))

    assert kinds(lambda y: (y.mean(1)[:, :, None] * y.mean(1)[:, None, :]).square().sum((1, 2)))[1] == "exact"
    for function in (outer, outer_sum, matrix, spread):
        assert kinds(function)[1] == "normalised"


class WrittenThroughViews(nn.Module):
    """Write into memory that other values see: zeros that do not stay zero."""

    def __init__(self) -> None:
        super().__init__()
        self.copied, self.shifted, self.kept = nn.Linear(5, 6), nn.Linear(5, 7), nn.Linear(5, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        padded = x.new_zeros(x.shape[0], 9)
        padded[:, 1:7].copy_(self.copied(x).sigmoid())
        shifted = self.shifted(x)
        shifted[:, None, :].flatten(1).add_(1.0)
        kept = self.kept(x)
        kept[:, 2:5].mul_(2.0)
        return padded.sum(1), shifted.sum(1), kept.sum(1)


def test_writes_through_views_are_seen() -> None:
    found = normalised(WrittenThroughViews(), torch.randn(3, 5).double())
    assert found["copied.weight[0]"]
    assert found["shifted.weight[0]"]
    assert not found["kept.weight[0]"]


# -- attention ---------------------------------------------------------------------------------------------------------


class Latents(nn.Module):
    """Let learned queries attend to the input, one after another or all alike."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.queries, self.key, self.value = nn.Parameter(torch.zeros(1, 6, 8)), nn.Linear(5, 8), nn.Linear(5, 7)
        self.mix, self.causal = nn.Linear(6, 3), causal

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.expand(x.shape[0], -1, -1)
        y = functional.scaled_dot_product_attention(q, self.key(x), self.value(x), is_causal=self.causal)
        return self.mix(y.transpose(1, 2))


def test_causal_attention_fixes_the_order_of_its_queries() -> None:
    x = torch.randn(2, 4, 5).double()
    assert "queries[1]" in normalised(Latents(causal=False), x)
    assert "queries[1]" not in normalised(Latents(causal=True), x)
    assert reasons(typed(Latents(causal=True), x), "queries", 1) == {"causal attention over it"}


# -- what orders or measures places ------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Apply an operator along both dimensions of tokens that have widths ``n`` (free) and ``c`` (free)."""

    def __init__(self, function: Callable[[Tensor], Tensor], n: int = 6, c: int = 8) -> None:
        super().__init__()
        self.width, self.tokens = nn.Linear(5, c), nn.Linear(4, n, bias=False)
        self.function, self.last = function, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(self.width(x).transpose(1, 2)).transpose(1, 2)
        return self.function(y) * self.last


def kinds(function: Callable[[Tensor], Tensor], **sizes: int) -> tuple[str, str]:
    """Return whether tokens and width are frozen, normalised over or exact under a function; check what is free."""
    found = normalised(Tokens(function, **sizes), torch.randn(3, 4, 5).double())
    tokens, width = (found.get(name) for name in ("tokens.weight[0]", "width.weight[0]"))
    return tuple({None: "frozen", True: "normalised", False: "exact"}[each] for each in (tokens, width))  # type: ignore[return-value]


def test_norms_over_free_places() -> None:
    assert kinds(lambda y: functional.instance_norm(y).square().sum((1, 2))) == ("exact", "normalised")
    assert kinds(lambda y: functional.group_norm(y, 3).square().sum((1, 2))) == ("normalised", "normalised")
    assert kinds(lambda y: functional.group_norm(y, 6).square().sum((1, 2))) == ("exact", "normalised")
    assert kinds(lambda y: functional.batch_norm(y, None, None, training=True).square().sum((1, 2))) == (
        "exact",
        "normalised",
    )
    assert kinds(lambda y: functional.layer_norm(y, (6, 8)).square().sum((1, 2))) == ("normalised", "normalised")


def test_norms_of_any_order() -> None:
    assert kinds(lambda y: torch.linalg.vector_norm(y, 3, dim=1).square().sum(1)) == ("exact", "exact")
    assert kinds(lambda y: torch.linalg.vector_norm(y, float("inf"), dim=1).sum(1)) == ("exact", "exact")
    assert kinds(lambda y: torch.linalg.vector_norm(y, -1, dim=1).square().sum(1)) == ("frozen", "exact")
    assert kinds(lambda y: y.norm(p=-2, dim=2).square().sum(1)) == ("exact", "frozen")


def test_quotients_of_zeros_are_not_zero() -> None:
    assert kinds(lambda y: ((y + 0.5) / (y.square() + 0.1)).sum((1, 2))) == ("normalised", "normalised")
    assert kinds(lambda y: (y / (y.square() + 0.1)).sum((1, 2))) == ("exact", "exact")
    assert kinds(lambda y: torch.addcdiv(y, y, y.square() + 1).sum((1, 2))) == ("exact", "exact")


def test_a_pointwise_convolution_that_moves() -> None:
    weight = torch.ones(6, 6, 1).double()
    assert kinds(lambda y: functional.conv1d(y, weight).square().sum((1, 2)))[1] == "exact"
    assert kinds(lambda y: functional.conv1d(y, weight, padding=1).square().sum((1, 2)))[1] == "frozen"
    # size kept, places moved: (7 + 2 * 3 - 1) // 2 + 1 = 7
    assert kinds(lambda y: functional.conv1d(y, weight, stride=2, padding=3).square().sum((1, 2)), c=7)[1] == "frozen"


def test_space_is_fixed_where_it_is_made_of_channels() -> None:
    assert kinds(
        lambda y: (
            functional.pixel_shuffle(y.view(3, 2, 3, 2, 4).transpose(2, 3).flatten(1, 2), 2).square().sum((1, 2, 3))
        )
    )

    def image(y: torch.Tensor) -> torch.Tensor:
        return y[:, :, None].unflatten(3, (2, 4))[:, :, 0]

    assert kinds(lambda y: functional.pixel_unshuffle(image(y), 2).square().sum((1, 2, 3))) == ("exact", "frozen")
    assert kinds(lambda y: functional.unfold(image(y), 2).square().sum((1, 2))) == ("exact", "frozen")
    assert kinds(lambda y: functional.fold(y.repeat(1, 2, 1), (3, 5), 2).square().sum((1, 2, 3))) == (
        "frozen",
        "frozen",
    )


def test_gathering_from_a_longer_axis_fixes_both() -> None:
    index = torch.tensor([2, 0, 1])
    assert kinds(lambda y: y.gather(2, index.expand(3, 6, 3)).square().sum((1, 2))) == ("exact", "frozen")
    assert kinds(lambda y: y.gather(2, index.expand(3, 4, 3)).square().sum((1, 2))) == ("frozen", "frozen")
    assert kinds(lambda y: torch.take_along_dim(y, index.expand(3, 1, 3), 2).square().sum((1, 2)))[1] == "frozen"
    flat = kinds(lambda y: torch.take_along_dim(y.contiguous(), index).square().sum(0, keepdim=True))
    assert flat == ("frozen", "frozen")


def test_a_reshape_freezes_no_more_than_it_mixes() -> None:
    assert kinds(lambda y: y.reshape(y.shape[0], 6, 2, 4).square().sum((1, 2, 3))) == ("exact", "exact")
    # (6, 4) -> (4, 6) mixes; the 2 stands aside

    def mixed(y: Tensor) -> Tensor:
        return y.unflatten(2, (2, 4)).transpose(1, 2).reshape(y.shape[0], 2, 4, 6)

    found = typed(Tokens(lambda y: mixed(y).square().sum((1, 2, 3))), torch.randn(3, 4, 5).double())
    assert [g.size for g in found.groups if g.places[0].tensor == "width.weight"] == [2]
    assert reasons(found, "width.weight", 0) == {"a reshape mixes it with its neighbours"}
