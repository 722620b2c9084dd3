"""Use onnx-graphsurgeon, without what it prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graphopt.errors import MissingDependencyError

__all__ = ["graphsurgeon", "quiet"]


def graphsurgeon(purpose: str = "reading an ONNX model") -> Any:
    """Return the package.

    Raises:
        MissingDependencyError: onnx or onnx-graphsurgeon is not installed.
    """
    try:
        import onnx_graphsurgeon
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnx_graphsurgeon"):
            raise
        package = "onnx-graphsurgeon" if error.name == "onnx_graphsurgeon" else "onnx"
        raise MissingDependencyError("onnx", package=package, purpose=purpose) from error
    return onnx_graphsurgeon


@contextmanager
def quiet() -> Iterator[None]:
    """Let onnx-graphsurgeon log nothing within the block: what matters is an error of ours."""
    from onnx_graphsurgeon.logger import G_LOGGER

    before = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.CRITICAL
    try:
        yield
    finally:
        G_LOGGER.severity = before
