"""Make every test start from the same seeds, threads and settings."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.torchvision_ops import declare_missing_operators

declare_missing_operators()

# Workers of pytest-xdist share the cores; a test alone may use a few, but not so many that sums change their order
# from machine to machine.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

# "ci" repeats the same examples in every run, so that a change that fails is a change that broke something;
# "thorough" (pytest --hypothesis-profile=thorough) looks for new ones.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("ci", _COMMON, max_examples=100, derandomize=True, database=None)
settings.register_profile("thorough", _COMMON, max_examples=2000, print_blob=True)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every generator a test may draw from without naming it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
