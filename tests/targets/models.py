"""Hold small models, one of each kind that a lowering has to get right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Conv(nn.Module):
    """Convolve, normalise in place, add, drop and classify."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(image)))
        x += self.body(x)
        return self.head(self.drop(self.act(x).mean((2, 3))))


class Attention(nn.Module):
    """Attend under a mask given with the inputs; heads split and merged by views."""

    def __init__(self, heads: int = 4, groups: int = 4) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.query = nn.Linear(16, heads * 4)
        self.key = nn.Linear(16, groups * 4)
        self.value = nn.Linear(16, groups * 4)
        self.out = nn.Linear(heads * 4, 16)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        b, n, _ = tokens.shape
        q = self.query(tokens).view(b, n, self.heads, 4).transpose(1, 2)
        k = self.key(tokens).view(b, n, self.groups, 4).transpose(1, 2)
        v = self.value(tokens).view(b, n, self.groups, 4).transpose(1, 2)
        seen = None if mask is None else mask[:, None, None, :]
        attended = functional.scaled_dot_product_attention(
            q, k, v, seen, is_causal=mask is None, enable_gqa=self.heads != self.groups
        )
        return {"hidden": self.out(attended.transpose(1, 2).reshape(b, n, -1)), "last": tokens[:, -1]}


class Tied(nn.Module):
    """Embed and project back with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Pair(NamedTuple):
    """Hold two results."""

    first: Tensor
    second: Tensor


@dataclass
class Result:
    """Hold a result and a nested one."""

    logits: Tensor
    states: tuple[Tensor, ...]


class Nested(nn.Module):
    """Take nested inputs and return nested outputs, one of them an input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, pair: tuple[Tensor, dict[str, Tensor]], scale: float = 1.0) -> Result:
        first, rest = pair
        hidden = self.linear(first) * scale
        return Result(hidden + rest["shift"], (hidden, first))


class Sizes(nn.Module):
    """Compute with sizes that depend on the inputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        places = torch.arange(n, dtype=torch.float32, device=x.device)
        odd = torch.arange(1, 2 * n + 1, 2)
        blocks = torch.full((n, 2), 7.0) + torch.zeros(n, 1) + torch.ones(1, n).sum()
        eye = torch.eye(n) + x.new_ones(n, n) * x.new_full((n, n), 0.5)
        halves = x[: (n + 1) // 2]
        flat = x.reshape(n * 2, 2)
        return places, odd, blocks, eye, halves, flat, x * n, x.expand(3, *x.shape)


class Writes(nn.Module):
    """Write into views, in every way whose result is read through another name."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        base = x * 2
        row = base[:, 1]
        row.add_(1)
        base[:, :2].mul_(3)
        base.transpose(1, 2)[:, 0] = 5
        left, right = base.chunk(2, dim=2)
        right.copy_(left)
        base.unbind(1)[2].zero_()
        base.view(x.shape[0], -1)[:, 3].fill_(9)
        grid = torch.zeros(4, 4)
        grid[1:, 2] = 1
        return base, row, left, grid + self.mask + x[:, :4, :4]
