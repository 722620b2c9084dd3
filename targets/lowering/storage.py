"""Put weights into an ONNX model, or beside it.

What may live here: tensors as bytes. A message of protocol buffers holds at most 2 GB, so the weights of larger models
stand in a file of their own, which the model names relative to its own folder.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from graphopt.targets.lowering.emitter import onnx_type

if TYPE_CHECKING:
    import onnx

EMBEDDED_LIMIT: Final = (1 << 31) - (1 << 26)
"""Bytes of weights up to which a model is one file: 2 GiB, less room for its nodes."""

ALIGNMENT: Final = 4096
"""Weights outside the model start at multiples of this, so that they can be mapped into memory."""

_INSIDE: Final = 1024


def weight_bytes(weights: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes that all weights take."""
    return sum(t.numel() * t.element_size() for t in weights.values())


def embed(skeleton: onnx.ModelProto, weights: Mapping[str, torch.Tensor]) -> onnx.ModelProto:
    """Return a model that holds its weights."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    for name, tensor in weights.items():
        proto = _header(name, tensor)
        proto.raw_data = to_bytes(tensor)
        model.graph.initializer.append(proto)
    return model


def write(
    skeleton: onnx.ModelProto, weights: Mapping[str, torch.Tensor], path: Path, *, limit: int = EMBEDDED_LIMIT
) -> list[Path]:
    """Write a model, and beside it ``<name>.data`` if its weights take more than ``limit`` bytes; return the files.

    Weights of less than a kilobyte stay in the model: runtimes read shapes from them when they load it.
    """
    import onnx

    if weight_bytes(weights) <= limit:
        path.write_bytes(embed(skeleton, weights).SerializeToString())
        return [path]
    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    beside = path.with_name(f"{path.name}.data")
    with beside.open("wb") as file:
        for name, tensor in weights.items():
            proto = _header(name, tensor)
            data = to_bytes(tensor)
            if len(data) < _INSIDE:
                proto.raw_data = data
            else:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                place = {"location": beside.name, "offset": str(file.tell()), "length": str(len(data))}
                proto.data_location = onnx.TensorProto.EXTERNAL
                for key, value in place.items():
                    entry = proto.external_data.add()
                    entry.key, entry.value = key, value
                file.write(data)
            model.graph.initializer.append(proto)
    path.write_bytes(model.SerializeToString())
    return [path, beside]


def _header(name: str, tensor: torch.Tensor) -> onnx.TensorProto:
    import onnx

    proto = onnx.TensorProto()
    proto.name = name
    proto.data_type = onnx_type(tensor.dtype)
    proto.dims.extend(tensor.shape)
    return proto


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the entries of a tensor, row-major and little-endian, as ONNX wants them."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel() == 0:
        return b""
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        data = data.reshape(-1, tensor.element_size())[:, ::-1].copy()
    return data.tobytes()
