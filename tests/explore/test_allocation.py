"""The allocator against trying every combination of the ranks that were measured."""

import itertools
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpnb.explore.allocation import allocate_ranks, rank_front
from cpnb.explore.sweep import RankSweep, SweptLayer

IMAGES = 20


def table(layers):
    """A sweep of layers given as rank, parameters, FLOPs and right answers by rank.

    At its full rank a layer, like the whole network, gets 18 of 20 images right.
    """
    swept = {}
    for name, (rank, parameters, flops, _) in layers.items():
        sizes = {"fixed_parameters": 10, "component_parameters": parameters}
        sizes |= {"dense_parameters": 10 * parameters, "component_flops": flops}
        swept[name] = SweptLayer(kernel_norm=1.0, rank=rank, break_even_rank=9, **sizes)
    rows = [
        {"axis": name, "rank": at, "right": count}
        for name, (rank, *_, right) in layers.items()
        for at, count in ({**right, rank: 18}).items()
    ]
    return RankSweep(
        *("Net", None, IMAGES, "lam", False, ""), swept, 1, 3, pd.DataFrame(rows)
    )


@st.composite
def sweeps(draw):
    layers = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        rank = draw(st.integers(1, 6))
        known = draw(st.lists(st.integers(1, 6), max_size=4, unique=True))
        right = {at: draw(st.integers(0, IMAGES)) for at in sorted(known) if at < rank}
        sizes = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        layers[name] = (rank, *sizes, right)
    return table(layers)


def brute_force(sweep, cost):
    """Cost, right answers lost and ranks of every combination that was measured."""
    curves = {name: sweep.curve(name) for name in sweep.layers}
    alone = [dict(zip(c["rank"], c["right"], strict=True)) for c in curves.values()]
    for ranks in itertools.product(*alone):
        lost = sum(18 - right[r] for right, r in zip(alone, ranks, strict=True))
        at = dict(zip(curves, ranks, strict=True))
        yield cost(at), lost, at


@given(sweeps(), st.sampled_from(["parameters", "flops"]), st.floats(0.1, 1.2))
def test_allocation_is_the_best_of_all_combinations(sweep, unit, share):
    cost = getattr(sweep, unit)
    every = list(brute_force(sweep, cost))
    front = rank_front(sweep, unit)
    best = math.inf
    expected = []
    for price, lost, _ in sorted(every, key=lambda one: one[:2]):
        if lost < best:
            best = lost
            expected.append((price, min(1.0, max(0.0, (18 - lost) / IMAGES))))
    assert [(choice.cost, choice.accuracy) for choice in front] == expected
    assert all(cost(choice.ranks) == choice.cost for choice in front)
    budget = share * cost({})
    within = [one for one in every if one[0] <= budget]
    if not within:
        with pytest.raises(ValueError, match=f"budget is .* {unit}, expected at least"):
            allocate_ranks(sweep, budget, unit)
        return
    choice = allocate_ranks(sweep, budget, unit)
    least = min(lost for _, lost, _ in within)
    assert choice.cost == min(price for price, lost, _ in within if lost == least)
    assert (choice.cost, least, choice.ranks) in every


@pytest.fixture
def sweep():
    conv = (4, 10, 1000, {1: 2, 2: 17, 3: 18})
    return table({"conv": conv, "fc": (10, 100, 10, {1: 17, 5: 18})})


def test_allocation_adds_up_what_each_layer_loses_alone(sweep):
    choice = allocate_ranks(sweep, 200)
    assert choice.ranks == {"conv": 3, "fc": 1}
    assert choice.cost == 1 + (10 + 30) + (10 + 100)
    assert choice.accuracy == 17 / 20
    # Of choices that lose nothing the cheapest.
    assert allocate_ranks(sweep, 10**6).ranks == {"conv": 3, "fc": 5}
    # By FLOPs the convolution is the dear one.
    choice = allocate_ranks(sweep, 2200, unit="flops")
    assert choice.ranks == {"conv": 2, "fc": 5}
    assert choice.cost == 3 + 2 * 1000 + 5 * 10


def test_allocation_leaves_layers_whole_that_were_not_swept(sweep):
    sweep.table = sweep.table[sweep.table["axis"] == "fc"]
    assert allocate_ranks(sweep, 200).ranks == {"conv": 4, "fc": 1}
    assert {choice.ranks["conv"] for choice in rank_front(sweep)} == {4}


def test_allocation_refuses_what_it_cannot_do(sweep):
    with pytest.raises(ValueError, match=r"budget is 100 parameters, expected at.*131"):
        allocate_ranks(sweep, 100)
    with pytest.raises(ValueError, match="unit is 'flop', expected one of"):
        allocate_ranks(sweep, 100, "flop")
    sweep.table["axis"] = "*"
    with pytest.raises(ValueError, match="sweep holds no axis of a layer, expected"):
        allocate_ranks(sweep, 100)
