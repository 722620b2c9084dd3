"""Sums over slices against the definition: every element once for each index it belongs to."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.axes.algebra import Axis, Concat, Product, Reason, atom, index_at
from graphopt.axes.infer import Axes, Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.importance import L1, L2, ScoreContext, Scores
from graphopt.importance.slices import readers, slice_sums
from tests.cost.handmade import typing_of


def by_definition(typing: Typing, values: dict[str, Tensor]) -> Scores:
    """Visit every index, and for it every element of every parameter."""
    found = {}
    for group in typing.groups:
        sums = np.zeros(group.size)
        for name, value in values.items():
            axes = typing.tensors[name]
            for index in range(group.size):
                belongs = torch.zeros(value.shape, dtype=torch.bool)
                for dim, axis in enumerate(axes):
                    along = torch.from_numpy(index_at(axis, group.atom) == index)
                    belongs |= along.reshape([-1 if d == dim else 1 for d in range(value.dim())])
                sums[index] += float(value[belongs].sum())
        found[group.name] = sums
    return found


def assert_sums_are_right(typing: Typing) -> None:
    held = ScoreContext(typing).parameters
    values = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in held.items()}
    assert len({group.name for group in typing.groups}) == len(typing.groups)
    found, expected = slice_sums(ScoreContext(typing), values), by_definition(typing, values)
    assert found.keys() == expected.keys()
    for group, sums in expected.items():
        assert found[group] == pytest.approx(sums, abs=1e-9), group


class Packed(nn.Module):
    """Attention with packed q, k, v and two heads, an embedding tied to the output, and a gated perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.gate_up = nn.Linear(8, 12)
        self.down = nn.Linear(6, 8)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, 8))
        gate, up = self.gate_up(x).chunk(2, -1)
        x = x + self.down(torch.sigmoid(gate) * up)
        # Both dimensions of `mix` are the residual width.
        x = x + x @ self.mix
        logits: Tensor = self.head(x)
        return logits


