"""Hold the passes that remove indices of coupling groups."""

if __name__ != "graphopt.passes.prune":
    raise ImportError(
        f"the folder passes/prune/ is the package 'graphopt.passes.prune', but was imported as '{__name__}'; "
        "import graphopt.passes.prune"
    )

from graphopt.passes.prune.prune_channels import PruneChannels

__all__ = ["PruneChannels"]
