"""Write a graph as an exported program, ``model.pt2``, which ``torch.export.load`` reads without the model's code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import graphopt.targets.program as programs
from graphopt.graph import Graph
from graphopt.targets import recipes
from graphopt.targets.base import Lowered, Target, staged

FILE = "model.pt2"


@dataclass(frozen=True)
class TorchTarget(Target):
    """Save the graph, in evaluation mode, with its weights, its nested inputs and outputs and its dynamic dimensions.

    The file is read back and run before it is kept. Without a directory there is nothing to do.
    """

    name: ClassVar[str] = "torch"
    needs_values: ClassVar[bool] = False

    def pipeline(self, budget: Any, calibration: bool = False) -> str:
        return recipes.training(budget, calibration)

    def lower(self, graph: Graph, directory: Path | None = None) -> Lowered:
        if directory is None:
            return Lowered()
        if graph.hollow:
            return Lowered(notes=(f"no {FILE} was written: the values of the parameters are not in memory",))
        program = programs.to_program(graph)
        with staged(directory) as stage:
            with programs.quiet():
                torch.export.save(program, stage / FILE)
            checks = programs.check(graph, "torch", _runner(stage / FILE)) if self.check else ()
        return Lowered(artifacts={"pt2": directory / FILE}, checks=checks)


def _runner(path: Path) -> Any:
    with programs.quiet():
        loaded: ExportedProgram = torch.export.load(path)
    module = loaded.module()

    def run(inputs: programs.Inputs) -> list[Any]:
        args, kwargs = inputs
        with torch.no_grad():
            return pytree.tree_leaves(module(*args, **kwargs))

    return run
