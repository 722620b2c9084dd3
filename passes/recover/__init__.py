"""Hold the passes that make up for what was removed."""

from graphopt.passes.recover.compensate_mean import CompensateMean
from graphopt.passes.recover.fine_tune import FineTune
from graphopt.passes.recover.ridge_refit import RidgeRefit

__all__ = ["CompensateMean", "FineTune", "RidgeRefit"]
