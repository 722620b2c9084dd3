"""Draw random modules, for properties that must hold for every graph.

A module is a chain of steps over a state: an image ``(b, c, h, w)``, tokens ``(b, n, c)`` or vectors ``(b, c)``. Every
step is one idea of a real architecture, with drawn widths; some contain further steps (a residual, a concatenation),
some turn one kind of state into another. Widths are small, and drawn so that they are often distinct primes and often
coincide with another size, for shapes that fit by chance hide mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from random import Random
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Sample", "Step", "samples"]

State: TypeAlias = tuple[int, ...]
"""Sizes without the batch: ``(c, h, w)``, ``(n, c)`` or ``(c,)``."""

Builder: TypeAlias = Callable[["Dice", State], tuple[nn.Module, State]]

_WIDTHS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12)


class Dice:
    """Choose at random: the same numbers give the same module."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def coin(self) -> bool:
        """Return true or false."""
        return self.random.random() < 0.5

    def integer(self, low: int, high: int) -> int:
        """Return an integer from low to high."""
        return self.random.randint(low, high)

    def among(self, options: Sequence[Any]) -> Any:
        """Return one of several values."""
        return self.random.choice(options)

    def pick(self, *options: Any) -> Any:
        """Return one of several values."""
        return self.random.choice(options)

    def some(self, options: Sequence[int], most: int) -> list[int]:
        """Return at least one and at most so many of several values, without repetition."""
        return self.random.sample(options, self.random.randint(1, min(most, len(options))))

    def permutation(self, options: Sequence[int]) -> list[int]:
        """Return the values in another order."""
        return self.random.sample(options, len(options))


class Step(nn.Module):
    """A function of its own parts and of the state."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], name: str = "", **parts: Any) -> None:
        super().__init__()
        self.function, self.name = function, name
        for key, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(key, part)
            else:
                setattr(self, key, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@dataclass
class Sample:
    """A drawn module, an input to capture it with, and one of another batch size."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    other: tuple[Tensor, ...]
    steps: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Sample({' > '.join(self.steps)}; {tuple(self.inputs[0].shape)})"


def weight(*shape: int) -> nn.Parameter:
    """Return a parameter; its values are drawn later."""
    return nn.Parameter(torch.ones(shape))


def numbered(*shape: int) -> Tensor:
    """Return a constant whose entries all differ."""
    return torch.arange(1.0, prod(shape) + 1).view(shape).double() / prod(shape)


def divisors(n: int) -> list[int]:
    """Return the divisors of n, in order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def width(dice: Dice, state: State, multiple: int = 1) -> int:
    """Draw a width: one of the usual ones, or one that coincides with a size of the state."""
    found = dice.among([*_WIDTHS, *state, *state])
    return max(1, round(found / multiple)) * multiple


def parts_of(dice: Dice, total: int, most: int = 3) -> list[int]:
    """Cut a width into uneven parts."""
    if total < 2:
        return [total]
    bounds = [0, *sorted(dice.some(range(1, total), most - 1)), total]
    return [b - a for a, b in pairwise(bounds)]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu_": lambda x: (x * 1.5).relu_(),
    "gelu": functional.gelu,
    "silu": functional.silu,
    "silu_": lambda x: functional.silu(x + 0.0, inplace=True),
    "hardswish": functional.hardswish,
    "sigmoid": torch.sigmoid,
    "sigmoid_": lambda x: x.clone().sigmoid_(),
    "tanh": torch.tanh,
    "leaky": lambda x: functional.leaky_relu(x, 0.1),
    "softplus": functional.softplus,
    "relu6": functional.relu6,
    "square": torch.square,
    "clamp": lambda x: x.clamp(-0.5, 2.0),
    "clamp above": lambda x: x.clamp(min=0.25),
    "shifted": lambda x: 1.0 - x,
    "where": lambda x: torch.where(x > 0.1, x, x * 0.2),
    "filled": lambda x: x.masked_fill(x < -0.2, -1.0),
    "power": lambda x: x.abs().pow(1.5),
    "exponential": lambda x: (-x.abs()).exp(),
    "quotient": lambda x: x / (x.square() + 1.0),
    "dropout": lambda x: functional.dropout(x, 0.5, training=False),
    "halves": lambda x: x.to(torch.float64).contiguous().clone(),
}


def activation(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Apply a pointwise function."""
    name = dice.among(sorted(ACTIVATIONS))
    return Step(lambda s, x: ACTIVATIONS[name](x), name), state


# -- any state ---------------------------------------------------------------------------------------------------------


def _channel(state: State) -> int:
    """Return the channel's dimension, with the batch counted."""
    return 2 if len(state) == 2 else 1


def _with_channels(state: State, channels: int) -> State:
    found = list(state)
    found[_channel(state) - 1] = channels
    return tuple(found)


def _channels(state: State) -> int:
    return state[_channel(state) - 1]


def _shaped(state: State, vector: Tensor) -> Tensor:
    """View a vector of channels so that it broadcasts."""
    return vector.view([-1 if d == _channel(state) - 1 else 1 for d in range(len(state))])


def mixer(dice: Dice, state: State, out: int | None = None) -> tuple[nn.Module, State]:
    """Mix channels at every place: the linear layer of this kind of state."""
    c = _channels(state)
    out = out or width(dice, state)
    bias = dice.coin()
    part: nn.Module = nn.Conv2d(c, out, 1, bias=bias) if len(state) == 3 else nn.Linear(c, out, bias=bias)
    return part, _with_channels(state, out)


