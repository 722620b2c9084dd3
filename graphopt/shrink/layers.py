"""Bring the attributes of torch's own layers in line with their cut tensors.

What may live here: one entry a class of ``torch.nn`` whose attributes repeat the shapes of its tensors. An entry also
serves subclasses, which keep the attributes' meaning. What holds for no class of torch is found by search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from graphopt.axes.algebra import Indices

__all__ = ["KNOWN", "update"]

Dims = Mapping[int, Indices]
Cuts = Mapping[str, Dims]
"""``{name of a tensor of the layer: {dimension: kept positions}}``."""


def update(layer: nn.Module, cuts: Cuts) -> frozenset[str]:
    """Set the attributes of ``layer`` that repeat the shapes of its tensors; the tensors are cut already.

    Returns:
        The names of the attributes that are settled.
    """
    settled: set[str] = set()
    for kind, entry in KNOWN.items():
        if isinstance(layer, kind):
            for name, value in entry(layer, cuts).items():
                if hasattr(layer, name):
                    settled.add(name)
                    if getattr(layer, name) != value:
                        setattr(layer, name, value)
    return frozenset(settled)


def _linear(layer: Any, cuts: Cuts) -> dict[str, Any]:
    rows, columns = layer.weight.shape
    return {"out_features": rows, "in_features": columns}


def _bilinear(layer: Any, cuts: Cuts) -> dict[str, Any]:
    out, first, second = layer.weight.shape
    return {"out_features": out, "in1_features": first, "in2_features": second}


def _convolution(layer: Any, cuts: Cuts) -> dict[str, Any]:
    """Read the first dimension of the weight as going over all groups: of outputs, or of a transposed one's inputs."""
    outer, inner = layer.weight.shape[:2]
    was = layer.in_channels if layer.transposed else layer.out_channels
    groups = _rows(cuts.get("weight", {}).get(0), was // layer.groups, layer.groups)
    if layer.transposed:
        return {"in_channels": outer, "out_channels": inner * groups, "groups": groups}
    return {"out_channels": outer, "in_channels": inner * groups, "groups": groups}


def _batch_norm(layer: Any, cuts: Cuts) -> dict[str, Any]:
    tensor = next((t for t in (layer.weight, layer.running_mean) if t is not None), None)
    return {} if tensor is None else {"num_features": tensor.shape[0]}


def _group_norm(layer: Any, cuts: Cuts) -> dict[str, Any]:
    if layer.weight is None:
        return {}
    groups = _rows(cuts.get("weight", {}).get(0), layer.num_channels // layer.num_groups, layer.num_groups)
    return {"num_channels": layer.weight.shape[0], "num_groups": groups}


def _layer_norm(layer: Any, cuts: Cuts) -> dict[str, Any]:
    return {} if layer.weight is None else {"normalized_shape": tuple(layer.weight.shape)}


def _embedding(layer: Any, cuts: Cuts) -> dict[str, Any]:
    count, width = layer.weight.shape
    return {"num_embeddings": count, "embedding_dim": width}


def _prelu(layer: Any, cuts: Cuts) -> dict[str, Any]:
    return {"num_parameters": layer.weight.numel()}


def _attention(layer: Any, cuts: Cuts) -> dict[str, Any]:
    """Read the rows of the first third of a packed projection, or of q's own, as ``heads x head_dim``."""
    width, old = layer.out_proj.weight.shape[0], layer.head_dim
    packed = layer.in_proj_weight is not None
    rows = cuts.get("in_proj_weight" if packed else "q_proj_weight", {}).get(0)
    inner = (layer.in_proj_weight.shape[0] // 3) if packed else layer.q_proj_weight.shape[0]
    heads = layer.num_heads
    if rows is not None:
        heads = _rows(rows[rows < layer.num_heads * old], old, heads)
    return {
        "embed_dim": width,
        "kdim": layer.in_proj_weight.shape[1] if packed else layer.k_proj_weight.shape[1],
        "vdim": layer.in_proj_weight.shape[1] if packed else layer.v_proj_weight.shape[1],
        "num_heads": heads,
        "head_dim": inner // heads,
    }


def _rows(kept: Indices | None, width: int, count: int) -> int:
    """Count the rows of ``width`` positions of which something is kept; all ``count`` where nothing is cut."""
    return count if kept is None else len(np.unique(kept // width))


KNOWN: Mapping[type[nn.Module], Callable[[Any, Cuts], dict[str, Any]]] = {
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    torch.nn.modules.conv._ConvNd: _convolution,
    torch.nn.modules.batchnorm._NormBase: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    nn.PReLU: _prelu,
    nn.MultiheadAttention: _attention,
}
