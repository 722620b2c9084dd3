"""Train a small ResNet on handwritten digits, halve its multiply-adds, refit what is left, and fine-tune it.

Run it with `python examples/quickstart.py`; it takes less than a minute on two cores and needs scikit-learn, which
brings the digits (1,797 images of 8 × 8 pixels). With `--output FOLDER` it writes the model, its report and a manifest.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import graphopt


class Block(nn.Module):
    """Add what two convolutions make of the input to the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (n, outputs, h / stride, w / stride)."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """Classify small grey images with three stages of residual blocks."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for position in range(depth):
                blocks.append(Block(inputs, width, stride=2 if stage and not position else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit a class, (n, classes)."""
        features = self.blocks(self.stem(images))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, then test images and labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train, test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in parts[:2])
    return train, torch.tensor(parts[2]), test, torch.tensor(parts[3])


def fit(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, rate: float) -> None:
    """Train with AdamW on a rate that falls to zero, in batches of 64."""
    model.train()
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64)[: len(images) // 64]:
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def main() -> None:
    """Train, optimize, fine-tune, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="folder for the model, its report and a manifest")
    parser.add_argument("--target", default="torch", help="what the result is for: torch or onnx")
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)  # so small a model loses more than it gains by sharing its work out
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(test_images).argmax(dim=1) == test_labels).double().mean())

    model = ResNet()
    start = time.perf_counter()
    fit(model, images, labels, epochs=8, rate=3e-3)
    console.print(f"trained in {time.perf_counter() - start:.1f} s: accuracy {accuracy(model):.3f}\n")

    result = graphopt.optimize(
        model,
        test_images[:8],
        target=arguments.target,
        budget=graphopt.Budget(flops=0.5),
        calibration=images[:128].split(32),  # no labels: the layers that are left are refitted on these
        evaluate=accuracy,
        output=arguments.output,
    )
    console.print(result.report)
    if arguments.target != "torch":
        return  # batch norms are folded: train for the target "torch", or hand the training over with finetune=

    start = time.perf_counter()
    fit(result.module, images, labels, epochs=3, rate=1e-3)
    console.print(f"\nfine-tuned in {time.perf_counter() - start:.1f} s: accuracy {accuracy(result.module):.3f}")


if __name__ == "__main__":
    main()
