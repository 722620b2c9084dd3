"""A one-stage detector in the manner of YOLOv8: C2f blocks, pyramid pooling, a path-aggregating neck, a free head.

The widths and depths are those of the smallest model of that family (Jocher et al. 2023).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["YoloC2f"]


class ConvNormAct(nn.Sequential):
    """Convolve, normalise, activate."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3),
            nn.SiLU(inplace=True),
        )


class Bottleneck(nn.Module):
    """Convolve twice, and add the input where `shortcut` asks for it."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(width, width, 3)
        self.conv2 = ConvNormAct(width, width, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """Cut the channels in two, grow a chain of bottlenecks on the second part, and join every link of it.

    The cut is a `chunk` or, with `split`, a `split` by sizes; both are in use.
    """

    def __init__(self, inputs: int, outputs: int, depth: int, *, shortcut: bool, split: bool) -> None:
        super().__init__()
        self.width = outputs // 2
        self.split = split
        self.enter = ConvNormAct(inputs, 2 * self.width)
        self.chain = nn.ModuleList(Bottleneck(self.width, shortcut) for _ in range(depth))
        self.leave = ConvNormAct((2 + depth) * self.width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.enter(x)
        parts = list(y.split((self.width, self.width), 1) if self.split else y.chunk(2, 1))
        for block in self.chain:
            parts.append(block(parts[-1]))
        joined: Tensor = self.leave(torch.cat(parts, 1))
        return joined


class PyramidPool(nn.Module):
    """Join an input with itself pooled once, twice and three times (SPPF)."""

    def __init__(self, width: int, kernel: int = 5) -> None:
        super().__init__()
        self.enter = ConvNormAct(width, width // 2)
        self.leave = ConvNormAct(width // 2 * 4, width)
        self.pool = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        joined: Tensor = self.leave(torch.cat(parts, 1))
        return joined


class Head(nn.Module):
    """Predict boxes and classes apart, a box's sides as distributions over distances (arXiv:2006.04388).

    Returns (n, 4 + classes, anchors): centre and size in pixels, then class probabilities.
    """

    bins: Tensor

    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...], classes: int, bins: int = 16) -> None:
        super().__init__()
        self.strides = strides
        self.classes = classes
        box_width, class_width = max(16, widths[0] // 4, 4 * bins), max(widths[0], min(classes, 100))
        self.boxes = nn.ModuleList(self._tower(width, box_width, 4 * bins) for width in widths)
        self.scores = nn.ModuleList(self._tower(width, class_width, classes) for width in widths)
        self.register_buffer("bins", torch.arange(bins, dtype=torch.float32))

    @staticmethod
    def _tower(inputs: int, width: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(ConvNormAct(inputs, width, 3), ConvNormAct(width, width, 3), nn.Conv2d(width, outputs, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        raw = [
            torch.cat((box(x), score(x)), 1) for x, box, score in zip(features, self.boxes, self.scores, strict=True)
        ]
        joined = torch.cat([x.flatten(2) for x in raw], 2)
        sides, scores = joined.split((4 * len(self.bins), self.classes), 1)
        batch, _, anchors = sides.shape
        shares = sides.view(batch, 4, len(self.bins), anchors).transpose(1, 2).softmax(1)
        distances = F.conv2d(shares, self.bins.view(1, -1, 1, 1)).view(batch, 4, anchors)
        centres, scale = self._anchors(raw)
        near, far = distances.chunk(2, 1)
        start, end = centres - near, centres + far
        boxes = torch.cat(((start + end) / 2, end - start), 1) * scale
        return torch.cat((boxes, scores.sigmoid()), 1)

    def _anchors(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Give the cells' centres (2, anchors), in cells, and the size of a cell (1, anchors), in pixels."""
        centres, scales = [], []
        for x, stride in zip(maps, self.strides, strict=True):
            height, width = x.shape[2:]
            rows = torch.arange(height, dtype=x.dtype, device=x.device) + 0.5
            columns = torch.arange(width, dtype=x.dtype, device=x.device) + 0.5
            y, x_ = torch.meshgrid(rows, columns, indexing="ij")
            centres.append(torch.stack((x_, y)).view(2, -1))
            scales.append(x.new_full((1, height * width), stride))
        return torch.cat(centres, 1), torch.cat(scales, 1)


class YoloC2f(nn.Module):
    """Detect objects at three strides; images (n, 3, h, w), with h and w divisible by 32."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128, 256), classes: int = 80) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.stem = nn.Sequential(
            ConvNormAct(3, a, 3, 2), ConvNormAct(a, b, 3, 2), C2f(b, b, 1, shortcut=True, split=False)
        )
        self.stage3 = nn.Sequential(ConvNormAct(b, c, 3, 2), C2f(c, c, 2, shortcut=True, split=False))
        self.stage4 = nn.Sequential(ConvNormAct(c, d, 3, 2), C2f(d, d, 2, shortcut=True, split=False))
        self.stage5 = nn.Sequential(ConvNormAct(d, e, 3, 2), C2f(e, e, 1, shortcut=True, split=False), PyramidPool(e))
        self.down4 = C2f(e + d, d, 1, shortcut=False, split=True)
        self.down3 = C2f(d + c, c, 1, shortcut=False, split=True)
        self.shrink3 = ConvNormAct(c, c, 3, 2)
        self.up4 = C2f(c + d, d, 1, shortcut=False, split=True)
        self.shrink4 = ConvNormAct(d, d, 3, 2)
        self.up5 = C2f(d + e, e, 1, shortcut=False, split=True)
        self.head = Head((c, d, e), (8, 16, 32), classes)

    def forward(self, x: Tensor) -> Tensor:
        x3 = self.stage3(self.stem(x))
        x4 = self.stage4(x3)
        x5 = self.stage5(x4)
        y4 = self.down4(torch.cat((F.interpolate(x5, scale_factor=2.0), x4), 1))
        y3 = self.down3(torch.cat((F.interpolate(y4, scale_factor=2.0), x3), 1))
        z4 = self.up4(torch.cat((self.shrink3(y3), y4), 1))
        z5 = self.up5(torch.cat((self.shrink4(z4), x5), 1))
        boxes: Tensor = self.head([y3, z4, z5])
        return boxes
