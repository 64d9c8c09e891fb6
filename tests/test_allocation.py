"""The rank allocator against every combination there is, and the times it may use."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cpnb
from cpnb._sweep.points import SweptLayer
from cpnb._sweep.timing import milliseconds_at
from cpnb.allocation import RankAllocation


def table(layers, images=20):
    """A sweep of made-up layers: full rank, cost of a component, accuracies by rank."""
    swept = [
        SweptLayer(
            *(name, "CPLinear", (9, 9), 1.0, rank, 5, 81, 7, parameters),
            *(100, flops),
        )
        for name, (rank, parameters, flops, _) in layers.items()
    ]
    sweep = cpnb.RankSweep(
        layers=tuple(swept),
        other_parameters=11,
        other_flops=13,
        key="lam",
        refit=False,
        fingerprint="",
        provenance={"images": images},
        axes=tuple(layers),
    )
    sweep.add({}, 18 / images, 0.1, {})
    for name, (*_, found) in layers.items():
        for rank, right in found.items():
            sweep.add({name: rank}, right / images, 0.1, {})
    sweep.times = {
        "layers": {
            name: {"dense": 6.0, "chain": [[1, 0.5], [rank, rank * 0.9]]}
            for name, (rank, *_) in layers.items()
        },
        "other": 2.0,
    }
    return sweep


@st.composite
def tables(draw):
    layers = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        rank = draw(st.integers(2, 9))
        known = draw(st.sets(st.integers(1, rank - 1), max_size=4))
        right = {r: draw(st.integers(0, 20)) for r in known}
        layers[name] = (rank, *draw(st.tuples(*[st.integers(1, 30)] * 2)), right)
    return table(layers)


def brute_force(sweep, cost):
    """Every combination of measured ranks: cost and right answers that are lost."""
    whole = sweep.point().accuracy
    axes = [[rank for rank, _ in sweep.curve(axis)] for axis in sweep.axes]
    for ranks in itertools.product(*axes):
        at = dict(zip(sweep.axes, ranks, strict=True))
        alone = [sweep.point({name: rank}).accuracy for name, rank in at.items()]
        yield cost(at), sum(round(20 * (whole - accuracy)) for accuracy in alone), at


def lost(choice, sweep):
    alone = [sweep.point({n: r}).accuracy for n, r in choice.ranks.items()]
    return sum(round(20 * (sweep.point().accuracy - accuracy)) for accuracy in alone)


@given(sweep=tables(), share=st.floats(0.2, 1.1), unit=st.sampled_from(["p", "f", "m"]))
def test_allocate_ranks_equals_brute_force_and_never_exceeds_the_budget(
    sweep, share, unit
):
    unit, cost = {
        "p": ("parameters", sweep.parameters),
        "f": ("flops", sweep.flops),
        "m": ("ms", sweep.milliseconds),
    }[unit]
    every = list(brute_force(sweep, cost))
    budget = share * cost({})
    within = [one for one in every if one[0] <= budget]
    if not within:
        with pytest.raises(ValueError, match=f"budget is .* {unit}, expected at least"):
            cpnb.allocate_ranks(sweep, budget=budget, unit=unit)
        return
    found = cpnb.allocate_ranks(sweep, budget=budget, unit=unit)
    assert cost(found.ranks) == found.choice.cost <= budget
    least = min(one[1] for one in within)
    assert lost(found.choice, sweep) == least
    cheapest = min(one[0] for one in within if one[1] == least)
    assert found.choice.cost == pytest.approx(cheapest)
    # The whole front: best for every cost, nothing else.
    expected, best = [], None
    for price, loss, _ in sorted(every, key=lambda one: one[:2]):
        if best is None or loss < best:
            best = loss
            expected.append((price, loss))
    front = [(choice.cost, lost(choice, sweep)) for choice in found.front]
    assert [loss for _, loss in front] == [loss for _, loss in expected]
    assert [cost for cost, _ in front] == pytest.approx([cost for cost, _ in expected])


@pytest.fixture
def sweep():
    return table(
        {
            "conv": (4, 10, 1000, {1: 2, 2: 17, 3: 18}),
            "fc": (10, 100, 10, {1: 17, 5: 18}),
        }
    )


def test_allocate_ranks_predicts_from_the_layers_alone_and_says_what_is_measured(sweep):
    found = cpnb.allocate_ranks(sweep, budget=200)
    assert found.ranks == {"conv": 3, "fc": 1}  # 11 + 2 · 7 + 30 + 100
    assert found.choice.cost == 155
    assert found.choice.accuracy == pytest.approx(17 / 20)
    assert found.choice.measured is None
    assert found.uniform.ranks == {"conv": 1, "fc": 1}
    assert found.uniform.accuracy == pytest.approx(1 / 20)
    # Of choices that lose nothing the cheapest.
    plenty = cpnb.allocate_ranks(sweep, budget=10**6)
    assert plenty.ranks == {"conv": 3, "fc": 5}
    assert plenty.uniform.measured == 18 / 20
    # By FLOPs the convolution is the dear one.
    found = cpnb.allocate_ranks(sweep, budget=2200, unit="flops")
    assert found.ranks == {"conv": 2, "fc": 5}
    words = repr(found)
    assert words.startswith("RankAllocation(budget 2,200 flops")
    assert "layers: conv 2, fc 5; 2,063; predicted 85.00%" in words
    assert "uniform: conv 2" in words
    assert json.dumps(found.to_rows())
    row = found.to_rows()[-1]
    assert row["unit"] == "flops" and row["rank of fc"] == 5


def test_allocate_ranks_leaves_layers_whole_that_were_not_swept(sweep):
    sweep.axes = ("fc", "*")
    found = cpnb.allocate_ranks(sweep, budget=200)
    assert found.ranks == {"conv": 4, "fc": 1}
    assert {choice.ranks["conv"] for choice in found.front} == {4}


def test_allocate_ranks_reaches_more_than_the_uniform_cut_on_a_network():
    """A layer that does nothing is cut first."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(cpnb.CPLinear(12, 12, rank=6), nn.ReLU(), cpnb.CPLinear(12, 6))
    with torch.no_grad():
        net[2].factors[1][:6] = 0  # reads nothing of the first half
    images = torch.randn(200, 12, generator=generator)
    data = images, net(images).argmax(1)
    sweep = cpnb.rank_sweep(net, data, progress=False)
    budget = 0.7 * sweep.parameters({})
    found = cpnb.allocate_ranks(sweep, budget=budget)
    cut = cpnb.truncate(net, rank=found.ranks)
    assert sum(p.numel() for p in cut.parameters()) == found.choice.cost <= budget
    assert cpnb.accuracy(cut, data) >= found.uniform.measured


