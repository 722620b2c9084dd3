"""Score the indices of coupled groups: one criterion a file.

A criterion is a frozen dataclass with a name, options as fields, and one method :meth:`Criterion.score`.
``CRITERIA`` lists them by the name that pipelines use.
"""

from graphopt.importance.bn_gamma import BNGamma
from graphopt.importance.calibration import Batch, Loss
from graphopt.importance.criterion import Criterion, ScoreContext, Scores
from graphopt.importance.group_taylor import GroupTaylor
from graphopt.importance.input_fluctuation import InputFluctuation
from graphopt.importance.l1 import L1
from graphopt.importance.l2 import L2
from graphopt.importance.lamp import LAMP
from graphopt.importance.normalizers import NORMALIZERS, normalize
from graphopt.importance.random import Random

__all__ = [
    "CRITERIA",
    "L1",
    "L2",
    "LAMP",
    "NORMALIZERS",
    "BNGamma",
    "Batch",
    "Criterion",
    "GroupTaylor",
    "InputFluctuation",
    "Loss",
    "Random",
    "ScoreContext",
    "Scores",
    "normalize",
]

CRITERIA: dict[str, type[Criterion]] = {
    "l1": L1,
    "l2": L2,
    "random": Random,
    "bn-gamma": BNGamma,
    "lamp": LAMP,
    "input-fluctuation": InputFluctuation,
    "group-taylor": GroupTaylor,
}
"""Every criterion by its name."""
