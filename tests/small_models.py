"""Build models that take milliseconds: one of each kind of structure that the tests of whole runs need."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Convolutions(nn.Module):
    """A residual block between two convolutions, a depthwise one among them, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.dropout = nn.Dropout(0.2)
        self.widen = nn.Conv2d(16, 24, 3)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.pointwise(torch.relu(self.depthwise(x)))
        return self.head(self.dropout(torch.relu(self.widen(x)).mean((2, 3))))


class Attention(nn.Module):
    """One pre-norm transformer block with packed projections: heads, head dimensions, hidden width, embedding width."""

    def __init__(self, width: int = 24, heads: int = 4, hidden: int = 40) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(6, width)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        batch, length, width = x.shape
        packed = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def images(batch: int = 2) -> Tensor:
    """Return input for :class:`Convolutions`."""
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens(batch: int = 2) -> Tensor:
    """Return input for :class:`Attention`."""
    return torch.randn(batch, 7, 6, generator=torch.Generator().manual_seed(1))


def convolutions() -> Convolutions:
    """Build one whose batch-norm statistics are no constants."""
    model = Convolutions()
    with torch.no_grad():
        model.train()(images(8))
        for parameter in model.norm.parameters():
            parameter.add_(torch.rand_like(parameter))
    return model.eval()


def attention() -> Attention:
    """Build one."""
    return Attention().eval()
