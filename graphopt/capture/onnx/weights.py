"""Turn the tensors of an ONNX model into torch's, and guard the files that they stand in.

What may live here: :class:`Weights`. A tensor's numbers are either inside the model or in a file beside it. Sizes are
compared with the bytes that are there before anything is allocated, and a file is opened only if it stands inside the
model's folder.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from graphopt.errors import CaptureError

if TYPE_CHECKING:
    import onnx

__all__ = ["Type", "Weights", "buffer", "short", "to_bytes", "type_name", "type_of"]

_MAPPED: Final = 1 << 16
"""Bytes from which a tensor in a file is mapped into memory; a smaller one is read."""

_RANK: Final = 64
"""Most dimensions that torch takes."""

_DENSE_FACTOR: Final = 1024
_DENSE_FREE: Final = 1 << 26
"""A sparse tensor is made dense up to 64 MiB, and above that up to so many times the bytes that it takes."""


@dataclass(frozen=True, slots=True)
class Type:
    """How the entries of an element type are stored, and which type torch has for them.

    ``bits`` of fewer than 8 mean that entries are packed into bytes, the lowest bits first; torch gets them unpacked.
    """

    name: str
    bits: int
    dtype: torch.dtype
    field: str
    signed: bool = False

    def nbytes(self, count: int) -> int:
        """Return the bytes that ``count`` entries take."""
        return (count * self.bits + 7) // 8


_TYPES: Final[dict[int, Type]] = {
    1: Type("FLOAT", 32, torch.float32, "float_data"),
    2: Type("UINT8", 8, torch.uint8, "int32_data"),
    3: Type("INT8", 8, torch.int8, "int32_data", signed=True),
    4: Type("UINT16", 16, torch.uint16, "int32_data"),
    5: Type("INT16", 16, torch.int16, "int32_data", signed=True),
    6: Type("INT32", 32, torch.int32, "int32_data", signed=True),
    7: Type("INT64", 64, torch.int64, "int64_data", signed=True),
    9: Type("BOOL", 8, torch.bool, "int32_data"),
    10: Type("FLOAT16", 16, torch.float16, "int32_data"),
    11: Type("DOUBLE", 64, torch.float64, "double_data"),
    12: Type("UINT32", 32, torch.uint32, "uint64_data"),
    13: Type("UINT64", 64, torch.uint64, "uint64_data"),
    14: Type("COMPLEX64", 64, torch.complex64, "float_data"),
    15: Type("COMPLEX128", 128, torch.complex128, "double_data"),
    16: Type("BFLOAT16", 16, torch.bfloat16, "int32_data"),
    17: Type("FLOAT8E4M3FN", 8, torch.float8_e4m3fn, "int32_data"),
    18: Type("FLOAT8E4M3FNUZ", 8, torch.float8_e4m3fnuz, "int32_data"),
    19: Type("FLOAT8E5M2", 8, torch.float8_e5m2, "int32_data"),
    20: Type("FLOAT8E5M2FNUZ", 8, torch.float8_e5m2fnuz, "int32_data"),
    21: Type("UINT4", 4, torch.uint8, "int32_data"),
    22: Type("INT4", 4, torch.int8, "int32_data", signed=True),
    24: Type("FLOAT8E8M0", 8, torch.float8_e8m0fnu, "int32_data"),
    25: Type("UINT2", 2, torch.uint8, "int32_data"),
    26: Type("INT2", 2, torch.int8, "int32_data", signed=True),
}
_FIELDS: Final = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_OF_FIELD: Final = {"float_data": "<f4", "double_data": "<f8", "int64_data": "<i8", "uint64_data": "<u8"}


def type_of(number: int) -> Type | None:
    """Return how the element type of that number is stored, or ``None`` where it cannot be computed with."""
    return _TYPES.get(number)


def type_name(number: int) -> str:
    """Return the name of the element type of that number, as messages give it."""
    import onnx

    names = {value: name for name, value in onnx.TensorProto.DataType.items()}
    return str(names.get(number, f"number {number}, which this version of onnx does not know"))


def short(name: Any, limit: int = 120) -> str:
    """Return a name as messages give it: in one line, and not longer than a line."""
    if isinstance(name, bytes):
        name = name.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name)[: 2 * limit])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@dataclass(frozen=True)
class Weights:
    """Read the tensors of one model.

    Args:
        where: what messages call the model: its path, or what it is.
        folder: the folder that the model's file stands in; ``None`` for a model in memory.
    """

    where: str
    folder: Path | None

    def check(self, tensor: onnx.TensorProto) -> int:
        """Examine a tensor without reading its entries, and return the bytes they take.

        Raises:
            CaptureError: if type, dimensions and data do not agree, or the data stands where it must not.
        """
        kind = self._kind(tensor)
        count = self._count(tensor.dims, tensor)
        needed = kind.nbytes(count)
        if tensor.HasField("segment"):
            raise self._error(tensor, "it is one segment of a tensor", "whole tensors", "save the model unsegmented")
        if tensor.data_location == tensor.EXTERNAL:
            if self._stored(tensor):
                raise self._error(
                    tensor, "it has data both inside the model and outside", "one of both", "save the model again"
                )
            descriptor, _, _ = self._open(tensor, needed)
            os.close(descriptor)
            return needed
        if tensor.external_data:
            raise self._error(
                tensor,
                "it names a file for its data, and says that its data is inside the model",
                "data_location EXTERNAL, or no external_data",
                "save the model again",
            )
        stored = self._stored(tensor)
        if len(stored) > 1:
            raise self._error(tensor, f"it has data in {' and '.join(stored)}", "data once", "save the model again")
        if not stored:
            if count:
                raise self._error(
                    tensor, f"no data, and dimensions {list(tensor.dims)}", f"{needed} bytes", "save the model again"
                )
            return 0
        (field,) = stored
        if field == "raw_data":
            self._agree(tensor, needed, len(tensor.raw_data), "bytes")
        else:
            if field != kind.field:
                raise self._error(tensor, f"{kind.name} entries in {field}", kind.field, "save the model again")
            entries = count * 2 if kind.dtype.is_complex else kind.nbytes(count) if kind.bits < 8 else count
            self._agree(tensor, entries, len(getattr(tensor, field)), f"entries in {field}")
        return needed

    def read(self, tensor: onnx.TensorProto) -> torch.Tensor:
        """Return the entries of a tensor, contiguous and writable; what is in a file is mapped copy-on-write.

        Entries of fewer than 8 bits come as 8-bit integers.

        Raises:
            CaptureError: as :meth:`check`, or if entries do not fit the type.
        """
        needed = self.check(tensor)
        kind = self._kind(tensor)
        dims = list(tensor.dims)
        if needed == 0:
            return torch.empty(dims, dtype=kind.dtype)
        if tensor.data_location == tensor.EXTERNAL:
            data = self._external(tensor, needed)
        elif tensor.HasField("raw_data"):
            data = np.frombuffer(bytearray(tensor.raw_data), np.uint8)
        else:
            data = self._typed(tensor, kind)
        return _decoded(data, kind, math.prod(dims)).reshape(dims)

    def data(self, tensor: onnx.TensorProto) -> bytes:
        """Return the bytes of a tensor whose data is in a file.

        Raises:
            CaptureError: as :meth:`check`.
        """
        needed = self.check(tensor)
        return self._external(tensor, needed).tobytes() if needed else b""

    def check_sparse(self, tensor: onnx.SparseTensorProto) -> None:
        """Examine a sparse tensor without making it dense.

        Raises:
            CaptureError: if its parts do not agree, or it would be absurdly large when dense.
        """
        values, indices = tensor.values, tensor.indices
        stored = self.check(values) + self.check(indices)
        kind = self._kind(values)
        count = self._count(tensor.dims, values)
        (entries,) = values.dims if len(values.dims) == 1 else (-1,)
        rank = len(tensor.dims)
        if entries < 0 or indices.data_type != 7 or list(indices.dims) not in ([entries], [entries, rank]):
            raise self._error(
                values,
                f"sparse values of dimensions {list(values.dims)} at indices of dimensions {list(indices.dims)}",
                f"values [n] at INT64 indices [n] or [n, {rank}]",
                "save the model again",
            )
        dense = kind.nbytes(count)
        if kind.bits < 8:
            raise self._error(values, f"sparse {kind.name}", "whole bytes", "save the model with a dense tensor")
        if dense > max(_DENSE_FREE, _DENSE_FACTOR * stored):
            raise self._error(
                values,
                f"{stored} bytes of sparse entries that take {dense} bytes when dense",
                f"at most {_DENSE_FACTOR} times as many",
                "save the model with a dense tensor",
            )

    def dense(self, tensor: onnx.SparseTensorProto) -> torch.Tensor:
        """Return a sparse tensor with its zeros.

        Raises:
            CaptureError: as :meth:`check_sparse`, or if an index is outside, or comes twice.
        """
        self.check_sparse(tensor)
        dims = list(tensor.dims)
        count = math.prod(dims)
        values, indices = self.read(tensor.values), self.read(tensor.indices)
        if indices.ndim == 2:
            strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
            sizes = torch.tensor(dims, dtype=torch.int64)
            inside = bool(((indices >= 0) & (indices < sizes)).all())
            flat = (indices * torch.tensor(strides, dtype=torch.int64)).sum(1) if inside else indices
        else:
            flat = indices
            inside = bool(((indices >= 0) & (indices < count)).all())
        if not inside or len(flat.unique()) != len(flat):
            raise self._error(
                tensor.values,
                "sparse indices that are outside its dimensions or come twice",
                f"different indices inside {dims}",
                "save the model again",
            )
        # Entries of less than 32 bits have no scatter in torch for all types: move their bits.
        whole = torch.zeros(count, dtype=values.dtype)
        width = values.element_size()
        whole.view(torch.uint8).reshape(count, width)[flat] = values.contiguous().view(torch.uint8).reshape(-1, width)
        return whole.reshape(dims)

    def error(self, culprit: str, found: str, required: str, remedy: str) -> CaptureError:
        """Return the error that names the model and the culprit, what was found, what is required, what to do."""
        return CaptureError(f"{self.where}: {culprit}: found {found}; required: {required}. Try this: {remedy}")

    def _error(self, tensor: onnx.TensorProto, found: str, required: str, remedy: str) -> CaptureError:
        return self.error(f"tensor '{short(tensor.name)}'", found, required, remedy)

    def _agree(self, tensor: onnx.TensorProto, needed: int, found: int, unit: str) -> None:
        if needed != found:
            raise self._error(
                tensor,
                f"{found} {unit}",
                f"{needed} {unit} for {type_name(tensor.data_type)} of dimensions {list(tensor.dims)}",
                "the file is damaged or was edited: save the model again",
            )

    def _kind(self, tensor: onnx.TensorProto) -> Type:
        kind = type_of(tensor.data_type)
        if kind is None:
            raise self._error(
                tensor,
                f"element type {type_name(tensor.data_type)}",
                "numbers of a type that torch computes with",
                "replace the tensor by one of another type before reading the model",
            )
        return kind

    def _count(self, dims: Any, tensor: onnx.TensorProto) -> int:
        count: int = math.prod(dims)
        if len(dims) > _RANK or any(d < 0 for d in dims) or math.prod(max(d, 1) for d in dims) >= 1 << 60:
            listed = f"{list(dims[:8])}{' and more' if len(dims) > 8 else ''}"
            raise self._error(
                tensor,
                f"dimensions {listed}",
                f"at most {_RANK} dimensions, none negative, and fewer than 2**60 entries",
                "the file is damaged or was edited: save the model again",
            )
        return count

    def _stored(self, tensor: onnx.TensorProto) -> list[str]:
        fields = [field for field in _FIELDS if len(getattr(tensor, field))]
        return [*fields, "raw_data"] if tensor.HasField("raw_data") and (tensor.raw_data or not fields) else fields

    def _typed(self, tensor: onnx.TensorProto, kind: Type) -> np.ndarray[Any, Any]:
        """Return the bytes of entries that stand in a field of their type, as raw data has them."""
        entries = getattr(tensor, kind.field)
        if kind.field in _OF_FIELD and kind.field != "uint64_data":
            return np.array(entries, _OF_FIELD[kind.field]).view(np.uint8)
        bits = max(kind.bits, 8)
        wide = np.array(entries, np.uint64 if kind.field == "uint64_data" else np.int64)
        # Floating-point types are stored as the bits of their entries.
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind.signed else (0, (1 << bits) - 1)
        if kind.bits < 8:
            low, high = -128, 255
        if int(wide.min()) < low or int(wide.max()) > high:
            raise self._error(
                tensor,
                f"entries from {int(wide.min())} to {int(wide.max())}",
                f"{kind.name} entries from {low} to {high}",
                "the file is damaged or was edited: save the model again",
            )
        return wide.astype(f"<{'i' if kind.signed and kind.bits >= 8 else 'u'}{bits // 8}").view(np.uint8)

    def _external(self, tensor: onnx.TensorProto, needed: int) -> np.ndarray[Any, Any]:
        descriptor, offset, path = self._open(tensor, needed)
        try:
            if needed < _MAPPED or offset % 16:
                content = bytearray(needed)
                with open(descriptor, "rb", buffering=0, closefd=False) as file:
                    file.seek(offset)
                    view = memoryview(content)
                    while view and (read := file.readinto(view)):
                        view = view[read:]
                if view:
                    raise self._error(tensor, f"{path.name} ended early", f"{needed} bytes", "download the file again")
                return np.frombuffer(content, np.uint8)
            before = offset % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(descriptor, before + needed, access=mmap.ACCESS_COPY, offset=offset - before)
            return np.frombuffer(mapped, np.uint8, needed, before)
        except OSError as error:
            raise self._error(
                tensor,
                f"{path} cannot be read ({error.strerror or error})",
                "a readable file",
                "see that the disk and the file's permissions are in order",
            ) from error
        finally:
            os.close(descriptor)

    def _open(self, tensor: onnx.TensorProto, needed: int) -> tuple[int, int, Path]:
        """Open the file that holds a tensor's entries; return its descriptor, where they start, and its path."""
        location, offset, length = self._place(tensor)
        if length is not None:
            self._agree(tensor, needed, length, "bytes of external data")
        path = self._inside(tensor, location)
        try:
            # Not to wait for a writer of what has become a pipe, and not to follow what has become a link.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise self._error(
                tensor,
                f"external data in '{short(location)}', which cannot be opened ({error.strerror})",
                "a readable file beside the model",
                "see that the file's permissions are in order",
            ) from error
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise self._error(
                    tensor,
                    f"external data in '{short(location)}', which is no regular file",
                    "a file beside the model",
                    "save the model again with its data beside it",
                )
            if facts.st_nlink > 1:
                raise self._error(
                    tensor,
                    f"external data in '{short(location)}', which has {facts.st_nlink} names (hard links) and may be a "
                    "file from elsewhere",
                    "a file that only the model's folder holds",
                    f"replace it by a copy of itself: cp '{path.name}' copy && mv copy '{path.name}'",
                )
            if offset + needed > facts.st_size:
                raise self._error(
                    tensor,
                    f"external data in '{short(location)}' from byte {offset} to {offset + needed}, and the file has "
                    f"{facts.st_size} bytes",
                    "data inside the file",
                    "the file is truncated or another model's: download or save both again",
                )
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, offset, path

    def _place(self, tensor: onnx.TensorProto) -> tuple[str, int, int | None]:
        """Return location, offset and length as the tensor gives them."""
        entries: dict[Any, Any] = {}
        for entry in tensor.external_data:
            if entry.key in entries:
                raise self._error(
                    tensor, f"two entries '{short(entry.key)}' of external data", "one of each", "save the model again"
                )
            entries[entry.key] = entry.value
        location = entries.get("location", "")
        if not isinstance(location, str) or not location:
            raise self._error(tensor, "external data without a location", "a file's name", "save the model again")
        numbers: dict[str, int | None] = {"offset": 0, "length": None}
        for key in numbers:
            value = entries.get(key)
            if value is None:
                continue
            if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,18}", value):
                raise self._error(
                    tensor,
                    f"external data with {key} '{short(value)}'",
                    "a number of bytes that is not negative",
                    "the file is damaged or was edited: save the model again",
                )
            numbers[key] = int(value)
        return location, numbers["offset"] or 0, numbers["length"]

    def _inside(self, tensor: onnx.TensorProto, location: str) -> Path:
        """Return the path of a file in the model's folder, all links followed."""
        if self.folder is None:
            raise self._error(
                tensor,
                f"external data in '{short(location)}', and a model in memory, which has no folder",
                "data inside the model",
                "pass the path of the .onnx file instead of the model",
            )
        windows = PureWindowsPath(location)
        parts = location.replace("\\", "/").split("/")
        if location.startswith("/") or windows.drive or windows.root or ".." in parts or "\0" in location:
            raise self._error(
                tensor,
                f"external data in '{short(location)}', which leads out of the model's folder",
                "a file's name relative to the model's folder, without '..'",
                "do not use the file unless you know who made it; save the model again with its data beside it",
            )
        try:
            folder = self.folder.resolve(strict=True)
            path = (folder / location).resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle are a RuntimeError
            missing = isinstance(error, FileNotFoundError)
            raise self._error(
                tensor,
                f"external data in '{short(location)}', which "
                + ("does not exist" if missing else f"cannot be found ({error})"),
                f"that file in {self.folder}",
                "put it there: a model with external data consists of all its files",
            ) from error
        if not path.is_relative_to(folder):
            raise self._error(
                tensor,
                f"external data in '{short(location)}', a link that leads out of the model's folder",
                "a file that stands in the folder itself",
                "copy the model with its links followed (cp -rL), and read the copy",
            )
        return path


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the entries of a tensor, row-major and little-endian, as ONNX wants them."""
    return bytes(buffer(tensor))


def buffer(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of :func:`to_bytes` without a copy, where the tensor lies in memory so already."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel() == 0:
        return memoryview(b"")
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        width = tensor.element_size() // 2 if tensor.is_complex() else tensor.element_size()
        data = data.reshape(-1, width)[:, ::-1].reshape(-1)
    return data.data


def _decoded(data: np.ndarray[Any, Any], kind: Type, count: int) -> torch.Tensor:
    """Return bytes, little-endian, as ``count`` entries of a type."""
    if kind.bits < 8:
        return _unpacked(torch.from_numpy(data), kind, count)
    if kind.dtype is torch.bool:
        return torch.from_numpy(data) != 0
    if sys.byteorder == "big":
        width = kind.bits // 16 if kind.dtype.is_complex else kind.bits // 8
        data = data.reshape(-1, width)[:, ::-1].reshape(-1).copy()
    return torch.from_numpy(data).view(kind.dtype)


def _unpacked(data: torch.Tensor, kind: Type, count: int) -> torch.Tensor:
    mask = (1 << kind.bits) - 1
    shifts = torch.arange(0, 8, kind.bits, dtype=torch.uint8)
    entries = ((data[:, None] >> shifts) & mask).reshape(-1)[:count].contiguous()
    if not kind.signed:
        return entries
    sign = 1 << (kind.bits - 1)
    return ((entries ^ sign).to(torch.int16) - sign).to(torch.int8)
