"""Hold the passes that remove indices of coupling groups."""

from graphopt.passes.prune.prune_channels import PruneChannels
from graphopt.passes.prune.remove_constant_channels import RemoveConstantChannels

__all__ = ["PruneChannels", "RemoveConstantChannels"]
