"""Hold the passes, one a file, grouped by what they do; installed as `graphopt.passes`."""

if __name__ != "graphopt.passes":
    raise ImportError(
        f"the folder passes/ is the package 'graphopt.passes', but was imported as '{__name__}'; "
        "take its parent folder off sys.path, or import graphopt.passes"
    )

from graphopt.passes.canonicalize import (
    FoldConstants,
    MergeDuplicates,
    MoveTransposes,
    RemoveIdentities,
    SimplifySlices,
    SplitParallel,
)
from graphopt.passes.fuse import FoldPad, FuseActivations, FuseAttention, FuseNormalizations
from graphopt.passes.merge import FoldBatchNorm, FoldNumbers, FoldScale, MergeBranches, MergeConsecutive, MergeParallel
from graphopt.passes.prune import PruneChannels, RemoveConstantChannels
from graphopt.passes.recover import CompensateMean, FineTune, RidgeRefit

__all__ = [
    "CompensateMean",
    "FineTune",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldNumbers",
    "FoldPad",
    "FoldScale",
    "FuseActivations",
    "FuseAttention",
    "FuseNormalizations",
    "MergeBranches",
    "MergeConsecutive",
    "MergeDuplicates",
    "MergeParallel",
    "MoveTransposes",
    "PruneChannels",
    "RemoveConstantChannels",
    "RemoveIdentities",
    "RidgeRefit",
    "SimplifySlices",
    "SplitParallel",
]
