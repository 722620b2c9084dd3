"""Hold small modules whose own code has to follow a pruning, each in its own way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Convolutions(nn.Module):
    """Use grouped, depthwise and transposed convolutions, and norms of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.bend = nn.PReLU(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.mix = nn.Conv2d(12, 8, 1)
        self.scale = nn.GroupNorm(4, 8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bend(self.grouped(self.norm(self.stem(x))))
        x = self.scale(self.mix(self.depthwise(x)))
        logits: Tensor = self.head(self.up(x).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Pack q, k and v, and keep heads, head dim, inner width and scale as attributes."""

    def __init__(self, width: int = 20, heads: int = 4, head_dim: int = 6) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner = heads, head_dim, heads * head_dim
        self.scale = head_dim**-0.5
        self.fused = True
        self.qkv = nn.Linear(width, 3 * self.inner)
        self.proj = nn.Linear(self.inner, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, length, self.inner))
        return out


class Switched(Attention):
    """Leave the scale to a fused attention, unless a switch says otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, length, self.inner))
        return out


class Fused(Attention):
    """Leave the scale to a fused attention, always."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)  # the line that is to blame
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, length, self.inner))
        return out


class Grouped(nn.Module):
    """Share each key and value head among several query heads; sizes stand in a configuration that others share."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        heads, kv, dim = config.heads, config.kv_heads, config.head_dim
        self.num_key_value_groups = heads // kv
        self.scaling = dim**-0.5
        self.q_proj = nn.Linear(config.width, heads * dim)
        self.k_proj = nn.Linear(config.width, kv * dim)
        self.o_proj = nn.Linear(heads * dim, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, -1, self.config.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, -1, self.config.head_dim).transpose(1, 2)
        k = k.repeat_interleave(self.num_key_value_groups, 1)
        y = (q @ k.transpose(-2, -1) * self.scaling).softmax(-1) @ k
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return x + out


class Stack(nn.Module):
    """Stack layers that share one configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(width=20, heads=4, kv_heads=2, head_dim=6, lengths={"window": 6})
        self.layers = nn.ModuleList(Grouped(self.config) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Literal(nn.Module):
    """Write a width into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(torch.relu(self.stem(x))).mean((2, 3), keepdim=True)
        logits: Tensor = self.head(pooled.reshape(-1, 8))  # the line that is to blame
        return logits


class Trap(nn.Module):
    """Derive a scale from the width, which code needs as a size, too."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.up, self.down = nn.Linear(5, 32), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).split(self.width, -1)
        y = a * b * self.width**-0.5  # the line that is to blame
        out: Tensor = self.down(y)
        return out


class Parts(nn.Module):
    """Keep sizes in containers, a window that is no size, a table that is no buffer, and a norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (8, 4)
        self.options: dict[str, Any] = {"gate": [8], "name": "parts"}
        self.window = 4
        self.up, self.down = nn.Linear(6, 12), nn.Linear(8, 5)
        self.inner = nn.Linear(4, 8)
        self.plain = nn.LayerNorm(8, elementwise_affine=False)
        self.table = torch.linspace(-1, 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, self.window)).mean(2)
        a, b = self.up(x).split(list(self.sizes), -1)
        gate = self.inner(b).sigmoid().reshape(*b.shape[:-1], self.options["gate"][0])
        out: Tensor = self.down(self.plain(a * gate + self.table))
        return out


class Cached(nn.Module):
    """Keep what was computed from weights until the mode changes, and take a table of them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 10))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Cached:
        """Forget what was computed."""
        self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            offset = self.bias.exp()
        else:
            if "offset" not in self.cache:
                self.cache["offset"] = self.bias.exp().detach()
            offset = self.cache["offset"]
        out: Tensor = self.down(torch.relu(self.up(x) + offset))
        return out


class Tied(nn.Module):
    """Classify with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        logits: Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return logits


class Crossed(nn.Module):
    """Attend to values of another width with torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(5, 12)
        self.attention = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory = torch.relu(self.memory(y))
        out: Tensor = self.attention(x, memory, memory, need_weights=False)[0]
        return out
