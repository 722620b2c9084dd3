"""Name what a graph holds after what a file calls it, in words that generated code can hold."""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import fx, nn

from graphopt.graph import TraceModule


@cache
def reserved() -> frozenset[str]:
    """Return the names that a module has already, of which none can be a tensor's."""
    return frozenset((*dir(TraceModule(nn.Module(), fx.Graph())), "T_destination", "call_super_init"))


def parents(path: str) -> list[str]:
    """Return the dotted names above one: ``a`` and ``a.b`` of ``a.b.c``."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def identifier(name: str) -> str:
    """Return a name for a node: its characters go into code, so that none but letters, digits and _ may stay."""
    found = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "value"
    return f"{found}_" if found == "self" else found


def attribute_name(part: str) -> str:
    """Return a part of a tensor's name as a module can have it, unchanged where that is possible.

    ``torch.fx`` writes it into the code of ``forward`` as it is: after a dot, or between quotes.
    """
    if part.isidentifier():
        plain = not keyword.iskeyword(part) and unicodedata.normalize("NFKC", part) == part
    else:
        plain = part.isprintable() and not set(part) & set('"\\{}')
    if not plain:
        part = re.sub(r"\W", "_", part, flags=re.ASCII) + "_"
    return f"{part}_" if part in reserved() else part


def owner_of(node: Any, metadata: Mapping[str, str], weights: Sequence[str] = ()) -> str:
    """Return the module of the original that called an operator, as far as the exporter wrote it down.

    torch's exporters do: as metadata of the node, or in its name, ``/layer1/layer1.0/conv1/Conv``. Of other files, the
    names of the tensors it reads may tell, and else the node's own name serves.
    """
    scopes = metadata.get("pkg.torch.onnx.name_scopes")
    if scopes:
        import ast

        try:
            found = ast.literal_eval(scopes)
        except (ValueError, SyntaxError):
            found = []
        if isinstance(found, list) and len(found) > 1:
            return str(found[-2])
    if node.name.startswith("/"):
        parts = node.name.split("/")[1:-1]
        names: list[str] = []
        for part in parts:  # "blocks" and then "blocks.0" are one step
            names = [*names[:-1], part] if names and part.startswith(f"{names[-1]}.") else [*names, part]
        return ".".join(names)
    return next((name.rpartition(".")[0] for name in weights if "." in name), str(node.name))
