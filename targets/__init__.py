"""Hold the targets, each a backend with what it needs and how it is lowered to; installed as `graphopt.targets`."""

if __name__ != "graphopt.targets":
    raise ImportError(
        f"the folder targets/ is the package 'graphopt.targets', but was imported as '{__name__}'; "
        "take its parent folder off sys.path, or import graphopt.targets"
    )

from graphopt.targets.base import Check, Lowered, Target, write_manifest
from graphopt.targets.registry import TARGETS, find_target

__all__ = ["TARGETS", "Check", "Lowered", "Target", "find_target", "write_manifest"]
