"""Operators on signals: Fourier transforms, windows, the mel scale. Complex numbers are pairs in a last dimension."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, axis_of, number, type_of

__all__ = ["TABLE"]


def _dft(x: Tensor, dft_length: Any = None, axis: Any = -2, *, inverse: int = 0, onesided: int = 0) -> Tensor:
    """Transform an axis; with ``onesided`` only the frequencies up to half, of which the others are conjugates."""
    dim = axis_of(-2 if axis is None else int(number(axis)), x.dim())
    length = None if dft_length is None else int(number(dft_length))
    real = x.shape[-1] == 1
    values = x.squeeze(-1) if real else torch.complex(x[..., 0], x[..., 1])
    if inverse and onesided:
        signal: Tensor = torch.fft.irfft(values, length, dim)
        return signal.unsqueeze(-1)
    transform: Function = torch.fft.ifft if inverse else torch.fft.rfft if onesided else torch.fft.fft
    return torch.view_as_real(transform(values, length, dim))


def _stft(
    signal: Tensor, frame_step: Any, window: Tensor | None = None, frame_length: Any = None, *, onesided: int = 1
) -> Tensor:
    """Transform frames of a signal (batch, length, 1 or 2), each multiplied by the window."""
    length = int(number(frame_length)) if frame_length is not None else window.shape[0] if window is not None else None
    values = signal
    if signal.dim() == 3:
        values = signal.squeeze(-1) if signal.shape[-1] == 1 else torch.complex(signal[..., 0], signal[..., 1])
    frames = values.unfold(1, length or values.shape[1], int(number(frame_step)))
    if window is not None:
        frames = frames * window
    return torch.view_as_real(torch.fft.rfft(frames) if onesided else torch.fft.fft(frames))


def _window(terms: tuple[float, ...]) -> Function:
    """Return a window of cosines: the sum over k of terms[k] · cos(k · 2π n / N)."""

    def computed(size: Any, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
        count = int(number(size))
        period = count if periodic else count - 1
        angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / period if period else 0.0)
        values = torch.stack([term * torch.cos(k * angle) for k, term in enumerate(terms)]).sum(0)
        return values.to(type_of(output_datatype))

    return computed


def _mel_weights(
    num_mel_bins: Any,
    dft_length: Any,
    sample_rate: Any,
    lower_edge_hertz: Any,
    upper_edge_hertz: Any,
    *,
    output_datatype: int = 1,
) -> Tensor:
    """Return how much each frequency counts in each bin, triangles that are evenly spaced on the mel scale."""
    bins, length, rate = int(number(num_mel_bins)), int(number(dft_length)), int(number(sample_rate))
    low, high = (2595 * math.log10(1 + float(number(f)) / 700) for f in (lower_edge_hertz, upper_edge_hertz))
    step = (high - low) / (bins + 2)
    hertz = [700 * (10 ** ((low + step * i) / 2595) - 1) for i in range(bins + 2)]
    edges = [math.floor((length + 1) * f / rate) for f in hertz]
    weights = torch.zeros(length // 2 + 1, bins, dtype=torch.float64)
    for i in range(bins):
        left, centre, right = edges[i : i + 3]
        if left == centre:
            weights[centre, i] = 1
        for j in range(left, centre):
            weights[j + 1, i] = (j + 1 - left) / (centre - left)
        for j in range(centre, right):
            weights[j, i] = (right - j) / (right - centre)
    return weights.to(type_of(output_datatype))


TABLE: Final[dict[str, Function]] = {
    "BlackmanWindow": _window((0.42, -0.5, 0.08)),
    "DFT": _dft,
    "HammingWindow": _window((25 / 46, -21 / 46)),
    "HannWindow": _window((0.5, -0.5)),
    "MelWeightMatrix": _mel_weights,
    "STFT": _stft,
}
