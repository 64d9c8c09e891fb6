"""A network, images it reads without a mistake, its sweep, and explorers of it."""

import pytest
import torch
from parts import Net

from cpnb.sweep import rank_sweep
from cpnb.widgets import RankExplorer


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def data(model):
    images = torch.randn(80, 1, 4, 4)
    with torch.no_grad():
        return images, model(images).argmax(1)


@pytest.fixture
def sweep(model, data):
    return rank_sweep(model, data, progress=False)


@pytest.fixture
def explore():
    """RankExplorer, closed after the test."""
    made = []

    def make(*args, **options):
        made.append(RankExplorer(*args, **options))
        return made[-1]

    yield make
    for explorer in made:
        explorer.close()
