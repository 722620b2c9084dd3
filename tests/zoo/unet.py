"""A U-Net with concatenated skips and transposed convolutions (Ronneberger et al. 2015, arXiv:1505.04597)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["UNetCat"]


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNetCat(nn.Module):
    """Segment images (n, 3, h, w), h and w divisible by two to the number of levels less one; gives class maps."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 192), classes: int = 5) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.encoder = nn.ModuleList(_double(*pair) for pair in pairwise((3, *widths)))
        rising = list(reversed(list(pairwise(widths))))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(deep, shallow, 2, 2) for shallow, deep in rising)
        self.decoder = nn.ModuleList(_double(2 * shallow, shallow) for shallow, _ in rising)
        self.classify = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        x = skips.pop()
        for enlarge, block in zip(self.enlarge, self.decoder, strict=True):
            x = block(torch.cat((skips.pop(), enlarge(x)), 1))
        classes: Tensor = self.classify(x)
        return classes
