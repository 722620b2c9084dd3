"""Train small models on scikit-learn's digits: real data that a laptop learns in seconds.

What may live here: the data, the models and the training loop that the digits benchmarks and tests share. 1,797 images
of 8 x 8 pixels; three quarters train, one quarter tests, split by the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["MODELS", "Digits", "SmallMobileNet", "SmallResNet", "SmallViT", "accuracy", "load", "train"]


@dataclass(frozen=True)
class Digits:
    """The data: images ``(n, 1, 8, 8)`` of mean 0 and deviation 1, labels ``(n,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(seed: int) -> Digits:
    """Load and split the data."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target)
    a, b, c, d = train_test_split(images, labels, test_size=0.25, random_state=seed, stratify=labels)
    return Digits(a, c, b, d)


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        total: Tensor = y + self.shortcut(x)
        return F.relu(total)


class SmallResNet(nn.Module):
    """Six residual blocks in three stages of 16, 32 and 64 channels, with batch norm and dropout."""

    def __init__(self) -> None:
        """Build with random weights."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.Sequential(*(_Block(*w) for w in widths))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, 10)``."""
        logits: Tensor = self.head(self.drop(self.blocks(self.stem(x)).mean((2, 3))))
        return logits


class _Inverted(nn.Module):
    """Widen, filter each channel, narrow; a residual where shapes allow."""

    def __init__(self, inside: int, outside: int, stride: int, factor: int = 4) -> None:
        super().__init__()
        hidden = factor * inside
        self.layers = nn.Sequential(
            nn.Conv2d(inside, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class SmallMobileNet(nn.Module):
    """Six inverted residual blocks of 16, 24 and 40 channels, widened four times, with batch norm and ReLU6."""

    def __init__(self) -> None:
        """Build with random weights."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        widths = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 24, 1), (24, 40, 2), (40, 40, 1)]
        self.blocks = nn.Sequential(*(_Inverted(*w) for w in widths))
        self.last = nn.Sequential(nn.Conv2d(40, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6())
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, 10)``."""
        logits: Tensor = self.head(self.drop(self.last(self.blocks(self.stem(x))).mean((2, 3))))
        return logits


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class SmallViT(nn.Module):
    """Four layers of width 48 with four heads on 16 patches of 2 x 2 pixels."""

    def __init__(self) -> None:
        """Build with random weights."""
        super().__init__()
        self.patches = nn.Conv2d(1, 48, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, 48) * 0.02)
        self.layers = nn.Sequential(*(_Layer(48, 4, 128) for _ in range(4)))
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, 10)``."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small-resnet": SmallResNet,
    "small-mobilenet": SmallMobileNet,
    "small-vit": SmallViT,
}


def train(model: nn.Module, data: Digits, *, epochs: int, lr: float, seed: int, batch: int = 64) -> None:
    """Train in place with AdamW, a one-cycle learning rate and label smoothing; leaves the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * -(-len(data.train_labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data.train_labels), generator=generator).split(batch):
            loss = F.cross_entropy(model(data.train_images[index]), data.train_labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, data: Digits) -> float:
    """Return the share of test images that are recognised, in evaluation mode; the mode is put back."""
    before = model.training
    model.eval()
    with torch.no_grad():
        right: float = (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()
    model.train(before)
    return right