def test_allocate_ranks_refuses_what_it_cannot_do(sweep):
    with pytest.raises(ValueError, match=r"budget is 100 parameters, expected at.*135"):
        cpnb.allocate_ranks(sweep, budget=100)
    with pytest.raises(ValueError, match="budget is 0, expected a finite number above"):
        cpnb.allocate_ranks(sweep, budget=0)
    with pytest.raises(TypeError, match="budget is '1', expected a number"):
        cpnb.allocate_ranks(sweep, budget="1")
    with pytest.raises(ValueError, match="unit is 'bytes', expected one of parameters"):
        cpnb.allocate_ranks(sweep, budget=100, unit="bytes")
    with pytest.raises(TypeError, match="sweep is a list, expected a RankSweep"):
        cpnb.allocate_ranks([], budget=100)
    sweep.times = {}
    with pytest.raises(ValueError, match=r"no times.*sweep.measure_times\(model, data"):
        cpnb.allocate_ranks(sweep, budget=100, unit="ms")
    sweep.axes = ("*",)
    with pytest.raises(ValueError, match="sweep holds no layer axis, expected"):
        cpnb.allocate_ranks(sweep, budget=100)


def test_milliseconds_are_those_of_the_faster_way_and_linear_between_ranks():
    times = {"dense": 5.0, "chain": [[1, 1.0], [4, 4.0], [8, 12.0]]}
    found = [milliseconds_at(times, rank) for rank in (1, 2, 4, 5, 8)]
    assert found == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert milliseconds_at({"dense": 2.0, "chain": [[1, 3.0]]}, 1) == 2.0


def test_sweep_measures_times_once_and_keeps_them(tmp_path):
    net = cpnb.canonicalize(cpnb.DigitsNet(), rank=8, skip="fc2")
    data = torch.randn(30, 1, 8, 8), torch.arange(30) % 10
    sweep = cpnb.rank_sweep(net, data, ["conv2"], progress=False)
    assert sweep.to_rows()[0]["network_ms"] is None
    sweep.measure_times(net, data, batch_size=20, repeats=2)
    assert sweep.times["batch"] == 20 and sweep.times["threads"] >= 1
    assert set(sweep.times["layers"]) == {"conv1", "conv2", "fc1"}
    assert [rank for rank, _ in sweep.times["layers"]["conv2"]["chain"]] == [1, 4, 8]
    whole = sweep.milliseconds({})
    layers = sweep.times["layers"].values()
    inside = sum(min(times["dense"], times["chain"][-1][1]) for times in layers)
    assert whole == pytest.approx(inside + sweep.times["other"])
    row = sweep.to_rows()[2]
    assert row["network_ms"] == sweep.milliseconds({"conv2": 3})
    sweep.save(tmp_path / "sweep.json")
    assert cpnb.RankSweep.load(tmp_path / "sweep.json") == sweep
    assert sweep.copy().times == sweep.times
    found = cpnb.allocate_ranks(sweep, budget=whole, unit="ms")
    assert isinstance(found, RankAllocation) and found.choice.cost <= whole
    other = cpnb.canonicalize(cpnb.DigitsNet(), rank=8, skip="fc2")
    with pytest.raises(ValueError, match="other weights"):
        sweep.measure_times(other, data)
