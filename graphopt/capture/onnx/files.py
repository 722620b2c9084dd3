"""Open an ONNX file, or take a model from memory, so that everything behind can trust its form.

What may live here: :func:`load`. The file is a regular one of a bounded size, its model is of a version that is known,
its functions are inlined, its graphs are in order, and its tensors are as long as they say. Whatever is wrong is one
:class:`~graphopt.errors.CaptureError` that names it. No tensor in a file beside the model is read before it is asked
for.
"""

from __future__ import annotations

import importlib
import os
import stat
import string
import warnings
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from graphopt.capture.onnx.functions import check_functions
from graphopt.capture.onnx.library import check, rewrite
from graphopt.capture.onnx.structure import Order, attribute_graphs, walk
from graphopt.capture.onnx.weights import Weights, short, to_bytes
from graphopt.dialects.onnx.operators import DOMAIN, MICROSOFT
from graphopt.errors import MissingDependencyError

if TYPE_CHECKING:
    import onnx

__all__ = ["OLDEST_OPSET", "OnnxFile", "load"]

OLDEST_OPSET: Final = 13
"""Oldest version of the default domain whose operators are understood; older models are converted to it."""

_LARGEST: Final = (1 << 31) - 1
"""Bytes that one message of protocol buffers may have."""

_IN_NODES: Final = 1 << 28
"""Most bytes of one tensor that stands outside of the model and inside a node."""

_MAGIC: Final = (
    (0, b"PK\x03\x04", "a zip archive (of PyTorch, perhaps)"),
    (0, b"\x80\x02", "a pickle"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"version https://git-lfs", "a pointer of Git LFS in place of the file: run 'git lfs pull'"),
    (0, b"<", "a page of HTML or XML: the download failed, perhaps"),
    (4, b"ORTM", "a model in the format of ONNX Runtime (.ort): pass the .onnx file that it was made from"),
    (4, b"TFL3", "a TensorFlow Lite model"),
)


@dataclass(frozen=True)
class OnnxFile:
    """Hold a model in good form.

    Attributes:
        model: the model, nobody else's; its weights in files beside it are not in it.
        path: the file it came from, or ``None``.
        notes: what was changed to bring it in form, in words for the user.
    """

    model: onnx.ModelProto
    path: Path | None
    notes: tuple[str, ...]
    weights: Weights

    def tensor(self, initializer: onnx.TensorProto) -> torch.Tensor:
        """Return the entries of an initializer, or of a tensor in an attribute: contiguous, writable.

        Entries in a file beside the model are mapped copy-on-write, so they take memory only where they are used, and
        writing to them does not reach the file. The file must not be cut short while the tensor is in use. 4-bit and
        2-bit integers come as 8-bit ones.

        Raises:
            CaptureError: if the tensor holds text, or its file is not what it was when the model was read.
        """
        return self.weights.read(initializer)


def load(source: str | os.PathLike[str] | onnx.ModelProto) -> OnnxFile:
    """Read an ONNX model and bring it in form; the given one is not changed.

    Raises:
        CaptureError: if it is no model, is damaged, or refers to what it must not; the message says what to do.
        MissingDependencyError: if onnx is not installed.
    """
    try:
        onnx = importlib.import_module("onnx")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("onnx", package="onnx", purpose="reading an ONNX model") from error
    model = onnx.ModelProto()
    if isinstance(source, onnx.ModelProto):
        path = None
        weights = Weights("the ModelProto", None)
        _copy(source, model, weights)
    else:
        path = Path(source)
        weights = Weights(str(path), path.parent)
        _parse(model, _read(path), weights)
    notes: list[str] = []
    _check_header(model, weights, onnx, notes)
    model, changed = _in_form(model, weights)
    return OnnxFile(model, path, (*notes, *changed), weights)


def _in_form(model: onnx.ModelProto, weights: Weights) -> tuple[onnx.ModelProto, list[str]]:
    functions = {(f.domain, f.name) for f in model.functions}
    check_functions(model, weights)
    notes: list[str] = []
    _order(model, weights, functions, notes)
    if functions:
        model = rewrite(model, weights, inline=True)
        if model.functions:
            name = short(f"{model.functions[0].domain}.{model.functions[0].name}")
            raise weights.error(
                f"function '{name}'",
                "a function that onnx.inliner leaves in place",
                "functions in terms of the model's own opset",
                "export the model without functions",
            )
        notes.append(f"{len(functions)} functions were inlined")
    version = _opset(model)
    if version < OLDEST_OPSET:
        model = rewrite(model, weights, convert=OLDEST_OPSET)
        notes.append(f"the model was converted from opset {version} to {OLDEST_OPSET}")
    if functions or version < OLDEST_OPSET:
        _order(model, weights, frozenset(), notes)
    notes += check(model, weights)
    return model, notes


def _read(path: Path) -> bytes:
    """Return the bytes of a file that may be a model."""
    where = Weights(str(path), None)
    remedy = "pass the path of an .onnx file"
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "no regular file"
            raise where.error("the path", kind, "a file", remedy)
        if facts.st_size > _LARGEST:
            raise where.error(
                "the file",
                f"{facts.st_size} bytes",
                f"at most {_LARGEST}, which is what protocol buffers can hold",
                "save the model with its weights beside it: onnx.save(model, path, save_as_external_data=True)",
            )
        with path.open("rb") as file:
            return file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise where.error("the path", f"nothing that can be read ({reason})", "a readable file", remedy) from error


