"""What every test shares: a quiet matplotlib, repeatable random numbers."""

import os
import sys

import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("agg")

# A processor for each of several test processes.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# The same examples every time, so that a failure is a change in the code;
# `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _repeatable_random_numbers():
    """Seed torch's global generator, which the library itself must not touch."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_figure_left_open():
    """Close what a test drew with pyplot, so that figures do not pile up."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
