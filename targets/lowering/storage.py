"""Put weights into an ONNX model, or beside it.

What may live here: tensors as bytes. A message of protocol buffers holds at most 2 GB, so the weights of larger models
stand in a file of their own, which the model names relative to its own folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from graphopt.capture.onnx.weights import buffer, to_bytes
from graphopt.errors import LoweringError
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
    return sum(map(_size, weights.values()))


def embed(skeleton: onnx.ModelProto, weights: Mapping[str, torch.Tensor]) -> onnx.ModelProto:
    """Return a model that holds its weights, in their order."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    for name, tensor in weights.items():
        proto = _header(name, tensor)
        proto.raw_data = to_bytes(tensor)
        model.graph.initializer.append(proto)
    return model


def refer(skeleton: onnx.ModelProto, weights: Mapping[str, torch.Tensor], location: str) -> onnx.ModelProto:
    """Return a model whose weights stand in the file ``location``, as :func:`write` lays them out there.

    Weights of less than a kilobyte stay in the model: runtimes read shapes from them when they load it.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    for name, tensor, offset in _layout(weights):
        proto = _header(name, tensor)
        if offset is None:
            proto.raw_data = to_bytes(tensor)
        else:
            place = {"location": location, "offset": str(offset), "length": str(_size(tensor))}
            proto.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                entry = proto.external_data.add()
                entry.key, entry.value = key, value
        model.graph.initializer.append(proto)
    return model


def write(
    skeleton: onnx.ModelProto, weights: Mapping[str, torch.Tensor], path: Path, *, limit: int = EMBEDDED_LIMIT
) -> list[Path]:
    """Write a model, and beside it ``<name>.data`` if its weights take more than ``limit`` bytes; return the files.

    The same model and weights make the same bytes. Weights are written beside the model as
    they lie in memory, without a copy.

    Raises:
        LoweringError: if the model without its weights is too large for one message.
        OSError: if a file cannot be written.
    """
    if weight_bytes(weights) <= limit:
        path.write_bytes(serialized(embed(skeleton, weights)))
        return [path]
    beside = path.with_name(f"{path.name}.data")
    with beside.open("wb") as file:
        for _, tensor, offset in _layout(weights):
            if offset is not None:
                file.write(b"\0" * (offset - file.tell()))
                file.write(buffer(tensor))
    path.write_bytes(serialized(refer(skeleton, weights, beside.name)))
    return [path, beside]


def serialized(model: onnx.ModelProto) -> bytes:
    """Return the bytes of a model, the same for the same model.

    Raises:
        LoweringError: if it is too large for one message of protocol buffers.
    """
    from google.protobuf.message import EncodeError

    try:
        data = model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        data = None
        reason = str(error)
    else:
        reason = f"it has {len(data)} bytes"
    if data is None or len(data) >= 1 << 31:
        raise LoweringError(
            f"the ONNX model cannot be saved in one file: {reason}, and a message of protocol buffers holds at most "
            "2 GB. Nothing was written: split the model in several"
        )
    return bytes(data)


def _layout(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, int | None]]:
    """Yield name, tensor and where it starts in the file beside the model; ``None`` for one that stays in the model."""
    end = 0
    for name, tensor in weights.items():
        if _size(tensor) < _INSIDE:
            yield name, tensor, None
            continue
        start = end + -end % ALIGNMENT
        yield name, tensor, start
        end = start + _size(tensor)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _header(name: str, tensor: torch.Tensor) -> onnx.TensorProto:
    import onnx

    proto = onnx.TensorProto()
    proto.name = name
    proto.data_type = onnx_type(tensor.dtype)
    proto.dims.extend(tensor.shape)
    return proto
