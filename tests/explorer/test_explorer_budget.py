"""The budget slider of the rank explorer, without a browser."""

import html
from functools import partial

import pytest

import cpnb
from cpnb._explorer import board
from cpnb._explorer.budget import BUDGET, budget_at, budget_problem, budget_range
from cpnb.sweep import rank_sweep


@pytest.fixture
def explore(explore):
    return partial(explore, background=False)


def words(explorer):
    return html.unescape(explorer.status.value)


def test_budget_sets_every_slider_to_what_the_allocator_buys(
    explore, model, data, sweep
):
    explorer = explore(model, data, sweep=sweep)
    budget = explorer.sliders[BUDGET]
    assert not budget.disabled
    for percent in (90, 60, 130, 45, 70):
        budget.value = percent
        allowed = percent * sweep.dense_parameters // 100
        bought = cpnb.allocate_ranks(sweep, budget=allowed, unit="parameters").ranks
        assert explorer.ranks == bought
        assert {name: explorer.boxes[name].value for name in bought} == bought
        cut = cpnb.truncate(model, rank=bought)
        assert sum(p.numel() for p in cut.parameters()) <= allowed
        assert explorer.accuracy == cpnb.accuracy(cut, data)
        assert explorer.boxes[BUDGET].value == budget.value == percent
        assert f"Budget of {percent} % of the dense parameters" in words(explorer)
        kept = round(100 * sum(bought.values()) / 14)
        assert explorer.sliders["*"].value == kept


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


def test_budget_is_disabled_with_the_reason_until_every_layer_is_known(
    explore, model, data
):
    partial = rank_sweep(model, data, ["fc"], progress=False)
    assert "conv cut alone is not known" in budget_problem(partial)
    explorer = explore(model, data, sweep=partial)
    for widget in (explorer.sliders[BUDGET], explorer.boxes[BUDGET]):
        assert widget.disabled and "conv cut alone" in widget.tooltip
    assert "No budget to slide: the accuracy with conv cut alone" in words(explorer)
    explorer.sliders["conv"].value = 4
    assert explorer.sliders[BUDGET].disabled  # a curve from 4 up leaves gaps below
    explorer.sliders["conv"].value = 1
    assert not explorer.sliders[BUDGET].disabled
    assert "No budget" not in words(explorer)
    explorer.sliders["conv"].value = 2
    explorer.switches.key.value = "greedy"
    assert explorer.sliders[BUDGET].disabled
    assert "with conv, fc cut alone is not known for key 'greedy'" in words(explorer)
    explorer.switches.undo.click()
    assert not explorer.sliders[BUDGET].disabled


def test_budget_shows_an_error_of_the_allocator_and_recovers(
    explore, sweep, monkeypatch
):
    def broken(table, percents):
        raise ValueError("nothing costs so little")

    explorer = explore(sweep)
    monkeypatch.setattr(board, "allocated_ranks", broken)
    explorer.sliders[BUDGET].value = 50
    assert explorer.status.value.startswith('<div role="alert"')
    assert "ValueError: nothing costs so little" in words(explorer)
    assert explorer.ranks == sweep.ranks
    explorer.sliders["conv"].value = 3
    assert explorer.status.value.startswith('<div role="status"')