class Dense(nn.Module):
    """Concatenated convolutions, one of them grouped, with buffers that must not count."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(10)
        self.c = nn.Conv2d(10, 5, 1)
        self.transposed = nn.ConvTranspose2d(5, 4, 2)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        x = self.norm(torch.cat([a, self.b(a)], 1))
        x = self.transposed(torch.relu(self.c(x)))
        result: Tensor = self.last(x.mean((2, 3)))
        return result


@pytest.mark.parametrize(
    ("module", "inputs"),
    [(Packed(), torch.randint(7, (2, 5))), (Dense(), torch.randn(2, 3, 6, 6))],
    ids=["packed", "dense"],
)
def test_sums_over_the_slices_of_a_model(module: nn.Module, inputs: Tensor) -> None:
    typing = infer(capture(module.eval(), (inputs,)))
    assert len(typing.groups) >= 4
    assert_sums_are_right(typing)


@st.composite
def shapes(draw: st.DrawFn) -> list[Axes]:
    """Draw the axes of a few parameters that share atoms in every way an axis can."""
    atoms: list[Axis] = [atom(n) for n in draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))]
    fixed = atom(3)

    def axis() -> Axis:
        kind = draw(st.integers(0, 4))
        parts = [draw(st.sampled_from(atoms)) for _ in range(draw(st.integers(2, 3)))]
        if kind == 0:
            return fixed
        if kind == 1:
            return Concat(tuple(parts))
        if kind == 2 and len(set(map(id, parts))) == len(parts):
            return Product(tuple(parts))
        if kind == 3:
            return Concat((fixed, Product((fixed, parts[0])), parts[1]))
        return parts[0]

    return [tuple(axis() for _ in range(draw(st.integers(1, 3)))) for _ in range(draw(st.integers(1, 3)))]


@given(shapes())
def test_sums_over_the_slices_of_any_parameters(all_axes: list[Axes]) -> None:
    tensors = {
        f"p{i}.weight": (nn.Parameter(torch.randn([a.size for a in axes])), axes) for i, axes in enumerate(all_axes)
    }
    assert_sums_are_right(typing_of(tensors))


def test_an_element_with_one_index_along_three_dimensions_counts_once() -> None:
    a = atom(2)
    typing = typing_of({"cube.weight": (nn.Parameter(torch.ones(2, 2, 2)), (a, a, a))})
    # 8 elements, of which one has no coordinate 0 and one no coordinate 1.
    assert slice_sums(ScoreContext(typing), {"cube.weight": torch.ones(2, 2, 2)})["cube.weight[0]"].tolist() == [7, 7]


def test_buffers_do_not_count() -> None:
    a = atom(3)
    typing = typing_of(
        {
            "norm.weight": (nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), (a,)),
            "norm.running_var": (torch.tensor([100.0, 100.0, 100.0]), (a,)),
        }
    )
    assert L1("none").score(ScoreContext(typing))["norm.weight[0]"].tolist() == [1, 2, 3]
    assert L2("none").score(ScoreContext(typing))["norm.weight[0]"].tolist() == [1, 4, 9]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_magnitudes_in_every_precision(dtype: torch.dtype) -> None:
    a = atom(3)
    weight = torch.tensor([[0.5, 2.0], [300.0, 400.0], [-1.0, 0.0]], dtype=dtype)
    typing = typing_of({"w.weight": (nn.Parameter(weight), (a, atom(2, None)))})
    scores = L2("none").score(ScoreContext(typing))
    assert scores["w.weight[0]"].tolist() == [4.25, 250000.0, 1.0]
    assert scores["w.weight[0]"].dtype == np.float64


class Readers(nn.Module):
    """Reads a residual width three times, twice beside another part, and two hidden widths once; one is depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(2, 6, 1), nn.Conv2d(2, 2, 1)
        self.up, self.depthwise, self.down = nn.Conv2d(6, 9, 1), nn.Conv2d(9, 9, 3, 1, 1, groups=9), nn.Conv2d(9, 6, 1)
        self.own, self.last = nn.Conv2d(6, 6, 1), nn.Conv2d(8, 5, 1)
        self.scale = nn.Parameter(torch.randn(5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = y + self.down(torch.relu(self.depthwise(self.up(y))))
        y = y + self.own(y)
        return (self.last(torch.cat([y, self.side(x)], 1)) * self.scale).sum(1)


def test_readers_are_the_layers_that_sum_over_a_group_by_the_share_it_makes() -> None:
    typing = infer(capture(Readers(), (torch.randn(2, 2, 4, 4),)))
    found = readers(ScoreContext(typing))
    by_size = {group.size: found[group.name] for group in typing.groups}
    assert by_size == {6: pytest.approx(1 + 1 + 6 / 8), 2: pytest.approx(2 / 8), 9: 1, 5: 1}


def test_attention_reads_the_width_of_queries_and_keys() -> None:
    typing = infer(capture(Packed(), (torch.randint(7, (2, 5)),)))
    found = readers(ScoreContext(typing))
    by_role = {group.role: found[group.name] for group in typing.groups if group.role != "channels"}
    # The head dimension is read by the scores, as that of the queries and keys, and by the projection, as the values'.
    assert by_role == {"heads": 1, "head dim": 2}


def test_a_large_parameter_is_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = atom(50), atom(7)
    weight = torch.randn(50, 7, 3, dtype=torch.float64)
    typing = typing_of({"w.weight": (nn.Parameter(weight), (rows, columns, atom(3, Reason("fixed", "test"))))})
    monkeypatch.setattr("graphopt.importance.slices.CHUNK", 100)
    scores = L2("none").score(ScoreContext(typing))
    assert scores["w.weight[0]"] == pytest.approx((weight**2).sum((1, 2)).numpy())
    assert scores["w.weight[1]"] == pytest.approx((weight**2).sum((0, 2)).numpy())
