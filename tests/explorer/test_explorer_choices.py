"""The rank explorer's key, refit, budget, undo, reset and code, without a browser."""

import html
import re

import pytest
import torch
from parts import LONG, gated

import cpnb
from cpnb._explorer import live
from cpnb._explorer.choices import KEYS, REFITS
from cpnb._explorer.history import History, Position
from cpnb._explorer.pareto import known_points, pareto_front
from cpnb.layers import CPLinear


def words(widget):
    """What a reader sees of an HTML widget."""
    return html.unescape(re.sub("<[^>]*>", "\n", widget.value))


def run_code(explorer, model, data):
    """Run what "copy as code" shows, as a reader does who pastes it."""
    explorer.switches.code.value = True
    *lines, last = words(explorer.code).strip().splitlines()
    names = {"net": model, "data": data}
    exec("\n".join(lines), names)
    return eval(last, names), names["cut"], last


@pytest.mark.parametrize(
    ("key", "refit"),
    [(key, False) for key in KEYS] + [("lam", refit) for refit in REFITS.values()][1:],
)
def test_choice_keeps_the_ranks_and_shows_what_the_library_gives(
    explore, model, data, key, refit
):
    explorer = explore(model, data, background=False)
    explorer.sliders["conv"].value, explorer.sliders["fc"].value = 3, 4
    explorer.switches.key.value, explorer.switches.refit.value = key, refit
    ranks = {"conv": 3, "fc": 4}
    assert explorer.ranks == ranks
    cut = cpnb.truncate(model, rank=ranks, key=key, refit=refit, data=data)
    expected = cpnb.accuracy(cut, data)
    assert explorer.accuracy == expected == cpnb.accuracy(explorer.truncated(), data)
    assert (explorer.sweep.key, explorer.sweep.refit) == (key, refit)
    error = cpnb.relative_error(model.conv.weight, cut.conv.weight).item()
    assert f"Accuracy {100 * expected:.2f} % (measured)" in words(explorer.status)
    assert f"relative kernel error {error:.3f}" in words(explorer.status)


def test_choice_keeps_what_was_measured_for_another(explore, model, data, sweep):
    explorer = explore(model, data, sweep=sweep, background=False)
    explorer.sliders["conv"].value = 3
    assert "(table)" in words(explorer.status)
    explorer.switches.key.value = "greedy"
    assert "(measured)" in words(explorer.status)
    points = len(explorer.sweep)
    assert points == 2  # the whole network is the same for every key
    explorer.switches.key.value = "lam"
    assert "(table)" in words(explorer.status) and len(explorer.sweep) == len(sweep)
    explorer.switches.key.value = "greedy"
    assert len(explorer.sweep) == points and "(measured)" in words(explorer.status)


def test_choice_is_not_offered_where_nothing_can_be_measured(explore, model, sweep):
    for explorer in (explore(sweep), explore(model, sweep=sweep)):
        switches = explorer.switches
        for widget in (switches.key, switches.refit, switches.details):
            assert widget.disabled and "needs the network and data" in widget.tooltip
        assert not switches.code.disabled and not switches.reset.disabled
        assert (switches.key.value, switches.refit.value) == ("lam", False)


def test_choice_drops_a_result_of_the_one_before(explore, model, data, sweep):
    network, gate, entered, _ = gated(model)
    explorer = explore(network, data)
    explorer.switches.details.value = False
    explorer.wait(LONG)
    entered.clear()
    gate.clear()
    explorer.sliders["net.conv"].value = 2
    assert entered.wait(LONG)
    explorer.switches.refit.value = True
    gate.set()
    shown = explorer.wait(LONG)
    cut = cpnb.truncate(model, rank={"conv": 2}, refit=True)
    assert shown == cpnb.accuracy(cut, data)
    assert f"Accuracy {100 * shown:.2f} % (measured)" in words(explorer.status)
    explorer.switches.refit.value = False
    assert explorer.accuracy == cpnb.accuracy(
        cpnb.truncate(model, rank={"conv": 2}), data
    )


@pytest.mark.parametrize("background", [False, True])
def test_choice_shows_why_it_cannot_be_measured_and_recovers(
    explore, model, data, monkeypatch, background
):
    explorer = explore(model, data, background=background)
    explorer.sliders["conv"].value = 3
    shown = explorer.wait(LONG)

    def broken(*args, **options):
        raise ValueError("the order of the components is unknown")

    monkeypatch.setattr(live, "RankMeter", broken)
    explorer.switches.key.value = "greedy"
    assert explorer.wait(LONG) is None
    assert explorer.status.value.startswith('<div role="alert"')
    assert "the order of the components is unknown" in words(explorer.status)
    explorer.switches.key.value = "lam"
    assert explorer.wait(LONG) == shown
    assert explorer.status.value.startswith('<div role="status"')


