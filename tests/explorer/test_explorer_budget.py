"""The budget slider of the rank explorer, without a browser."""

import html
from functools import partial

import pytest

import cpnb
from cpnb._explorer import live
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
    def broken(front, dense_parameters, percent):
        raise ValueError("nothing costs so little")

    explorer = explore(sweep)
    monkeypatch.setattr(live, "allocated_ranks", broken)
    explorer.sliders[BUDGET].value = 50
    assert explorer.status.value.startswith('<div role="alert"')
    assert "ValueError: nothing costs so little" in words(explorer)
    assert explorer.ranks == sweep.ranks
    explorer.sliders["conv"].value = 3
    assert explorer.status.value.startswith('<div role="status"')


def test_budget_spends_on_what_has_been_measured_since(explore, model, data):
    coarse = rank_sweep(model, data, ranks={"conv": [1, 8], "fc": [1, 6]})
    explorer = explore(model, data, sweep=coarse)
    explorer.sliders[BUDGET].value = 120
    explorer.switches.reset.click()
    for rank in range(2, 8):
        explorer.sliders["conv"].value = rank
    explorer.sliders[BUDGET].value = 120
    allowed = 120 * coarse.dense_parameters // 100
    assert explorer.ranks == cpnb.allocate_ranks(explorer.sweep, budget=allowed).ranks
    assert explorer.ranks != cpnb.allocate_ranks(coarse, budget=allowed).ranks


def test_budget_is_no_allocation_any_more_after_a_key_without_a_table(
    explore, model, data, sweep
):
    explorer = explore(model, data, sweep=sweep)
    explorer.sliders[BUDGET].value = 70
    ranks = explorer.ranks
    assert "Budget of 70 %" in words(explorer)
    explorer.switches.key.value = "greedy"
    assert explorer.ranks == ranks
    assert "allocated to the layers" not in words(explorer)
    assert "No budget to slide" in words(explorer)
    explorer.switches.undo.click()
    assert "Budget of 70 %" in words(explorer)
