"""Operators that normalise: batch, layer, group and instance norms, root mean squares, local responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, axis_of, results, wide

__all__ = ["TABLE", "layer_norm", "rms_norm"]


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.dim() - 2))


def _batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    outputs: int = 1,
) -> Any:
    """Normalise each channel by the given statistics, in training by the batch's own, which then move the given."""
    if not training_mode:
        if scale.dtype == x.dtype == mean.dtype:
            return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
        exact = F.batch_norm(wide(x), wide(mean), wide(variance), wide(scale), wide(bias), False, 0.0, epsilon)
        return exact.to(x.dtype)
    dims = [d for d in range(x.dim()) if d != 1]
    exact = wide(x)
    variance_now, mean_now = torch.var_mean(exact, dims, correction=0)
    y = (exact - _along_channels(mean_now, x)) * _along_channels(torch.rsqrt(variance_now + epsilon), x)
    y = (y * _along_channels(scale, x) + _along_channels(bias, x)).to(x.dtype)
    moved = [
        (old * momentum + new * (1 - momentum)).to(old.dtype)
        for old, new in ((mean, mean_now), (variance, variance_now))
    ]
    return results(outputs, y, *moved)


def layer_norm(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    """Normalise over all dimensions from ``axis`` on, then scale and shift.

    Yields also the mean and one over the standard deviation, where asked for.
    """
    axis = axis_of(axis, x.dim())
    shape = list(x.shape[axis:])
    plain = all(p is None or (list(p.shape) == shape and p.dtype == x.dtype) for p in (scale, bias))
    if outputs == 1 and plain:
        return F.layer_norm(x, shape, scale, bias, epsilon)
    exact, dims = wide(x, stash_type), list(range(axis, x.dim()))
    variance, mean = torch.var_mean(exact, dims, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + epsilon)
    y = ((exact - mean) * inverse).to(x.dtype)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    return results(outputs, y, mean, inverse)


def rms_norm(
    x: Tensor,
    scale: Tensor | None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    """Divide by the root of the mean square over all dimensions from ``axis`` on, then scale."""
    exact, dims = wide(x, stash_type), list(range(axis_of(axis, x.dim()), x.dim()))
    inverse = torch.rsqrt(exact.square().mean(dims, keepdim=True) + epsilon)
    y = (exact * inverse).to(x.dtype)
    return results(outputs, y if scale is None else y * scale, inverse)


def _group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Normalise groups of channels; scale and bias hold one value a channel, before opset 21 one a group."""
    y = torch.group_norm(wide(x, stash_type), num_groups, None, None, epsilon).to(x.dtype)
    return y * _each(scale, x) + _each(bias, x)


def _each(values: Tensor, x: Tensor) -> Tensor:
    """Return one value a channel, ready to be broadcast, of one a channel or one a group."""
    return _along_channels(values.repeat_interleave(x.shape[1] // values.numel()), x)


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return torch.group_norm(x, x.shape[1], scale, bias, epsilon)


def _local_response(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """Divide by (bias + alpha/size · sum of squares of the neighbouring channels) to the power of beta."""
    squares = F.pad(x.square().movedim(1, -1), ((size - 1) // 2, size // 2))
    return x / (bias + alpha / size * squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)) ** beta


def _lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm = torch.linalg.vector_norm(x, ord=p, dim=axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))


def _mean_variance(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    variance, mean = torch.var_mean(x, list(axes), correction=0, keepdim=True)
    return (x - mean) / (variance.sqrt() + 1e-9)


def _skip_layer_norm(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> Any:
    """Add skip and bias, then normalise; the fourth result is that sum."""
    total = x + skip if bias is None else x + skip + bias
    if outputs == 1:
        return layer_norm(total, gamma, beta, epsilon=epsilon)
    return results(outputs, *layer_norm(total, gamma, beta, epsilon=epsilon, outputs=3), total)


def _skip_rms_norm(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> Any:
    """Add skip and bias, then divide by the root mean square; the fourth result is that sum."""
    total = x + skip if bias is None else x + skip + bias
    y, inverse = rms_norm(total, gamma, epsilon=epsilon, outputs=2)
    # The mean has a place among the results, and no value.
    return results(outputs, y, torch.zeros_like(inverse), inverse, total)


def _contrib_group_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    activation: int = 0,
    channels_last: int = 1,
    epsilon: float = 1e-5,
    groups: int = 1,
) -> Tensor:
    """Normalise groups of channels; with ``activation`` apply SiLU to the result."""
    y = torch.group_norm(
        wide(x.movedim(-1, 1) if channels_last else x), groups, gamma.to(wide(x).dtype), beta.to(wide(x).dtype), epsilon
    ).to(x.dtype)
    y = F.silu(y) if activation else y
    return y.movedim(1, -1) if channels_last else y


def _skip_group_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    skip: Tensor,
    bias: Tensor | None = None,
    *,
    outputs: int = 1,
    **attributes: Any,
) -> Any:
    """Add skip and bias, then normalise groups of channels; the second result is that sum."""
    spatial = [1] * (x.dim() - 2)
    total = x + (skip.reshape(skip.shape[0], *spatial, -1) if skip.dim() == 2 else skip)
    if bias is not None:
        total = total + bias
    return results(outputs, _contrib_group_norm(total, gamma, beta, **attributes), total)


def _embed_layer_norm(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    words: Tensor,
    positions: Tensor,
    segments: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
    outputs: int = 1,
) -> Any:
    """Sum the embeddings of words, positions and segments, and normalise; the third result is that sum.

    The second result counts the words of each row that the mask lets through.
    """
    total = F.embedding(input_ids, words)
    length = input_ids.shape[1]
    total = total + (positions[:length] if position_ids is None else F.embedding(position_ids, positions))
    if segments is not None and segment_ids is not None:
        total = total + F.embedding(segment_ids, segments)
    count = (
        torch.zeros(input_ids.shape[0], dtype=torch.int32, device=input_ids.device)
        if mask is None
        else mask.sum(1).to(torch.int32)
    )
    return results(outputs, layer_norm(total, gamma, beta, epsilon=epsilon), count, total)


TABLE: Final[dict[str, Function]] = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response,
    "LayerNormalization": layer_norm,
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": rms_norm,
    "SimplifiedLayerNormalization": rms_norm,
    "com.microsoft.EmbedLayerNormalization": _embed_layer_norm,
    "com.microsoft.GroupNorm": _contrib_group_norm,
    "com.microsoft.SimplifiedLayerNormalization": rms_norm,
    "com.microsoft.SkipGroupNorm": _skip_group_norm,
    "com.microsoft.SkipLayerNormalization": _skip_layer_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_rms_norm,
}