def _copy(source: onnx.ModelProto, model: onnx.ModelProto, weights: Weights) -> None:
    from google.protobuf.message import DecodeError, EncodeError

    try:
        model.CopyFrom(source)
    except (DecodeError, EncodeError, MemoryError) as error:
        raise weights.error(
            "the model",
            f"graphs in graphs that cannot be copied ({error})",
            "a model that can be saved",
            "inline the bodies of If and Loop; move large weights out and pass the path of the file",
        ) from error


def _parse(model: onnx.ModelProto, data: bytes, weights: Weights) -> None:
    from google.protobuf.message import DecodeError

    remedy = "pass an .onnx file; if it is one, download or export it again"
    if not data:
        raise weights.error("the file", "no bytes", "an ONNX model", remedy)
    kind = next((kind for at, magic, kind in _MAGIC if data[at : at + len(magic)] == magic), None)
    if kind is not None:
        raise weights.error("the file", kind, "an ONNX model", remedy)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.ParseFromString(data)
    except (DecodeError, RuntimeWarning, RecursionError, MemoryError, SystemError) as error:
        text = data[:256].isascii() and not set(data[:256]) - set(map(ord, string.printable))
        found = "text" if text else f"bytes that are no ONNX model, or a part of one ({error})"
        raise weights.error("the file", found, "an ONNX model", remedy) from error


def _check_header(model: onnx.ModelProto, weights: Weights, onnx: Any, notes: list[str]) -> None:
    """Examine versions and domains; bring the list of imports in order."""
    export = "export the model to ONNX again"
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise weights.error("the model", "no graph", "an ONNX model", "pass an .onnx file that holds a model")
    if not 3 <= model.ir_version <= onnx.IR_VERSION:
        newer = model.ir_version > onnx.IR_VERSION
        raise weights.error(
            "the model",
            f"ir_version {model.ir_version}",
            f"a version from 3 to {onnx.IR_VERSION}, the newest that onnx {onnx.__version__} knows",
            "update the package onnx, or save the model with an older ir_version" if newer else export,
        )
    versions: dict[str, int] = {}
    for given in model.opset_import:
        domain: Any = DOMAIN if given.domain == "ai.onnx" else given.domain
        if not isinstance(domain, str):
            raise weights.error(
                f"domain '{short(domain)}'", "bytes that are no text", "a name in UTF-8", "rename it and save again"
            )
        if versions.setdefault(domain, given.version) != given.version:
            raise weights.error(
                f"domain '{short(domain) or 'ai.onnx'}'",
                f"opset versions {versions[domain]} and {given.version}",
                "one version of each domain",
                export,
            )
    newest = onnx.defs.onnx_opset_version()
    version = versions.get(DOMAIN)
    uses = any(node.domain in (DOMAIN, "ai.onnx") for node in walk(model.graph.node))
    if version is None and (uses or model.functions or MICROSOFT not in versions):
        raise weights.error(
            "the model", "no opset version of ai.onnx", "opset_import with one for the default domain", export
        )
    if version is not None and not 1 <= version <= newest:
        raise weights.error(
            "the model",
            f"opset {version}",
            f"a version from 1 to {newest}, the newest that onnx {onnx.__version__} knows",
            f"update the package onnx, or export the model to opset {newest} or older",
        )
    if version is None:
        versions[DOMAIN] = newest
    if MICROSOFT not in versions and any(node.domain == MICROSOFT for node in walk(model.graph.node)):
        versions[MICROSOFT] = 1
        notes.append(f"operators of {MICROSOFT} are used and not imported: version 1 was taken")
    del model.opset_import[:]
    for domain, number in sorted(versions.items()):
        model.opset_import.add(domain=domain, version=number)
    keys = Counter(entry.key for entry in model.metadata_props)
    twice = next((key for key, count in keys.items() if count > 1), None)
    if twice is not None:
        raise weights.error(f"metadata '{short(twice)}'", "two values", "one", "remove one of them and save again")
    if model.training_info:
        model.ClearField("training_info")
        notes.append("training_info was left out: the model is read for inference")
    if model.configuration:
        model.ClearField("configuration")
        for node in walk(model.graph.node):
            node.ClearField("device_configurations")
        notes.append("device configurations were left out: the model is read for one device")


def _opset(model: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in model.opset_import if entry.domain == DOMAIN)


def _order(model: onnx.ModelProto, weights: Weights, functions: Set[tuple[str, str]], notes: list[str]) -> None:
    """Order the graphs; leave tensors in files, and sparse ones, to nothing but the model's own initializers."""
    order = Order(weights, functions)
    order.model(model)
    notes += order.notes
    for tensor in _inner_tensors(model):
        if tensor.data_location == tensor.EXTERNAL:
            if (size := weights.check(tensor)) > _IN_NODES:
                raise weights.error(
                    f"tensor '{short(tensor.name)}'",
                    f"{size} bytes of external data inside a node",
                    f"at most {_IN_NODES}",
                    "make it an initializer of the model's graph",
                )
            _store(tensor, weights.data(tensor))
    for graph in (model.graph, *_inner_graphs(model)):
        for sparse in graph.sparse_initializer:
            dense = graph.initializer.add(name=sparse.values.name, dims=sparse.dims)
            dense.data_type = sparse.values.data_type
            _store(dense, to_bytes(weights.dense(sparse)))
            notes.append(f"the sparse initializer {short(dense.name)} was made dense")
        graph.ClearField("sparse_initializer")


def _inner_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    for node in walk(model.graph.node):
        yield from attribute_graphs(node)


def _inner_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for node in walk(model.graph.node):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
    for graph in _inner_graphs(model):
        yield from graph.initializer


def _store(tensor: onnx.TensorProto, data: bytes) -> None:
    """Put the bytes of a tensor into it."""
    tensor.ClearField("data_location")
    del tensor.external_data[:]
    tensor.raw_data = data