def residual(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Add, subtract, multiply or write a branch onto the state."""
    inner, _ = chain([Dice(dice.integer(0, 2**40)) for _ in range(dice.integer(1, 2))], state, keep=True)
    how = dice.pick("x+f", "f-x", "x*f", "add_", "lerp", "addcmul", "max")
    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "x+f": lambda s, x: x + s.inner(x),
        "f-x": lambda s, x: s.inner(x) - x,
        "x*f": lambda s, x: x * s.inner(x),
        "add_": lambda s, x: (x * 2).add_(s.inner(x)),
        "lerp": lambda s, x: torch.lerp(x, s.inner(x), 0.3),
        "addcmul": lambda s, x: torch.addcmul(x, s.inner(x), x, value=0.5),
        "max": lambda s, x: torch.maximum(x, s.inner(x)),
    }
    return Step(functions[how], f"{how} {describe(inner)}", inner=inner), state


def joined(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Concatenate branches of different widths, the state itself, and constants."""
    dim = _channel(state)
    branches: list[Any] = [mixer(dice, state) for _ in range(dice.integer(1, 2))]
    total = sum(_channels(after) for _, after in branches)
    order = dice.permutation([*range(len(branches)), -1])
    constant = dice.pick(None, None, "zeros", "ones", "new_zeros", "buffer", "self twice")
    keeps = dice.coin()
    extra = {None: 0, "self twice": _channels(state)}.get(constant, 2)
    total += extra + (_channels(state) if keeps else 0)

    def function(s: Any, x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[dim] = 2
        found = [x if i < 0 else s.branches[i](x) for i in order if i >= 0 or keeps]
        if constant == "zeros":
            found.insert(0, torch.zeros(shape, dtype=x.dtype))
        elif constant == "ones":
            found.append(torch.ones(shape, dtype=x.dtype))
        elif constant == "new_zeros":
            found.insert(1, x.new_zeros(shape))
        elif constant == "buffer":
            found.append(s.table.expand(shape))
        elif constant == "self twice":
            found.append(x)
        return torch.cat(found, dim)

    widths = ["x" if i < 0 else str(_channels(branches[i][1])) for i in order if i >= 0 or keeps]
    step = Step(
        function,
        f"cat({', '.join(widths)}, {constant})",
        branches=nn.ModuleList(b for b, _ in branches),
        table=_shaped(state, numbered(2)),
    )
    return step, _with_channels(state, total)


def parted(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Cut channels into uneven parts, treat some, and join them again in another order."""
    dim, sizes = _channel(state), parts_of(dice, _channels(state))
    how = dice.pick("split", "slices", "narrow", "negative slices", "list split")
    parts = [mixer(dice, _with_channels(state, n))[0] if dice.coin() else nn.Tanh() for n in sizes]
    order = dice.permutation(range(len(sizes)))
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    total = bounds[-1]

    def cut(x: Tensor) -> list[Tensor]:
        if how == "split":
            return list(x.split(sizes, dim))
        if how == "list split":
            return list(torch.tensor_split(x, bounds[1:-1], dim))
        if how == "narrow":
            return [x.narrow(dim, a, b - a) for a, b in pairwise(bounds)]
        y = x.transpose(dim, -1)
        if how == "slices":
            return [y[..., a:b].transpose(dim, -1) for a, b in pairwise(bounds)]
        return [y[..., a - total : b - total or None].transpose(dim, -1) for a, b in pairwise(bounds)]

    def function(s: Any, x: Tensor) -> Tensor:
        found = cut(x)
        return torch.cat([s.parts[i](found[i]) for i in order], dim)

    weights = [getattr(p, "weight", None) for p in parts]
    widths = [len(w) if isinstance(w, Tensor) else n for w, n in zip(weights, sizes, strict=True)]
    return Step(function, f"{how} {sizes}", parts=nn.ModuleList(parts)), _with_channels(state, sum(widths))


def halves(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Widen to two halves and combine them: a gated unit."""
    dim, hidden = _channel(state), width(dice, state)
    wide, _ = mixer(dice, state, 2 * hidden)
    how = dice.pick("chunk", "glu", "slices", "split", "view", "stride")

    def function(s: Any, x: Tensor) -> Tensor:
        y = s.wide(x)
        if how == "glu":
            return functional.glu(y, dim)
        if how == "chunk":
            a, b = y.chunk(2, dim)
        elif how == "split":
            a, b = y.split(hidden, dim)
        elif how == "view":
            a, b = y.unflatten(dim, (2, hidden)).unbind(dim)
        elif how == "stride":
            y = y.transpose(dim, -1)
            a, b = y[..., 0::2].transpose(dim, -1), y[..., 1::2].transpose(dim, -1)
        else:
            y = y.transpose(dim, -1)
            a, b = y[..., :hidden].transpose(dim, -1), y[..., hidden:].transpose(dim, -1)
        return functional.silu(a) * b

    return Step(function, f"gated {how} {hidden}", wide=wide), _with_channels(state, hidden)


def scaled(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Scale and shift by parameters and constants that broadcast."""
    dim, c = _channel(state) - 1, _channels(state)
    shape = [1] * len(state)
    shape[dim] = c
    whole = list(state) if dice.coin() else shape
    how = dice.pick(
        "scale", "shift", "both", "buffer", "scalar", "leading", "prelu", "computed", "ones_like", "expanded"
    )
    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "scale": lambda s, x: x * s.scale,
        "shift": lambda s, x: x + s.shift,
        "both": lambda s, x: torch.addcmul(s.shift, x, s.scale),
        "buffer": lambda s, x: (x - s.constant) / s.constant.sqrt() * s.scale,
        "scalar": lambda s, x: x * s.one + s.one.square(),
        "leading": lambda s, x: x + s.shift[None].expand_as(x),
        "prelu": lambda s, x: functional.prelu(x.movedim(dim + 1, 1), s.slope).movedim(1, dim + 1),
        "computed": lambda s, x: x * s.scale.exp() + s.shift.sigmoid(),
        "ones_like": lambda s, x: x * (torch.ones_like(x) + s.scale) - torch.full_like(s.scale, 0.5),
        "expanded": lambda s, x: x * s.one.expand(whole) + s.shift.expand(x.shape),
    }
    step = Step(
        functions[how],
        f"{how}{whole}",
        scale=weight(*whole),
        shift=weight(*shape),
        one=weight(1),
        slope=weight(c),
        constant=numbered(*whole),
    )
    return step, state


def ordered(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Let channels depend on their order, number or each other: they must freeze."""
    dim, c = _channel(state), _channels(state)
    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "softmax": lambda s, x: x.softmax(dim),
        "log_softmax": lambda s, x: x.log_softmax(dim),
        "cumsum": lambda s, x: x.cumsum(dim),
        "roll": lambda s, x: x.roll(1, dim),
        "flip": lambda s, x: x.flip(dim),
        "permuted": lambda s, x: x.index_select(dim, s.order),
        "indexed": lambda s, x: x.movedim(dim, 0)[s.order].movedim(0, dim),
        "sorted": lambda s, x: x.sort(dim)[0],
        "max": lambda s, x: x - x.amax(dim, keepdim=True),
        "unknown": lambda s, x: torch.special.i0(x),
        "logsumexp": lambda s, x: x - x.logsumexp(dim, keepdim=True),
        "top": lambda s, x: x + x.topk(1, dim)[0],
        "padded": lambda s, x: functional.pad(x.movedim(dim, -1), (1, 2)).movedim(-1, dim),
        "cropped": lambda s, x: functional.pad(x.movedim(dim, -1), (1, -1)).movedim(-1, dim),
        "one": lambda s, x: x + x.select(dim, 0).unsqueeze(dim),
        "numbered": lambda s, x: x + _shaped(state, torch.arange(c)),
        "product": lambda s, x: x + x.prod(dim, keepdim=True),
    }
    how = dice.among(sorted(functions))
    out = c + 3 if how == "padded" else c
    order = torch.arange(c).flip(0)
    return Step(functions[how], how, order=order), _with_channels(state, out)


def reduced(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Gate the state by a statistic over its channels."""
    dim = _channel(state)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda x: x.sum(dim, keepdim=True),
        "mean": lambda x: x.mean(dim, keepdim=True),
        "norm": lambda x: torch.linalg.vector_norm(x, dim=dim, keepdim=True),
        "std": lambda x: x.std(dim, keepdim=True) if x.shape[dim] > 1 else x,
        "var_mean": lambda x: torch.var_mean(x, dim, correction=0, keepdim=True)[0],
        "sum of sigmoids": lambda x: x.sigmoid().sum(dim, keepdim=True),
        "normalize": lambda x: functional.normalize(x, dim=dim),
        "fourth": lambda x: x.norm(p=4, dim=dim, keepdim=True),
        "mean of squares": lambda x: (x.square().sum(dim, keepdim=True) / 7 + 1e-3).rsqrt(),
        "squares": lambda x: torch.einsum("b...c,b...c->b...", x.movedim(dim, -1), x.movedim(dim, -1)).unsqueeze(dim),
    }
    how = dice.among(sorted(functions))
    # A standard deviation of one channel is not a number.
    how = "var_mean" if how == "std" else how
    return Step(lambda s, x: x * functions[how](x), f"gated by {how}"), state


def normed(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Normalise, by an operator or written out."""
    dim, c = _channel(state), _channels(state)
    groups = dice.among(divisors(c))
    affine = dice.coin()

    def written(s: Any, x: Tensor) -> Tensor:
        y = x.movedim(dim, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-4).sqrt()
        return (y * s.scale + s.shift).movedim(-1, dim)

    def root(s: Any, x: Tensor) -> Tensor:
        y = x.movedim(dim, -1)
        return (s.scale * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-4))).movedim(-1, dim)

    def grouped(s: Any, x: Tensor) -> Tensor:
        y = x.movedim(dim, 1).flatten(2) if len(state) > 1 else x[:, :, None]
        y = y.reshape(x.shape[0], groups, -1)
        y = (y - y.mean(-1, keepdim=True)) * (y.var(-1, correction=0, keepdim=True) + 1e-4).rsqrt()
        y = y.reshape(x.movedim(dim, 1).shape)
        return y.movedim(1, dim)

    moved: Callable[[Any, Tensor], Tensor] = lambda s, x: s.norm(x.movedim(dim, 1)).movedim(1, dim)  # noqa: E731
    last: Callable[[Any, Tensor], Tensor] = lambda s, x: s.norm(x.movedim(dim, -1)).movedim(-1, dim)  # noqa: E731
    batch = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[len(state) - 1]
    instance = nn.InstanceNorm2d if len(state) == 3 else nn.InstanceNorm1d
    options: dict[str, tuple[Callable[[Any, Tensor], Tensor], nn.Module]] = {
        "batch": (moved, batch(c, affine=affine)),
        "layer": (last, nn.LayerNorm(c, elementwise_affine=affine)),
        "root": (last, nn.RMSNorm(c, eps=1e-4, elementwise_affine=affine)),
        "group": (moved, nn.GroupNorm(groups, c, affine=affine)),
        "one group": (moved, nn.GroupNorm(1, c, affine=affine)),
        "written": (written, nn.Identity()),
        "written root": (root, nn.Identity()),
        "written groups": (grouped, nn.Identity()),
    }
    if len(state) > 1 and prod(state) > c:
        options["instance"] = (moved, instance(c, affine=affine))
        options["whole"] = (lambda s, x: s.norm(x), nn.LayerNorm(list(state), elementwise_affine=affine))
    how = dice.among(sorted(options))
    function, norm = options[how]
    return Step(function, f"norm {how} {groups}", norm=norm, scale=weight(c), shift=weight(c)), state


def tied(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Use a layer or its weight more than once, or compute the weight."""
    c, hidden = _channels(state), width(dice, state)
    dim = _channel(state)
    square = nn.Linear(c, c, bias=dice.coin())
    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "twice": lambda s, y: s.square(s.square(y).relu()),
        "there and back": lambda s, y: functional.linear(functional.linear(y, s.up.weight).relu(), s.up.weight.t()),
        "low rank": lambda s, y: functional.linear(y, s.square.weight + s.back.weight @ s.up.weight),
        "scaled weight": lambda s, y: functional.linear(
            functional.linear(y, s.up.weight * s.scale[:, None]), s.back.weight
        ),
        "computed weight": lambda s, y: functional.linear(
            functional.linear(y, s.up.weight.sigmoid()), s.back.weight.tanh()
        ),
        "matmul": lambda s, y: (y @ s.up.weight.T).tanh() @ s.back.weight.mT,
        "shared bias": lambda s, y: s.back(s.up(y) + s.up.bias) + s.scale.sum(),
        "normal weight": lambda s, y: (
            functional.linear(y, functional.normalize(s.up.weight, dim=1))
            @ functional.normalize(s.back.weight, dim=0).T
        ),
        "standard weight": lambda s, y: s.back(
            functional.linear(y, functional.layer_norm(s.up.weight, (c,)) * s.scale[:, None])
        ),
        "cut weight": lambda s, y: functional.linear(y, s.up.weight[: hidden - 1]) @ s.back.weight.t()[1:],
        "joined weight": lambda s, y: (
            functional.linear(y, torch.cat([s.up.weight, s.square.weight])).relu()
            @ torch.cat([s.back.weight, s.square.weight], 1).t()
        ),
        "stacked weight": lambda s, y: torch.einsum(
            "...c,koc->...ko", y, torch.stack([s.square.weight, s.square.weight.t()])
        ).sum(-2),
    }
    how = dice.among(sorted(functions))
    how = "twice" if how == "cut weight" and hidden < 2 else how
    step = Step(
        lambda s, x: functions[how](s, x.movedim(dim, -1)).movedim(-1, dim),
        f"{how} {hidden}",
        square=square,
        up=nn.Linear(c, hidden),
        back=nn.Linear(hidden, c, bias=dice.coin()),
        scale=weight(hidden),
    )
    return step, state


def viewed(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """View channels as a grid, act on it, and view it back."""
    dim, c = _channel(state), _channels(state)
    rows = dice.among(divisors(c))
    columns = c // rows
    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "shuffled": lambda s, y: y.transpose(-1, -2),
        "rows mixed": lambda s, y: s.rows(y.transpose(-1, -2)).transpose(-1, -2),
        "columns mixed": lambda s, y: s.columns(y),
        "rows scaled": lambda s, y: y * s.per_row[:, None],
        "columns scaled": lambda s, y: y * s.per_column,
        "rows by einsum": lambda s, y: torch.einsum("...rc,sr->...sc", y, s.rows.weight),
        "grid by einsum": lambda s, y: torch.einsum("...rc,rcd->...rd", y, s.grid),
        "rows summed": lambda s, y: y + y.sum(-2, keepdim=True),
        "columns normal": lambda s, y: functional.layer_norm(y, (columns,), s.per_column),
        "first row": lambda s, y: y - y[..., :1, :],
        "repeated": lambda s, y: y * s.per_row.repeat_interleave(columns).view(rows, columns),
        "tiled": lambda s, y: y * s.per_column.repeat(rows).view(rows, columns),
        "maxout": lambda s, y: y - y.amax(-2, keepdim=True),
        "permuted back": lambda s, y: y.transpose(-1, -2).contiguous().view(*y.shape[:-2], rows, columns),
    }
    how = dice.among(sorted(functions))
    kind = dice.pick("view", "unflatten", "reshape", "-1")

    def function(s: Any, x: Tensor) -> Tensor:
        y = x.movedim(dim, -1)
        lead = list(y.shape[:-1])
        if kind == "view":
            y = y.contiguous().view(*lead, rows, columns)
        elif kind == "unflatten":
            y = y.unflatten(-1, (rows, columns))
        elif kind == "-1":
            y = y.reshape(*lead, -1, columns)
        else:
            y = y.reshape([*lead, rows, columns])
        y = functions[how](s, y)
        y = y.flatten(-2) if kind == "unflatten" else y.reshape(*lead, -1 if kind == "-1" else c)
        return y.movedim(-1, dim)

    step = Step(
        function,
        f"{how} {rows}x{columns} by {kind}",
        rows=nn.Linear(rows, rows),
        columns=nn.Linear(columns, columns),
        per_row=weight(rows),
        per_column=weight(columns),
        grid=weight(rows, columns, columns),
    )
    return step, state


def written(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Write a part of the channels in place."""
    dim, c = _channel(state), _channels(state)
    first = dice.integer(0, c - 1)
    count = dice.integer(1, c - first)
    branch, _ = mixer(dice, state, count)
    how = dice.pick("copy", "add", "into zeros", "fill", "scatter")

    def function(s: Any, x: Tensor) -> Tensor:
        if how == "scatter":
            return torch.slice_scatter(x, s.branch(x), dim, first, first + count)
        y = x.new_zeros(x.shape) if how == "into zeros" else x.clone()
        part = y.narrow(dim, first, count)
        if how == "add":
            part.add_(s.branch(x))
        elif how == "fill":
            part.sub_(0.5)
        else:
            part.copy_(s.branch(x))
        return y + y.sum(dim, keepdim=True)

    return Step(function, f"{how} {first}:{first + count} in place", branch=branch), state


def stacked(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Stack branches and reduce, weigh or interleave them."""
    count = dice.integer(2, 3)
    out = width(dice, state)
    branches = [mixer(dice, state, out)[0] for _ in range(count)]
    dim = dice.integer(1, len(state) + 1)
    how = dice.pick("sum", "weighed", "unbound", "max", "interleaved", "selected")

    def function(s: Any, x: Tensor) -> Tensor:
        y = torch.stack([b(x) for b in s.branches], dim)
        if how == "weighed":
            return (y * s.gate.softmax(0).view(-1, *[1] * (y.dim() - 1 - dim))).sum(dim)
        if how == "unbound":
            first, *rest = y.unbind(dim)
            return first + sum(r.relu() for r in rest)
        if how == "max":
            return y.amax(dim)
        if how == "interleaved":
            y = torch.stack([b(x) for b in s.branches], _channel(state) + 1)
            return y.flatten(_channel(state), _channel(state) + 1)
        if how == "selected":
            return y.select(dim, 0) - y.select(dim, -1).sigmoid()
        return y.sum(dim)

    after = _with_channels(state, out * count if how == "interleaved" else out)
    return Step(function, f"{count} stacked, {how}", branches=nn.ModuleList(branches), gate=weight(count)), after


# -- images ------------------------------------------------------------------------------------------------------------


def convolution(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Convolve: plain, grouped, depthwise with a multiplier, strided, dilated, transposed, padded all ways."""
    c, h, w = state
    groups = dice.among(divisors(c))
    out = width(dice, state, groups)
    kernel = dice.pick(1, 2, 3, (1, 3))
    stride = dice.pick(1, 1, 2)
    options = {"bias": dice.coin(), "stride": stride, "groups": groups}
    module: nn.Module
    if dice.integer(0, 3) == 0:
        module = nn.ConvTranspose2d(c, out, kernel, **options)
    elif stride == 1 and dice.integer(0, 3) == 0:
        module = nn.Conv2d(c, out, kernel, padding="same", **options)
    else:
        mode = dice.pick("zeros", "zeros", "reflect", "replicate")
        module = nn.Conv2d(c, out, kernel, padding=1, dilation=dice.pick(1, 1, 2), padding_mode=mode, **options)
        if min(h, w) < 5:
            module = nn.Conv2d(c, out, kernel, padding=1, **options)
    return _measured(module, state)


def computed_convolution(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Convolve with a weight that is standardised, scaled, shared or a sum of kernels."""
    c, _, _ = state
    groups = dice.among(divisors(c))
    out = width(dice, state, groups)

    def standard(s: Any, x: Tensor) -> Tensor:
        mean = s.conv.weight.mean((1, 2, 3), keepdim=True)
        variance = s.conv.weight.var((1, 2, 3), keepdim=True, correction=0)
        kernel = (s.conv.weight - mean) * (variance + 1e-4).rsqrt() * s.scale
        return functional.conv2d(x, kernel, s.conv.bias, padding=1, groups=groups)

    def by_batch_norm(s: Any, x: Tensor) -> Tensor:
        kernel = functional.batch_norm(
            s.conv.weight.reshape(1, out, -1), None, None, weight=s.scale.view(-1), training=True
        ).reshape_as(s.conv.weight)
        return functional.conv2d(x, kernel, s.conv.bias, padding=1, groups=groups)

    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "standard": standard,
        "batch norm": by_batch_norm,
        "scaled": lambda s, x: functional.conv2d(x, s.conv.weight * s.scale, s.conv.bias, groups=groups),
        "sum": lambda s, x: functional.conv2d(
            x, s.conv.weight + functional.pad(s.point, (1, 1, 1, 1)), s.conv.bias, padding=1, groups=groups
        ),
        "dilations": lambda s, x: (
            s.conv(x) + functional.conv2d(x, s.conv.weight, None, padding=2, dilation=2, groups=groups)
        ),
    }
    how = dice.among(sorted(functions))
    how = "sum" if how == "scaled" and min(state[1:]) < 3 else how
    step = Step(
        functions[how],
        f"conv by {how}, {groups} groups",
        conv=nn.Conv2d(c, out, 3, padding=1, groups=groups, bias=dice.coin()),
        scale=weight(out, 1, 1, 1),
        point=weight(out, c // groups, 1, 1),
    )
    return _measured(step, state)


def spatial(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Pool, resample or move places."""
    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "max": lambda s, x: functional.max_pool2d(x, 2, ceil_mode=True),
        "average": lambda s, x: functional.avg_pool2d(x, 2, 1, padding=1),
        "adaptive": lambda s, x: functional.adaptive_avg_pool2d(x, 2),
        "nearest": lambda s, x: functional.interpolate(x, scale_factor=2.0, mode="nearest"),
        "bilinear": lambda s, x: functional.interpolate(x, size=(4, 3), mode="bilinear", align_corners=False),
        "padded": lambda s, x: functional.pad(x, (1, 0, 2, 1), value=0.5),
        "rolled": lambda s, x: x.roll((1, 1), (2, 3)),
        "flipped": lambda s, x: x + x.flip(3),
        "unfolded": lambda s, x: functional.fold(functional.unfold(x, 2), x.shape[2:], 2),
        "softmax": lambda s, x: x.flatten(2).softmax(-1).view_as(x) if x.shape[1] else x,
        "sampled": lambda s, x: functional.grid_sample(
            x, s.grid.expand(x.shape[0], -1, -1, -1), align_corners=False, padding_mode="border"
        ),
        "windows": lambda s, x: _windows(x),
        "rows as channels": lambda s, x: x.transpose(1, 2).transpose(1, 2).contiguous(),
    }
    how = dice.among(sorted(functions))
    if how in ("unfolded",) and min(state[1:]) < 2:
        how = "nearest"
    return _measured(Step(functions[how], how, grid=numbered(1, 3, 2, 2) - 0.5), state)


def _windows(x: Tensor) -> Tensor:
    """Pad to even sizes, attend inside 2 x 2 windows by their mean, and put the windows back."""
    b, c, h, w = x.shape
    x = functional.pad(x, (0, w % 2, 0, h % 2))
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    y = x.view(b, c, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
    y = y - y.mean(1, keepdim=True)
    y = y.view(b, rows, columns, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * 2, columns * 2)
    return y[:, :, :h, :w]


def rearranged(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Turn channels into space or back, or shuffle them."""
    c, h, w = state
    how = dice.pick("unshuffle", "shuffle", "channel shuffle", "patches", "non-spatial", "operator shuffle")
    if how == "shuffle":
        wide = nn.Conv2d(c, 4 * c, 1)
        return _measured(Step(lambda s, x: functional.pixel_shuffle(s.wide(x), 2), how, wide=wide), state)
    if how == "unshuffle" and h % 2 == w % 2 == 0:
        return Step(lambda s, x: functional.pixel_unshuffle(x, 2), how), (4 * c, h // 2, w // 2)
    if how == "patches" and h % 2 == w % 2 == 0:

        def merged(s: Any, x: Tensor) -> Tensor:
            parts = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
            return torch.cat(parts, 1)

        return Step(merged, how), (4 * c, h // 2, w // 2)
    if how == "non-spatial":
        mix = nn.Conv2d(h, h, dice.pick(1, (3, 1), (1, 3)), padding="same")
        return Step(lambda s, x: s.mix(x.transpose(1, 2)).transpose(1, 2), f"{how} {mix.kernel_size}", mix=mix), state
    groups = dice.among(divisors(c))
    if how == "operator shuffle":
        return Step(lambda s, x: functional.channel_shuffle(x, groups), f"{how} {groups}"), state

    def shuffled(s: Any, x: Tensor) -> Tensor:
        b, _, rows, columns = x.shape
        y = x.view(b, groups, c // groups, rows, columns) if x.is_contiguous() else x.unflatten(1, (groups, -1))
        return y.transpose(1, 2).reshape(b, c, rows, columns)

    return Step(shuffled, f"channel shuffle {groups}"), state


def gate_of_image(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Gate an image by its own channels or places."""
    c, hidden = state[0], width(dice, state)
    how = dice.pick("squeeze", "places", "neighbours", "global response", "cross-covariance", "two branches")

    def places(s: Any, x: Tensor) -> Tensor:
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)] if s.frozen else [s.down(x)], 1)
        return x * s.kernel(maps).sigmoid()

    def response(s: Any, x: Tensor) -> Tensor:
        found = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x * (found / (found.mean(1, keepdim=True) + 1e-4)) * s.scale + s.shift + x

    def covariance(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.packed(x).flatten(2).chunk(3, 1)
        scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(1, 2)
        return (scores.softmax(-1) @ v).view(x.shape)

    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "squeeze": lambda s, x: x * s.up(s.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
        "places": places,
        "neighbours": lambda s, x: x * s.line(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None].sigmoid(),
        "global response": response,
        "cross-covariance": covariance,
        "two branches": lambda s, x: s.up(s.down(x).sigmoid() * s.kernel_twin(x)),
    }
    frozen = dice.coin()
    step = Step(
        functions[how],
        f"gate {how} {hidden}",
        down=nn.Conv2d(c, hidden, 1),
        up=nn.Conv2d(hidden, c, 1),
        frozen=frozen,
        kernel=nn.Conv2d(2 if frozen else hidden, 1, 3, padding=1),
        kernel_twin=nn.Conv2d(c, hidden, 3, padding=1),
        line=nn.Conv1d(1, 1, 3, padding=1),
        packed=nn.Conv2d(c, 3 * c, 1),
        scale=weight(1, c, 1, 1),
        shift=weight(1, c, 1, 1),
    )
    return step, state


# -- tokens ------------------------------------------------------------------------------------------------------------


def token_mixer(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Mix tokens: a perceptron over them, a convolution along them, learned tokens beside them."""
    n, c = state
    hidden = width(dice, state)
    how = dice.pick("perceptron", "depthwise", "conv", "class token", "drop first", "latents", "positions", "pooled")
    if how == "perceptron":
        up, down = nn.Linear(n, hidden), nn.Linear(hidden, n)
        function = lambda s, x: x + s.down(s.up(x.transpose(1, 2)).relu()).transpose(1, 2)  # noqa: E731
        return Step(function, f"token {how} {hidden}", up=up, down=down), state
    if how == "depthwise":
        conv = nn.Conv1d(c, c, 3, padding=2, groups=c)
        return Step(lambda s, x: s.conv(x.transpose(1, 2))[:, :, :n].transpose(1, 2), how, conv=conv), state
    if how == "conv":
        conv = nn.Conv1d(n, hidden, dice.pick(1, 3), padding="same")
        return Step(lambda s, x: s.conv(x), f"{how} over width", conv=conv), (hidden, c)
    if how == "class token":
        token = weight(1, 1, c)
        return Step(lambda s, x: torch.cat([s.token.expand(x.shape[0], -1, -1), x], 1), how, token=token), (n + 1, c)
    if how == "latents":
        function = lambda s, x: torch.cat([x, s.token.repeat(x.shape[0], 1, 1)], 1)  # noqa: E731
        return Step(function, f"{how} {hidden}", token=weight(1, hidden, c)), (n + hidden, c)
    if how == "drop first" and n > 1:
        return Step(lambda s, x: x[:, 1:] + x[:, :1], how), (n - 1, c)
    if how == "pooled":
        return Step(lambda s, x: x + functional.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2), how), state
    position = nn.Embedding(n + 2, c)
    function = lambda s, x: x + s.position(torch.arange(x.shape[1]) + 1)  # noqa: E731
    return Step(function, "positions", position=position), state


def _rotate(x: Tensor, places: int, interleaved: bool) -> Tensor:
    """Turn pairs of features by an angle that grows with the place: halves, or neighbours."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(places).double(), 0.7 ** torch.arange(half).double())
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
        return turned.flatten(-2)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attention(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Attend: packed or separate, with as many or fewer key heads, with what positions are made of."""
    n, c = state
    heads, dim = dice.integer(1, 4), dice.among([2, 3, 4, 6])
    shared = dice.among(divisors(heads))
    kv = heads // shared
    value = dice.among([dim, dim, 5])
    packing = dice.pick("separate", "chunk", "split", "reshape")
    if packing in ("chunk", "reshape"):
        kv, value = heads, dim
    sharing = dice.pick("expand", "repeat_interleave", "operator") if kv != heads else "none"
    kind = dice.pick("operator", "operator", "scaled", "causal", "written", "folded", "linear", "talking", "einsum")
    if sharing == "operator" and kind not in ("operator", "causal", "scaled"):
        sharing = "expand"
    position = dice.pick(None, None, "rotary", "interleaved", "table", "mask", "relative")
    if kind in ("linear", "folded") and position in ("table", "mask", "relative"):
        position = None
    if kind == "causal" and position in ("table", "mask", "relative"):
        kind = "operator"
    if dim % 2:
        position = None if position in ("rotary", "interleaved") else position
    normal = dice.integer(0, 3) == 0
    cross = dice.integer(0, 3) == 0
    sizes = [heads * dim, kv * dim, kv * value]

    def project(s: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b = x.shape[0]
        if packing == "reshape":
            q, k, v = s.packed(x).reshape(b, n, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if packing == "separate":
            parts = [s.q(x), s.k(x), s.v(x)]
        else:
            parts = list(s.packed(x).chunk(3, -1) if packing == "chunk" else s.packed(x).split(sizes, -1))
        q, k, v = (p.view(b, n, h, -1).transpose(1, 2) for p, h in zip(parts, (heads, kv, kv), strict=True))
        return q, k, v

    def share(k: Tensor) -> Tensor:
        if sharing == "expand":
            b = k.shape[0]
            return k[:, :, None].expand(b, kv, shared, n, k.shape[-1]).reshape(b, heads, n, k.shape[-1])
        return k.repeat_interleave(shared, 1) if sharing == "repeat_interleave" else k

    def bias(s: Any) -> Tensor | None:
        if position == "table":
            return s.table[s.index.view(-1)].view(n, n, heads).permute(2, 0, 1)
        if position == "relative":
            return s.embedding(s.index).permute(2, 0, 1)[None]
        return s.mask if position == "mask" else None

    def attend(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = bias(s)
        if kind in ("operator", "causal", "scaled"):
            return functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=kind == "causal",
                scale=0.4 if kind == "scaled" else None,
                enable_gqa=sharing == "operator",
            )
        if kind == "linear":
            q, k = functional.elu(q) + 1, functional.elu(k) + 1
            return (q @ (k.transpose(-1, -2) @ v)) / ((q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True) + 1e-2)
        if kind == "folded":
            b = q.shape[0]
            q, k, v = (t.reshape(b * heads, n, -1) for t in (q, k, v))
            scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
            return torch.bmm(scores.softmax(-1), v).view(b, heads, n, -1)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) if kind == "einsum" else q @ k.mT
        scores = scores / dim**0.5
        if mask is not None:
            scores = scores + mask
        if kind == "talking":
            scores = s.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        scores = scores.softmax(-1)
        if kind == "talking":
            scores = s.after(scores.movedim(1, -1)).movedim(-1, 1)
        return torch.einsum("bhij,bhjf->bhif", scores, v) if kind == "einsum" else scores @ v

    def function(s: Any, x: Tensor) -> Tensor:
        q, k, v = project(s, x)
        if normal:
            q, k = s.norm(q), s.norm(k)
        if position in ("rotary", "interleaved"):
            q, k = _rotate(q, n, position == "interleaved"), _rotate(k, n, position == "interleaved")
        if cross:
            q = s.queries.expand(x.shape[0], -1, -1, -1)
        y = attend(s, q, share(k), share(v))
        return s.out(y.transpose(1, 2).flatten(2))

    step = Step(
        function,
        f"attention {heads}/{kv} heads {dim}/{value} {packing} {sharing} {kind} {position}"
        f"{' normed' if normal else ''}{' cross' if cross else ''}",
        q=nn.Linear(c, sizes[0]),
        k=nn.Linear(c, sizes[1], bias=False),
        v=nn.Linear(c, sizes[2]),
        packed=nn.Linear(c, sum(sizes), bias=dice.coin()),
        out=nn.Linear(heads * value, c),
        norm=nn.RMSNorm(dim, eps=1e-4),
        queries=weight(1, heads, n, dim),
        table=weight(2 * n - 1, heads),
        embedding=nn.Embedding(2 * n - 1, heads),
        index=torch.arange(n)[:, None] - torch.arange(n) + n - 1,
        mask=numbered(n, n),
        before=nn.Linear(heads, heads),
        after=nn.Linear(heads, heads),
    )
    return step, state


def state_space(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Scan along tokens with a gate, as a selective state-space layer does."""
    n, c = state
    inner, rank, states = width(dice, state), dice.integer(1, 3), dice.integer(2, 4)

    def function(s: Any, x: Tensor) -> Tensor:
        y, gate = s.packed(x).chunk(2, -1)
        y = functional.silu(s.conv(y.transpose(1, 2))[..., :n]).transpose(1, 2)
        step, b, readout = s.project(y).split([rank, states, states], -1)
        step = functional.softplus(s.step(step))
        decay = torch.exp(step[..., None] * -s.log_decay.exp())
        enter = step[..., None] * b[:, :, None] * y[..., None]
        hidden = x.new_zeros(x.shape[0], inner, states)
        out = []
        for i in range(n):
            hidden = decay[:, i] * hidden + enter[:, i]
            out.append(torch.einsum("bds,bs->bd", hidden, readout[:, i]))
        return s.out((torch.stack(out, 1) + y * s.skip) * functional.silu(gate))

    step = Step(
        function,
        f"state space {inner} {rank} {states}",
        packed=nn.Linear(c, 2 * inner, bias=False),
        conv=nn.Conv1d(inner, inner, 3, padding=2, groups=inner),
        project=nn.Linear(inner, rank + 2 * states, bias=False),
        step=nn.Linear(rank, inner),
        log_decay=weight(inner, states),
        skip=weight(inner),
        out=nn.Linear(inner, c),
    )
    return step, state


def experts(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Weigh a few perceptrons by a gate over them."""
    c = state[-1]
    count, hidden = dice.integer(2, 3), width(dice, state)
    how = dice.pick("einsum", "bmm", "loop")

    def function(s: Any, x: Tensor) -> Tensor:
        gate = s.gate(x).softmax(-1)
        if how == "einsum":
            y = torch.einsum("...c,ecf->...ef", x, s.up).relu()
            return torch.einsum("...ef,efc,...e->...c", y, s.down, gate)
        if how == "bmm":
            flat = x.reshape(1, -1, c).expand(count, -1, -1)
            y = torch.bmm(torch.bmm(flat, s.up).relu(), s.down)
            return (y * gate.reshape(-1, count).t()[:, :, None]).sum(0).view(x.shape)
        out = torch.zeros_like(x)
        for i in range(count):
            out += ((x @ s.up[i]).relu() @ s.down[i]) * gate[..., i : i + 1]
        return out

    step = Step(
        function,
        f"{count} experts of {hidden} by {how}",
        gate=nn.Linear(c, count),
        up=weight(count, c, hidden),
        down=weight(count, hidden, c),
    )
    return step, state


# -- vectors -----------------------------------------------------------------------------------------------------------


def product_of_vectors(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Multiply projections of a vector: outer products, bilinear forms, einsums with several letters."""
    (c,) = state
    a, b = dice.integer(1, 4), dice.integer(1, 4)
    out = width(dice, state)
    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "outer": lambda s, x: s.mix(torch.einsum("bi,bj->bij", s.a(x), s.b(x)).flatten(1)),
        "outer with itself": lambda s, x: s.own((s.a(x)[:, :, None] * s.a(x)[:, None, :]).flatten(1)),
        "gram": lambda s, x: s.own(torch.bmm(s.a(x)[:, :, None], s.a(x).sigmoid()[:, None]).reshape(x.shape[0], -1)),
        "bilinear": lambda s, x: s.form(s.a(x), s.b(x)),
        "chain": lambda s, x: torch.einsum("bi,bj,oij->bo", s.a(x).sigmoid(), s.b(x), s.form.weight),
        "pairs": lambda s, x: s.read((s.a(x)[:, :, None] * s.table).sum(1)),
        "addmm": lambda s, x: torch.addmm(s.form.bias, s.a(x), s.form.weight[:, :, 0].t()),
        "distance": lambda s, x: s.read((s.b(x)[:, None, :] - s.points).square().sum(-1)),
        "similar": lambda s, x: s.read(
            functional.normalize(s.b(x), dim=-1) @ functional.normalize(s.points, dim=-1).t()
        ),
    }
    how = dice.among(sorted(functions))
    points = width(dice, state)
    read = nn.Linear(b if how == "pairs" else points, out)
    step = Step(
        functions[how],
        f"{how} {a} {b}",
        a=nn.Linear(c, a),
        b=nn.Linear(c, b),
        mix=nn.Linear(a * b, out),
        own=nn.Linear(a * a, out),
        form=nn.Bilinear(a, b, out),
        table=weight(a, b),
        points=weight(points, b),
        read=read,
    )
    return step, (out,)


# -- from one state to another -----------------------------------------------------------------------------------------


def moved(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Turn an image into tokens or vectors, tokens into vectors or images, vectors into tokens."""
    if len(state) == 3:
        c, h, w = state
        how = dice.pick("tokens", "mean", "flatten", "max", "tokens by einsum")
        functions: dict[str, tuple[Callable[[Any, Tensor], Tensor], State]] = {
            "tokens": (lambda s, x: x.flatten(2).transpose(1, 2), (h * w, c)),
            "tokens by einsum": (lambda s, x: torch.einsum("bchw->bhwc", x).reshape(-1, h * w, c), (h * w, c)),
            "mean": (lambda s, x: x.mean((2, 3)), (c,)),
            "max": (lambda s, x: functional.adaptive_max_pool2d(x, 1).squeeze(-1).squeeze(-1), (c,)),
            "flatten": (lambda s, x: s.last(torch.flatten(x, 1)), (5,)),
        }
        function, after = functions[how]
        return Step(function, how, last=nn.Linear(c * h * w, 5)), after
    if len(state) == 2:
        n, c = state
        how = dice.pick("mean", "first", "image", "flatten", "weighed", "sum")
        h = max(d for d in divisors(n) if d * d <= n)
        options: dict[str, tuple[Callable[[Any, Tensor], Tensor], State]] = {
            "mean": (lambda s, x: x.mean(1), (c,)),
            "sum": (lambda s, x: x.sum(1), (c,)),
            "first": (lambda s, x: x[:, 0], (c,)),
            "image": (lambda s, x: x.transpose(1, 2).reshape(x.shape[0], c, h, n // h), (c, h, n // h)),
            "flatten": (lambda s, x: s.last(x.reshape(-1, n * c)), (5,)),
            "weighed": (lambda s, x: (s.score(x).softmax(1) * x).sum(1), (c,)),
        }
        function, after = options[how]
        return Step(function, how, last=nn.Linear(n * c, 5), score=nn.Linear(c, 1)), after
    (c,) = state
    count = dice.integer(1, 4)
    how = dice.pick("wide", "repeated", "queries")
    n = count
    spread: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "wide": lambda s, x: s.wide(x).view(-1, n, c),
        "repeated": lambda s, x: x[:, None, :].expand(-1, n, -1) * s.queries,
        "queries": lambda s, x: s.queries + x.unsqueeze(1),
    }
    return Step(spread[how], how, wide=nn.Linear(c, n * c), queries=weight(n, c)), (n, c)


ANY: list[Builder] = [mixer, residual, joined, parted, halves, scaled, reduced, normed, tied, viewed, written, stacked]
IMAGE: list[Builder] = [convolution, convolution, computed_convolution, spatial, rearranged, gate_of_image]
TOKENS: list[Builder] = [attention, attention, attention, token_mixer, state_space, experts]
VECTOR: list[Builder] = [product_of_vectors, product_of_vectors, experts]
_LIMIT = 220
"""Largest number of entries of a state: steps that widen it further are not drawn."""


def describe(module: nn.Module) -> str:
    """Return the names of the steps in a chain."""
    if isinstance(module, nn.Sequential):
        return "(" + " > ".join(map(describe, module)) + ")"
    return module.name if isinstance(module, Step) and module.name else str(module).partition("\n")[0]


def _measured(module: nn.Module, state: State) -> tuple[nn.Module, State]:
    """Run a step to see what state it leaves."""
    with torch.no_grad():
        module = module.double()
        return module, tuple(module(torch.zeros(2, *state, dtype=torch.float64)).shape[1:])


def step(dice: Dice, state: State) -> tuple[nn.Module, State]:
    """Draw one step that suits the state."""
    special = {3: IMAGE, 2: TOKENS, 1: VECTOR}[len(state)]
    choices: list[Builder] = [*ANY, activation, activation, *special, *special, ordered]
    if prod(state) > _LIMIT:
        choices = [mixer, activation, normed]
    made, after = dice.among(choices)(dice, state)
    return made, after


def chain(dice: Sequence[Dice], state: State, *, keep: bool = False) -> tuple[nn.Sequential, State]:
    """Draw a step for each of the dice; ``keep`` makes them end in the state they began with."""
    made: list[nn.Module] = []
    after = state
    for each in dice:
        part, found = step(each, after)
        if keep and _with_channels(found, 1) != _with_channels(state, 1):
            continue  # places were lost
        made.append(part)
        after = found
    if keep and after != state:
        made.append(mixer(Dice(len(made)), after, _channels(state))[0])
        after = state
    return nn.Sequential(*made), after


class TiedTokens(nn.Module):
    """Embed token numbers, run steps, and score by the embedding itself."""

    def __init__(self, count: int, steps: nn.Module, width: int, *, tie: bool) -> None:
        super().__init__()
        self.embed, self.steps, self.last = nn.Embedding(count, width), steps, nn.Linear(width, count, bias=False)
        if tie:
            self.last.weight = self.embed.weight

    def forward(self, numbers: Tensor) -> Tensor:
        return self.last(self.steps(self.embed(numbers)))


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Draw a module with its inputs: numbers that choose the input, the steps, and the end.

    A failing example shrinks to fewer steps; what a step is follows from its number and the state it meets.
    """
    numbers = st.integers(0, 2**40)
    return sample(draw(numbers), draw(st.lists(numbers, min_size=1, max_size=5)), draw(numbers))


def sample(start: int, steps: Sequence[int], end: int) -> Sample:
    """Make a module from numbers."""
    dice = Dice(start)
    kind = dice.pick("image", "image", "image", "tokens", "tokens", "tokens", "numbers", "vectors")
    batch, other = dice.permutation([1, 2, 3, 4, 5])[:2]
    generator = torch.Generator().manual_seed(dice.integer(0, 1000))
    c = dice.among(_WIDTHS)
    if kind == "numbers":
        n = dice.pick(3, 4, 6)
        inner, _ = chain([Dice(number) for number in steps], (n, c), keep=True)
        module: nn.Module = TiedTokens(7, inner, c, tie=dice.coin())
        inputs = [torch.randint(7, (b, n), generator=generator) for b in (batch, other)]
        return Sample(module, (inputs[0],), (inputs[1],), ("embedding", describe(inner)))
    shapes = {"image": (c, dice.pick(3, 4, 5), dice.pick(4, 5, 6)), "tokens": (dice.pick(3, 4, 6), c), "vectors": (c,)}
    state: State = shapes[kind]
    inputs = [torch.randn(b, *state, generator=generator, dtype=torch.float64) for b in (batch, other)]
    first, state = mixer(dice, state)
    made = [first]
    for number in steps:
        part, state = (moved if number % 5 == 0 else step)(Dice(number), state)
        made.append(part)
    made.extend(ending(Dice(end), state))
    return Sample(nn.Sequential(*made), (inputs[0],), (inputs[1],), tuple(map(describe, made)))


def ending(dice: Dice, state: State) -> Iterator[nn.Module]:
    """Yield what makes the output of the last state."""
    how = dice.pick("mixed", "mixed", "mixed", "as it is", "summed", "pooled", "scored")
    dim = _channel(state)
    if how == "mixed":
        yield mixer(dice, state)[0]
    elif how == "summed":
        yield Step(lambda s, x: x.sum(dim), "summed")
    elif how == "scored":
        yield Step(lambda s, x: x.movedim(dim, -1) @ s.score, "scored", score=weight(_channels(state)))
    elif how == "pooled":
        yield Step(lambda s, x: x.flatten(1).mean(1, keepdim=True), "pooled")
