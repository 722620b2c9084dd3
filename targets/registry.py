"""Find a target by its name."""

from __future__ import annotations

from typing import Final

from graphopt.errors import PipelineError, unknown_name
from graphopt.targets.base import Target
from graphopt.targets.onnx import OnnxTarget
from graphopt.targets.torch import TorchTarget

TARGETS: Final[dict[str, type[Target]]] = {target.name: target for target in (TorchTarget, OnnxTarget)}
"""Every target by its name."""


def find_target(target: str | Target) -> Target:
    """Return the target of that name, with its default options; a target is returned as it is.

    Raises:
        PipelineError: if there is no such target; the message has the nearest name, and all of them.
    """
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        raise PipelineError(unknown_name("target", target, TARGETS))
    return TARGETS[target]()
