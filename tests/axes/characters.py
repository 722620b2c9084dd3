"""Small modules that each have one trait of a real architecture, with sizes that tell every axis apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CHARACTERS"]


class Perceptron(nn.Module):
    """A hidden width."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class RotaryGroupedAttention(nn.Module):
    """Llama's attention: rotary positions by halves, 2 key heads for 6 query heads, and a gated perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.norm = nn.RMSNorm(10)
        self.q, self.k, self.v, self.o = (
            nn.Linear(a, b, bias=False) for a, b in ((10, 24), (10, 8), (10, 8), (24, 10))
        )
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((10, 7), (10, 7), (7, 10)))
        self.score = nn.Linear(10, 11, bias=False)

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.embed(numbers)
        b, n, _ = x.shape
        y = self.norm(x)
        q, k, v = (p(y).view(b, n, -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        angle = torch.outer(torch.arange(n).double(), 0.5 ** torch.arange(2).double())
        cos, sin = torch.cat((angle, angle), 1).cos(), torch.cat((angle, angle), 1).sin()
        q, k = (t * cos + torch.cat((-t[..., 2:], t[..., :2]), -1) * sin for t in (q, k))
        k, v = (t[:, :, None].expand(b, 2, 3, n, 4).reshape(b, 6, n, 4) for t in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, 24))
        y = self.norm(x)
        return self.score(x + self.down(functional.silu(self.gate(y)) * self.up(y)))


class ShuffleUnit(nn.Module):
    """ShuffleNet's unit: half of the channels pass, half are convolved, then all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point = nn.Conv2d(3, 10, 1), nn.Conv2d(5, 5, 1)
        self.depth, self.last = nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.depth(self.point(b))], 1)
        x = x.view(x.shape[0], 2, 5, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.last(x)


class WindowAttention(nn.Module):
    """Swin's attention: windows of 2 x 2, packed projections, a table of relative positions read by index."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.out = nn.Linear(5, 7), nn.Linear(7, 36), nn.Linear(12, 7)
        self.table = nn.Parameter(torch.zeros(9, 3))
        self.last = nn.Linear(7, 2)
        place = torch.cartesian_prod(torch.arange(2), torch.arange(2))
        apart = (place[:, None] - place + 1).unbind(-1)
        self.register_buffer("index", apart[0] * 3 + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, h, w, c = x.shape
        y = x.roll((-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(-1, 4, 3, 3, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        y = ((q * 0.5) @ k.transpose(-2, -1) + bias[None]).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(-1, 4, 12))
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.last(x + y.roll((1, 1), (1, 2)))


class CrossStage(nn.Module):
    """YOLO's C2f: a split, a chain of bottlenecks with shortcuts, and the concatenation of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 10, 1), nn.Conv2d(20, 2, 1)
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(5, hidden, 3, padding=1), nn.SiLU(), nn.Conv2d(hidden, 5, 1)) for hidden in (4, 7)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        return self.last(torch.cat(parts, 1))


