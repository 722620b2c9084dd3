"""Hold the passes that make one operator of several, and compute the same with less."""

from graphopt.passes.merge.fold_batch_norm import FoldBatchNorm
from graphopt.passes.merge.fold_numbers import FoldNumbers
from graphopt.passes.merge.fold_scale import FoldScale
from graphopt.passes.merge.merge_branches import MergeBranches
from graphopt.passes.merge.merge_consecutive import MergeConsecutive
from graphopt.passes.merge.merge_parallel import MergeParallel

__all__ = ["FoldBatchNorm", "FoldNumbers", "FoldScale", "MergeBranches", "MergeConsecutive", "MergeParallel"]
