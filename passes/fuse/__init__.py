"""Hold the passes that make one operator of several that spell it out, as runtimes want them."""

from graphopt.passes.fuse.fold_pad import FoldPad
from graphopt.passes.fuse.fuse_activations import FuseActivations
from graphopt.passes.fuse.fuse_attention import FuseAttention
from graphopt.passes.fuse.fuse_normalizations import FuseNormalizations

__all__ = ["FoldPad", "FuseActivations", "FuseAttention", "FuseNormalizations"]
