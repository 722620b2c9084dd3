"""Hold the passes that make up for what was removed."""

from graphopt.passes.recover.fine_tune import FineTune

__all__ = ["FineTune"]