def test_undo_goes_back_through_every_change_and_reset_to_the_start(
    explore, model, data
):
    explorer = explore(model, data, background=False)
    undo, reset = explorer.switches.undo, explorer.switches.reset

    def position():
        values = {axis: slider.value for axis, slider in explorer.sliders.items()}
        assert values == {axis: box.value for axis, box in explorer.boxes.items()}
        choice = explorer.switches.key.value, explorer.switches.refit.value
        assert choice == (explorer.sweep.key, explorer.sweep.refit)
        return values, choice, words(explorer.status), explorer.image.value

    def move(widget, value):
        return lambda: setattr(widget, "value", value)

    changes = [
        move(explorer.sliders["conv"], 5),
        move(explorer.boxes["fc"], 2),
        move(explorer.switches.key, "greedy"),
        move(explorer.sliders["*"], 40),
        move(explorer.switches.refit, True),
        reset.click,
        move(explorer.sliders["conv"], 7),
    ]
    assert undo.disabled
    start = position()[:2]
    seen = []
    for change in changes:
        seen.append(position()[:2])
        change()
        assert not undo.disabled
    assert seen[6] == start
    for expected in reversed(seen):
        undo.click()
        assert position()[:2] == expected
        assert explorer.accuracy == cpnb.accuracy(explorer.truncated(), data)
        assert f"{100 * explorer.accuracy:.2f} %" in words(explorer.status)
    assert undo.disabled
    undo.click()  # nothing before the start
    assert position()[:2] == start


def test_history_forgets_the_oldest_and_counts_no_position_twice():
    def at(value):
        return Position("fc", {"fc": value}, ("lam", False))

    history = History(at(0))
    assert not history and history.back() == at(0)
    history.visit(at(0))
    assert not history
    for value in range(1, 1500):
        history.visit(at(value))
    for value in range(1498, 499, -1):
        assert history.back() == at(value)
    assert not history and history.start == at(0)


def test_pareto_front_is_what_brute_force_finds(sweep):
    points = known_points(sweep)
    assert len(points) == len(sweep)
    expected = {
        (x, y)
        for x, y in points
        if not any((a <= x and b >= y) and (a, b) != (x, y) for a, b in points)
    }
    front = pareto_front(points)
    assert set(front) == expected and front == sorted(front)
    row = next(row for row in sweep.to_rows() if row["layer"] == "conv")
    size = row["network_parameters"] / row["network_dense_parameters"]
    assert (pytest.approx(size), row["accuracy"]) in points


@pytest.mark.parametrize(
    ("key", "refit"),
    [("lam", False), ("greedy", True), ("gradient", False), ("random", "data")],
)
def test_code_makes_the_network_shown(explore, model, data, key, refit):
    explorer = explore(model, data, key=key, refit=refit, background=False)
    for axis, value in (("conv", 3), ("fc", 2), ("*", 40)):
        explorer.sliders[axis].value = value
        found, cut, line = run_code(explorer, model, data)
        assert found == explorer.accuracy and line.endswith(f"# {found!r}")
        for ours, theirs in zip(
            cut.parameters(), explorer.truncated().parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_code_is_hidden_until_asked_for_and_then_follows(explore, sweep):
    explorer = explore(sweep)
    assert explorer.code.layout.display == "none"
    explorer.switches.code.value = True
    assert explorer.code.layout.display is None
    assert "rank={'conv': 8, 'fc': 6}" in words(explorer.code)
    explorer.sliders["conv"].value = 3
    assert "rank={'conv': 3, 'fc': 6}" in words(explorer.code)
    explorer.sliders["fc"].value = 5
    assert words(explorer.code).strip().endswith("# not measured yet")
    assert "readonly" in explorer.code.value and "aria-label" in explorer.code.value
    explorer.switches.code.value = False
    assert explorer.code.layout.display == "none"


def test_code_of_a_layer_alone_runs(explore):
    layer = CPLinear(6, 3, rank=4)
    images = torch.randn(20, 6)
    data = images, layer(images).argmax(1)
    explorer = explore(layer, data, background=False)
    explorer.sliders[""].value = 2
    assert run_code(explorer, layer, data)[0] == explorer.accuracy


def test_choices_and_buttons_are_labelled(explore, model, data):
    for widget in vars(explore(model, data, background=False).switches).values():
        assert widget.description and widget.tooltip


def test_explorer_code_says_what_a_random_table_needs(explore, model, data):
    generator = torch.Generator().manual_seed(5)
    options = {"key": "random", "progress": False}
    sweep = cpnb.rank_sweep(model, data, generator=generator, **options)
    explorer = explore(sweep)
    explorer.switches.code.value = True
    assert "# Pass the generator= of the sweep too" in words(explorer.code)
    explorer = explore(model, data, key="random", background=False)
    explorer.switches.code.value = True
    assert "generator" not in words(explorer.code)
