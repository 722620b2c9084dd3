"""Write a graph as an ONNX file, ``model.onnx``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from graphopt.graph import Graph
from graphopt.targets.base import Lowered, Target


@dataclass(frozen=True)
class OnnxTarget(Target):
    """Translate the graph to ONNX."""

    name: ClassVar[str] = "onnx"
    requires: ClassVar[str | None] = "onnx"

    def lower(self, graph: Graph, directory: Path | None = None) -> Lowered:
        raise NotImplementedError
