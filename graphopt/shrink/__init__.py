"""Give users their own class back, smaller: what ``Plan.apply`` does to a module.

- ``module``: the order of events
- ``sizes``: which sizes become which, and where
- ``layers``: attributes of torch's own layers
- ``sites``: numbers that other modules keep as attributes
- ``trace``: watching a module run beside its graph
- ``search``: finding the numbers with which the module's own code computes what the cut graph does
"""

from graphopt.plan import Plan
from graphopt.shrink.module import follow, shrink

Plan.shrink = staticmethod(shrink)

__all__ = ["follow", "shrink"]
