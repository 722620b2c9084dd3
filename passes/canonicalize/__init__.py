"""Hold the passes that bring graphs into a simpler form, and leave what they compute alone."""

from graphopt.passes.canonicalize.fold_constants import FoldConstants
from graphopt.passes.canonicalize.merge_duplicates import MergeDuplicates
from graphopt.passes.canonicalize.move_transposes import MoveTransposes
from graphopt.passes.canonicalize.remove_identities import RemoveIdentities
from graphopt.passes.canonicalize.simplify_slices import SimplifySlices
from graphopt.passes.canonicalize.split_parallel import SplitParallel

__all__ = ["FoldConstants", "MergeDuplicates", "MoveTransposes", "RemoveIdentities", "SimplifySlices", "SplitParallel"]
