"""Share one capture of a model among the tests that prune it.

Tests that take their names from `MODELS` form one group a model, so that a worker of pytest-xdist (run with
`--dist loadgroup`) does all tests of a model one after the other, and captures it once.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
from torch import nn

from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from tests.zoo import ZOO

__all__ = ["MODELS", "captured"]

MODELS = [pytest.param(name, id=name, marks=pytest.mark.xdist_group(name)) for name in ZOO]


@lru_cache(maxsize=1)
def captured(name: str) -> tuple[nn.Module, Typing]:
    """Build, capture and type a model of the zoo; the tests change neither the module nor the graph."""
    model = ZOO[name].build()
    return model, infer(capture(model, ZOO[name].inputs()))
