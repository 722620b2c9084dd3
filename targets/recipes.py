"""Say which passes run by default, for a model that is to be trained and for one that is to be deployed.

What may live here: the order of passes, and why it is this one. A target chooses between the two recipes or writes
its own.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["deployment", "training"]

CLEAN: Final = ("remove-identities{trainable=true}", "merge-duplicates")
"""Before pruning: fewer operators to look at. What acts in training stays, for there may be some between the steps."""

FREE: Final = ("remove-constant-channels", "split-parallel")
"""Before pruning, for deployment: channels that cost nothing to lose go first, and packed widths become free of each
other. Both need what later passes take away: batch norms, and the parts of a packed result."""

SPELLED_OUT: Final = ("simplify-slices", "fuse-activations", "fuse-normalizations", "fold-pad")
"""What exporters to ONNX spell out, as one call again: before anything is folded into its parts. Graphs of torch's
operators have nothing of the kind, and the passes return at once."""

FINISH: Final = (
    "remove-identities",
    "fold-constants",
    *SPELLED_OUT,
    "move-transposes",
    "simplify-slices",
    "remove-identities",
    "fold-batch-norm",
    "fold-numbers",
    "fold-scale",
    "merge-branches",
    "merge-consecutive",
    "merge-parallel",
    "merge-duplicates",
)
"""After pruning, for deployment. Batch norms are folded before branches are summed and maps in a row are multiplied,
for only then are those next to each other. Not before pruning: on small networks trained on digits, magnitudes tell
less about channels once batch norms are folded into them, and where much is removed a refit recovers less
(`benchmarks/digits_order.py`)."""


def training(budget: Any, calibration: bool) -> str:
    """Return the passes for a model that is trained afterwards: parameters keep their names, batch norms stay.

    Args:
        budget: the budget, or None where only lossless passes may run.
        calibration: there is data to refit the remaining layers on.
    """
    return ",".join((*CLEAN, *_pruning(budget, calibration)))


def deployment(budget: Any, calibration: bool) -> str:
    """Return the passes for a model that only has to run: whatever can be computed beforehand is.

    Args:
        budget: the budget, or None where only lossless passes may run.
        calibration: there is data to refit the remaining layers on.
    """
    before = (*CLEAN, *FREE) if budget is not None else (*CLEAN, FREE[0])
    return ",".join((*before, *_pruning(budget, calibration), *FINISH))


def _pruning(budget: Any, calibration: bool) -> tuple[str, ...]:
    if budget is None:
        return ()
    return ("prune-channels", "ridge-refit") if calibration else ("prune-channels",)
