"""Read a ``.pt2`` file without running code from it.

``torch.export.load`` trusts its file: it unpickles what the file marks as pickled, evaluates the text of size
expressions as Python, and looks up the names of operators in all of ``torch``. So the file is examined first, and
refused unless it holds plain tensors, arithmetic and operators. The file is read through one handle, so that what is
loaded is what was examined.
"""

from __future__ import annotations

import ast
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._sympy import functions as sympy_functions

from graphopt.capture.export import quiet
from graphopt.errors import CaptureError

_ARITHMETIC: Final = frozenset(
    {
        *sympy_functions.__all__,
        *(
            "Symbol",
            "Integer",
            "Float",
            "Rational",
            "Add",
            "Mul",
            "Pow",
            "Mod",
            "Abs",
            "Max",
            "Min",
            "floor",
            "ceiling",
        ),
        *("And", "Or", "Not", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "Piecewise", "sqrt", "log"),
        *("LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan", "true", "false", "oo", "zoo", "int_oo"),
    }
)
"""What the text of a size may call or name, besides symbols."""

_NODES: Final = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp, ast.BoolOp),
    *(ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)

_SYMBOLIC: Final = (
    "torch.sym_int",
    "torch.sym_float",
    "torch.sym_max",
    "torch.sym_min",
    "torch.sym_not",
    "torch.sym_ite",
)

_OPERATOR: Final = frozenset(
    {
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "getitem"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
    }
)

_MATH: Final = frozenset({"ceil", "floor", "trunc", "sqrt", "log", "log2", "exp", "pow"})


def load(path: Path) -> ExportedProgram:
    """Load the program saved at ``path`` by ``torch.export.save``.

    Raises:
        CaptureError: if the file is damaged or of another kind, or holds anything that would be run to load it.
    """
    with path.open("rb") as file:
        try:
            _examine(file, str(path))
            file.seek(0)
            with quiet():
                program = torch.export.load(file)
        except CaptureError:
            raise
        except Exception as error:  # a damaged file makes the reader raise anything
            raise CaptureError(
                f"{path} cannot be read as a program saved by torch.export.save: {type(error).__name__}: {error}"
            ) from error
    _tie(program)
    return program


def _examine(file: IO[bytes], path: str) -> None:
    if not zipfile.is_zipfile(file):
        raise CaptureError(f"{path} is no .pt2 archive: save the model with torch.export.save(program, path)")
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        # Every entry stands in one folder, named after the file as it was saved.
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if len(entries) != len(archive.infolist()) or "models/model.json" not in entries:
            raise CaptureError(
                f"{path} holds no exported program, or one of an old layout: save it again with torch.export.save"
            )
        for name in entries:
            if name.startswith("data/aotinductor/"):
                raise CaptureError(
                    f"{path} holds compiled code ({name}), which is not loaded: pass the exported program"
                )
            if name.startswith(("data/weights/", "data/constants/")) and name.endswith(".pt"):
                raise CaptureError(
                    f"{path} holds a pickle ({name}), which is not loaded: save it again with torch.export.save"
                )
        for name, info in entries.items():
            if name.startswith(("data/weights/", "data/constants/")) and name.endswith("_config.json"):
                _examine_payloads(json.loads(archive.read(info)), f"{path}, {name}")
            elif name.startswith("data/sample_inputs/"):
                _examine_inputs(archive.read(info), f"{path}, {name}")
            elif name.startswith("models/"):
                _examine_program(json.loads(archive.read(info)), f"{path}, {name}")


def _examine_payloads(config: Any, where: str) -> None:
    for name, payload in config["config"].items():
        if payload["use_pickle"] or not str(payload["path_name"]).startswith(("weight_", "tensor_")):
            raise CaptureError(
                f"{where}: {name} is pickled, and pickles are not loaded: save a program of plain tensors, without "
                "tensor subclasses and custom objects"
            )


def _examine_inputs(data: bytes, where: str) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise CaptureError(
            f"{where}: the example inputs need pickle to be read, and pickles are not loaded: export the model on "
            "tensors, tuples and dicts"
        ) from error


def _examine_program(program: Any, where: str) -> None:
    for key, value in _texts(program):
        if key == "expr_str":
            _check_arithmetic(value, where)
        elif key == "target":
            _check_operator(value, where)
        elif key in ("in_spec", "out_spec") and value:
            for inner, text in _texts(json.loads(value)):
                if inner == "context" and ("__enum__" in text or "default_factory" in text):
                    raise CaptureError(
                        f"{where}: inputs or outputs are nested in a type that is looked up by name: use dicts"
                    )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string in nested JSON, with the key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for inner, each in value.items():
            yield from _texts(each, inner)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, key)


def _check_arithmetic(text: str, where: str) -> None:
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise CaptureError(f"{where}: the size {text!r} is no arithmetic") from error
    for node in ast.walk(tree):
        allowed = isinstance(node, _NODES)
        if isinstance(node, ast.Call):
            allowed = isinstance(node.func, ast.Name) and node.func.id in _ARITHMETIC
        elif isinstance(node, ast.Name):
            allowed = node.id in _ARITHMETIC or (
                node.id[:1] in "suz" and node.id.rstrip("0123456789") in ("s", "u", "z", "zf", "zuf")
            )
        elif isinstance(node, ast.Constant):
            allowed = isinstance(node.value, bool | int | float) or (
                isinstance(node.value, str) and node.value.isidentifier()
            )
        if not allowed:
            raise CaptureError(f"{where}: the size {text!r} is no arithmetic, and is not evaluated")


def _check_operator(name: str, where: str) -> None:
    head, _, rest = name.partition(".")
    if head == "torch" and rest.startswith("ops."):
        value: Any = torch.ops
        for part in rest.split(".")[1:]:
            value = None if part.startswith("__") else getattr(value, part, None)
        if value is None:
            raise CaptureError(
                f"{where}: there is no operator {name}; import the package that defines it, then load again"
            )
        known = isinstance(value, torch._ops.OpOverload | torch._ops.HigherOrderOperator)
    else:
        known = name in _SYMBOLIC or (head == "_operator" and rest in _OPERATOR) or (head == "math" and rest in _MATH)
    if not known:
        raise CaptureError(f"{where}: {name} is no operator, and is not called")


def _tie(program: ExportedProgram) -> None:
    """Make tensors that are the same view of one memory one object: a file keeps their memory apart from identity."""
    first: dict[Any, torch.Tensor] = {}
    for name, tensor in program.state_dict.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, isinstance(tensor, nn.Parameter))
        if tensor.numel():
            program.state_dict[name] = first.setdefault(key, tensor)
