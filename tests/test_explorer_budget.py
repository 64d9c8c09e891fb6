"""The budget slider of the rank explorer, without a browser."""

import html

import pytest
import torch
from torch import nn

from cpnb._explorer import board
from cpnb._explorer.budget import BUDGET, budget_at, budget_range
from cpnb.layers import CPConv2d, CPLinear
from cpnb.sweep import rank_sweep
from cpnb.widgets import RankExplorer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = CPConv2d(1, 6, 3, rank=8)
        self.fc = CPLinear(24, 5, rank=6)

    def forward(self, images):
        return self.fc(self.conv(images).relu().flatten(1))


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
        made.append(RankExplorer(*args, **options, background=False))
        return made[-1]

    yield make
    for explorer in made:
        explorer.close()


def words(explorer):
    return html.unescape(explorer.status.value)


def test_budget_follows_the_other_sliders(explore, sweep):
    explorer = explore(sweep)
    for axis, value in (("conv", 3), ("fc", 2), ("*", 30)):
        explorer.sliders[axis].value = value
        count = sweep.point(explorer.ranks).parameters
        percent = explorer.sliders[BUDGET].value
        assert (percent - 1) / 100 < count / sweep.dense_parameters <= percent / 100
        assert "Budget of" not in words(explorer)


def test_budget_reaches_from_rank_one_to_the_whole_network(explore, sweep):
    first, last = budget_range(sweep)
    slider = explore(sweep).sliders[BUDGET]
    assert (slider.min, slider.max, slider.value) == (first, last, last)
    assert budget_at(sweep, {"conv": 1, "fc": 1}) == first
    assert budget_at(sweep, sweep.ranks) == last


def test_budget_shows_an_error_of_the_allocator_and_recovers(
    explore, sweep, monkeypatch
):
    def broken(table, percent):
        raise ValueError("nothing costs so little")

    explorer = explore(sweep)
    monkeypatch.setattr(board, "allocated_ranks", broken)
    explorer.sliders[BUDGET].value = 50
    assert explorer.status.value.startswith('<div role="alert"')
    assert "ValueError: nothing costs so little" in words(explorer)
    assert explorer.ranks == sweep.ranks
    explorer.sliders["conv"].value = 3
    assert explorer.status.value.startswith('<div role="status"')
