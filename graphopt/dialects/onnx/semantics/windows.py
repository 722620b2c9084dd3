"""Hold the windows that convolutions and pooling slide over the spatial dimensions: strides, pads, how many fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

__all__ = ["Windows"]


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows over the spatial dimensions of a tensor (n, c, d1, d2, …); every list has one entry a dimension."""

    sizes: list[int]
    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begins: list[int]
    ends: list[int]

    @classmethod
    def of(
        cls,
        x: Tensor,
        kernel: Sequence[int],
        strides: Sequence[int] | None,
        dilations: Sequence[int] | None,
        pads: Sequence[int] | None,
        auto_pad: str,
    ) -> Self:
        """Return the windows that an operator's attributes describe.

        With SAME the output has ceil(size / stride) positions; of an odd padding the larger half is at the end
        (SAME_UPPER) or at the begin (SAME_LOWER).
        """
        rank = len(kernel)
        sizes, steps, gaps = list(x.shape[2:]), list(strides or [1] * rank), list(dilations or [1] * rank)
        begins, ends = [0] * rank, [0] * rank
        if auto_pad.startswith("SAME"):
            for i, (size, k, step, gap) in enumerate(zip(sizes, kernel, steps, gaps, strict=True)):
                total = max((-(-size // step) - 1) * step + gap * (k - 1) + 1 - size, 0)
                begins[i] = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
                ends[i] = total - begins[i]
        elif auto_pad != "VALID" and pads:
            begins, ends = list(pads[:rank]), list(pads[rank:])
        return cls(sizes, list(kernel), steps, gaps, begins, ends)

    @property
    def spans(self) -> list[int]:
        """How many positions lie between the first and the last of a window, both included."""
        return [gap * (k - 1) + 1 for k, gap in zip(self.kernel, self.dilations, strict=True)]

    def counts(self, *, ceil: bool) -> list[int]:
        """Return how many windows there are; with ``ceil`` also the last ones, that stick out at the end.

        A window that would begin behind the input, in the padding, is none.
        """
        found = []
        for size, span, step, begin, end in zip(
            self.sizes, self.spans, self.strides, self.begins, self.ends, strict=True
        ):
            room = size + begin + end - span
            count = (-(-room // step) if ceil else room // step) + 1
            found.append(count - 1 if ceil and (count - 1) * step >= size + begin else count)
        return found

    def padded(self, x: Tensor, value: float = 0, *, ceil: bool = False, pads: float | None = None) -> Tensor:
        """Return the input with its padding, exactly as long as its windows reach.

        Args:
            x: the input.
            value: what is added where windows stick out, and in the pads unless told otherwise.
            ceil: whether windows may stick out at the end.
            pads: what the pads proper hold.
        """
        pairs = list(zip(self.begins, self.ends, strict=True))
        if pads is not None and pads != value:
            x = F.pad(x, [n for pair in reversed(pairs) for n in pair], value=pads)
            beyond = [(0, 0)] * len(pairs)
        else:
            beyond = [(begin, 0) for begin, _ in pairs]
        needed = [
            (count - 1) * step + span
            for count, step, span in zip(self.counts(ceil=ceil), self.strides, self.spans, strict=True)
        ]
        amounts = []
        for size, need, (begin, _) in zip(reversed(x.shape[2:]), reversed(needed), reversed(beyond), strict=True):
            amounts += [begin, need - size - begin]
        return F.pad(x, amounts, value=value) if any(amounts) else x