class SqueezeExcite(nn.Module):
    """A gate over channels from their mean over space."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu_()
        x = x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.last(x.mean((2, 3)))


class DenseBlock(nn.Module):
    """DenseNet's block: every layer reads all that came before, each through a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (6, 10))
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1, bias=False) for c in (6, 10))
        self.norm, self.last = nn.BatchNorm2d(14), nn.Linear(14, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return self.last(self.norm(x).relu().mean((2, 3)))


class GroupNormed(nn.Module):
    """A group norm between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.silu(self.norm(self.first(x))))


class PixelShuffled(nn.Module):
    """Upsampling by channels that become space."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.pixel_shuffle(self.up(x), 2).relu()
        return self.last(self.down(functional.pixel_unshuffle(y, 2)))


class Flattened(nn.Module):
    """Space and channels flattened before a linear layer, as in VGG."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.last = nn.Conv2d(3, 7, 3, padding=1), nn.Linear(7 * 4 * 5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(torch.flatten(self.conv(x).relu(), 1)).relu())


class EinsumAttention(nn.Module):
    """Attention by einsum, its heads in the shape of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(5, 3, d)) for d in (4, 4, 7))
        self.out = nn.Parameter(torch.zeros(3, 7, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * 4**-0.5
        return torch.einsum("bhij,bhjd,hdo->bio", scores.softmax(-1), v, self.out)


class TiedEmbedding(nn.Module):
    """An embedding that scores as well, with learned positions and a norm of the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position, self.norm = nn.Embedding(11, 6), nn.Parameter(torch.zeros(4, 6)), nn.LayerNorm(6)
        self.up, self.down, self.score = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 11, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.embed(numbers) + self.position
        return self.score(x + self.down(self.up(self.norm(x)).relu()))


class InvertedResidual(nn.Module):
    """MobileNet's block: widen, convolve every channel by itself, narrow, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.widen, self.narrow = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 9, 1, bias=False), nn.Conv2d(9, 5, 1)
        self.depth = nn.Conv2d(9, 9, 3, padding=1, groups=9, bias=False)
        self.norm, self.last = nn.BatchNorm2d(9), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = functional.relu6(self.norm(self.depth(functional.relu6(self.widen(x)))))
        return self.last(x + self.narrow(y))


class TransposedUNet(nn.Module):
    """Down by stride, up by transposed convolution, beside a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.down = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 8, 2, stride=2)
        self.up, self.dec = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(11, 7, 3, padding=1)
        self.last = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc(x).relu()
        y = self.up(self.down(skip).relu())
        return self.last(self.dec(torch.cat([skip, y], 1)).relu())


class SelectiveScan(nn.Module):
    """Mamba's block: a gated branch, a causal depthwise convolution, and a scan over the states of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.packed, self.conv = nn.Linear(3, 5), nn.Linear(5, 14), nn.Conv1d(7, 7, 2, padding=1, groups=7)
        self.select, self.step = nn.Linear(7, 2 + 4 + 4, bias=False), nn.Linear(2, 7)
        self.decay, self.skip = nn.Parameter(torch.zeros(7, 4)), nn.Parameter(torch.zeros(7))
        self.out, self.last = nn.Linear(7, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n = x.shape[1]
        y, gate = self.packed(x).chunk(2, -1)
        y = functional.silu(self.conv(y.transpose(1, 2))[..., :n]).transpose(1, 2)
        step, enter, leave = self.select(y).split([2, 4, 4], -1)
        step = functional.softplus(self.step(step))[..., None]
        state, found = torch.zeros(x.shape[0], 7, 4, dtype=x.dtype), []
        for i in range(n):
            state = (step[:, i] * -self.decay.exp()).exp() * state + step[:, i] * enter[:, i, None] * y[:, i, :, None]
            found.append((state * leave[:, i, None]).sum(-1))
        y = torch.stack(found, 1) + y * self.skip
        return self.last(x + self.out(y * functional.silu(gate)))


class GlobalResponse(nn.Module):
    """ConvNeXt V2's block: a norm of each channel over space, divided by the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)
        self.scale, self.shift = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.up(x))
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return self.down(x + self.scale * x * (norm / (norm.mean(-1, keepdim=True) + 1e-6)) + self.shift)


class FactorisedAttention(nn.Module):
    """Cross attention of learned queries with as many keys as places, then a mixer over the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(6, 4))
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(5, 8)
        self.mix, self.last = nn.Linear(6, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.queries).view(6, 2, 3).transpose(0, 1)
        k, v = self.k(x).unflatten(-1, (2, 3)).transpose(1, 2), self.v(x).unflatten(-1, (2, 4)).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q.expand(x.shape[0], -1, -1, -1), k, v)
        return self.last(self.mix(y.transpose(1, 2).flatten(2).transpose(1, 2)).transpose(1, 2))


def _real(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64)


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(11, shape)


CHARACTERS: dict[str, tuple[type[nn.Module], Callable[[], Tensor]]] = {
    "perceptron": (Perceptron, _real(2, 5)),
    "rotary grouped-query attention": (RotaryGroupedAttention, _numbers(2, 5)),
    "shuffle unit": (ShuffleUnit, _real(2, 3, 4, 6)),
    "window attention": (WindowAttention, _real(2, 4, 6, 5)),
    "cross-stage": (CrossStage, _real(2, 3, 4, 6)),
    "squeeze-excite": (SqueezeExcite, _real(2, 3, 5, 6)),
    "dense block": (DenseBlock, _real(2, 3, 4, 6)),
    "group norm": (GroupNormed, _real(2, 3, 5, 6)),
    "pixel shuffle": (PixelShuffled, _real(2, 3, 4, 5)),
    "flatten": (Flattened, _real(2, 3, 4, 5)),
    "einsum attention": (EinsumAttention, _real(2, 6, 5)),
    "tied embedding": (TiedEmbedding, _numbers(2, 4)),
    "inverted residual": (InvertedResidual, _real(2, 3, 4, 6)),
    "transposed u-net": (TransposedUNet, _real(2, 3, 4, 6)),
    "selective scan": (SelectiveScan, _real(2, 3, 3)),
    "global response": (GlobalResponse, _real(2, 4, 6, 3)),
    "learned queries": (FactorisedAttention, _real(2, 7, 5)),
}
"""By name: the module's class, and what makes an input."""
