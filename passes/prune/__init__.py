"""Hold the passes that remove indices of coupling groups."""

from graphopt.passes.prune.prune_channels import PruneChannels

__all__ = ["PruneChannels"]
