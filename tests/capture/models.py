"""Small models that each have something which a capture can lose."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

M = TypeVar("M", bound=nn.Module)


class Net(nn.Module):
    """A convolutional net with batch norm, dropout, a residual and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.body(x)
        return self.head(self.drop(x.mean((2, 3))))


class Tied(nn.Module):
    """A language model whose head is its embedding, with a buffer, a transient buffer, constants and unread tensors."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.unread = nn.Linear(3, 3)
        self.register_buffer("scale", torch.full((8,), 2.0))
        self.register_buffer("frequencies", torch.arange(8.0), persistent=False)
        self.offset = torch.ones(8)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids) * self.scale + self.frequencies.cos() + self.offset
        x = x + torch.tensor([0.5] * 8)
        if mask is not None:
            x = x * mask[..., None]
        return self.head(torch.tanh(self.proj(x)))


@dataclass
class Pair:
    """What :class:`Nested` returns; not registered with pytrees."""

    first: Tensor
    rest: dict[str, Tensor]


class Point(NamedTuple):
    """A named tuple of outputs."""

    x: Tensor
    y: Tensor


class Nested(nn.Module):
    """Takes tensors in lists and dicts, by position and by keyword, and returns a dataclass, a named tuple and more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, pair: list[Tensor], *more: Tensor, options: dict[str, Any], double: bool = False
    ) -> dict[str, Any]:
        total = self.linear(pair[0]) + pair[1] + sum(more) + options["bias"]
        if double:
            total = total * 2
        return {
            "pair": Pair(total, {"input": pair[0]}),
            "point": Point(total.sum(), total + 1),
            "list": [total, None, 3],
        }


class Attention(nn.Module):
    """Self-attention as models write it: a number says how much is dropped, zero in evaluation."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return x.transpose(1, 2).flatten(2)


class Functional(nn.Module):
    """Calls mode-dependent operators by itself: one by its mode, one always on, one always off."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.linear(x), 0.5, training=self.training)
        x = F.dropout(x, 0.5, training=True)
        return F.batch_norm(x, self.mean, self.var, training=False)  # type: ignore[arg-type]


class Frozen(nn.Module):
    """Keeps its backbone's batch norm in evaluation mode whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def warm(model: M, seed: int = 0) -> M:
    """Give batch norms statistics and weights that show, so that a lost one changes the output."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                with torch.no_grad():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model
