"""The groups of characteristic modules, as text; and that nothing is frozen without need, whatever the sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.axes.characters import CHARACTERS
from tests.dialects.checks import check, text, typed

_SECTIONS = Path(__file__).with_name("characters.txt").read_text(encoding="utf-8").split("== ")[1:]
GOLDEN = {name: body for name, _, body in (section.strip().partition("\n") for section in _SECTIONS)}


def test_every_character_has_its_text() -> None:
    assert list(GOLDEN) == list(CHARACTERS)


@pytest.mark.parametrize("name", CHARACTERS)
def test_a_character(name: str) -> None:
    """Its groups are those written down, and pruned as the masked module is."""
    make, sample = CHARACTERS[name]
    x = sample()
    found = check(make(), [x], [[torch.cat([x, x[:1]])]])
    assert text(found.typing) == GOLDEN[name]


# -- whatever the sizes ------------------------------------------------------------------------------------------------

SIZES = st.integers(2, 6)


def groups(module: nn.Module, *shape: int) -> Counter[tuple[str, int]]:
    """Return roles and sizes of the groups."""
    return Counter((g.role, g.size) for g in typed(module, torch.randn(shape).double()).groups)


class Attention(nn.Module):
    """Grouped-query attention, packed or not, whose every width may be drawn."""

    def __init__(self, kv: int, shared: int, dim: int, value: int, *, packed: bool) -> None:
        super().__init__()
        self.shape, self.packed = (kv, shared, dim, value), packed
        self.sizes = [kv * shared * dim, kv * dim, kv * value]
        self.all, self.parts = nn.Linear(5, sum(self.sizes)), nn.ModuleList(nn.Linear(5, n) for n in self.sizes)
        self.out = nn.Linear(kv * shared * value, 7)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        kv, shared, _, _ = self.shape
        parts = self.all(x).split(self.sizes, -1) if self.packed else [p(x) for p in self.parts]
        q, k, v = (p.view(b, n, h, -1).transpose(1, 2) for p, h in zip(parts, (kv * shared, kv, kv), strict=True))
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


@settings(max_examples=8)
@given(SIZES, st.integers(1, 4), SIZES, SIZES, st.booleans())
def test_heads_and_widths_of_attention_are_free(kv: int, shared: int, dim: int, value: int, packed: bool) -> None:
    expected = {("qk dim", dim): 1}
    expected[("v dim", value)] = 1
    if shared > 1:
        expected |= {("kv heads", kv): 1, ("query heads per kv head", shared): 1}
    else:
        expected[("heads", kv)] = 1
    assert groups(Attention(kv, shared, dim, value, packed=packed), 3, 4, 5) == Counter(expected)


class Convolutions(nn.Module):
    """A grouped convolution between others, then a gated perceptron."""

    def __init__(self, count: int, wide: int, out: int, hidden: int) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, count * wide, 3), nn.Conv2d(count * wide, count * out, 1, groups=count)
        self.last, self.gated = nn.Conv2d(count * out, 7, 1), nn.Linear(7, 2 * hidden)
        self.score = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.grouped(self.first(x).relu()).relu()).mean((2, 3))
        return self.score(functional.glu(self.gated(y), -1))


@settings(max_examples=8)
@given(SIZES, SIZES, SIZES, SIZES)
def test_channels_of_convolutions_are_free(count: int, wide: int, out: int, hidden: int) -> None:
    found = groups(Convolutions(count, wide, out, hidden), 2, 3, 4, 5)
    inside = "channels in each conv group"
    assert found == Counter(
        [("conv groups", count), (inside, wide), (inside, out), ("channels", 7), ("channels", hidden)]
    )


class Uneven(nn.Module):
    """Concatenate, cut elsewhere, add and cut again: parts are as large as all the cuts together allow."""

    def __init__(self, a: int, b: int, c: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, a), nn.Linear(5, b + c), nn.Linear(5, a + b)
        self.cut, self.last = c, nn.Linear(a + b + c, 2)

    def forward(self, x: Tensor) -> Tensor:
        left = torch.cat([self.a(x), self.b(x)], 1)
        right = torch.cat([self.c(x), left[:, -self.cut :]], 1)
        return self.last(left * right)


@settings(max_examples=8)
@given(SIZES, SIZES, SIZES)
def test_parts_are_cut_no_finer_than_needed(a: int, b: int, c: int) -> None:
    assert groups(Uneven(a, b, c), 3, 5) == Counter([("channels", a), ("channels", b), ("channels", c)])
