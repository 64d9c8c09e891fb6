"""The rank explorer without a browser: its page, its messages, its worker, its exit."""

import base64
import copy
import json
import re
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import cpnb
from cpnb.explore.page import explorer_table, sweep_page, sweep_points
from cpnb.explore.rank_explorer import NewestWins, RankExplorer
from cpnb.truncation import KEYS

LONG = 30  # seconds; a test that waits this long has failed

NETWORK = """
import torch, cpnb
from torch import nn
generator = torch.Generator().manual_seed(0)
model = nn.Sequential(
    cpnb.CPConv2d(1, 6, 3, rank=8, generator=generator),
    nn.ReLU(),
    nn.Flatten(),
    cpnb.CPLinear(24, 5, rank=6, generator=generator),
)
images = torch.randn(80, 1, 4, 4, generator=generator)
data = images, model(images).argmax(1)
"""


@pytest.fixture
def made():
    """A network, and images it reads without a mistake."""
    names = {}
    exec(NETWORK, names)
    return names["model"], names["data"]


@pytest.fixture
def sweep(made):
    return cpnb.rank_sweep(*made, progress=False)


@pytest.fixture
def explorer(sweep, made):
    explorer = RankExplorer(sweep, *made)
    yield explorer
    explorer.close()


def total_error(whole, cut):
    """Relative error of all kernels together."""
    return cpnb.truncation_report(whole, cut)["relative_error"]["total"]


def test_sweep_points_are_what_the_library_gives(sweep, made):
    model, data = made
    points = sweep_points(sweep)
    assert len(points) == len({*map(tuple, sweep.table[["rank_0", "rank_3"]].values)})
    for ranks in [(8, 6), (3, 6), (8, 1), (4, 3)]:
        cut = cpnb.truncate(model, rank=dict(zip("03", ranks, strict=True)))
        right, error = points[ranks]
        assert right == round(80 * cpnb.accuracy(cut, data))
        assert error == pytest.approx(total_error(model, cut), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("live", [True, False])
def test_explorer_table_holds_sliders_and_budgets_in_the_types_of_json(sweep, live):
    sweep.table = sweep.table[sweep.table["rank_0"] != 5]
    table = explorer_table(sweep, sweep_points(sweep), KEYS, live=live)
    assert json.loads(json.dumps(table)) == table
    assert table["layers"][0]["ranks"] == [n for n in range(1, 9) if live or n != 5]
    assert table["steps"][-1] == [100, 8, 6]
    for percent, *ranks in table["budgets"]:
        budget = percent * sweep.dense_parameters / 100
        choice = cpnb.allocate_ranks(sweep, budget)
        assert ranks == list(choice.ranks.values())
    for layer, swept in zip(table["layers"], sweep.layers.values(), strict=True):
        parameters = layer["fixed"] + 3 * layer["component"]
        assert parameters == swept.fixed_parameters + 3 * swept.component_parameters


def test_page_refers_to_nothing_outside_and_escapes_names(sweep, tmp_path):
    evil = "</script><b>"
    sweep = replace(sweep, network=evil)
    page = sweep.to_html(tmp_path / "sweep.html")
    assert (tmp_path / "sweep.html").read_text(encoding="utf-8") == page
    assert evil not in page
    assert not re.search(r"\b(src|href)=|@import|url\(|fetch\(|\bimport\(", page)
    spaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}
    assert set(re.findall(r"https?://[^\"]*", page)) == spaces
    assert len(page.encode()) < 150_000


def test_page_needs_a_network_that_is_cut(sweep):
    sweep.table = sweep.table[(sweep.table["rank_0"] == 8) & (sweep.table["keep"] == 1)]
    with pytest.raises(ValueError, match=r"sweep holds 1 networks, expected the whole"):
        sweep_page(sweep, KEYS)


def test_explorer_sweeps_a_network_that_comes_without_a_table(made):
    explorer = RankExplorer(*made, key="greedy", refit=True, progress=False)
    assert (explorer.table["key"], explorer.table["refit"]) == ("greedy", True)
    assert explorer.accuracy == 1.0
    explorer.close()


@pytest.mark.parametrize(
    "how", [("lam", False), ("gradient", "data"), ("greedy", True)]
)
def test_explorer_answers_a_request_with_what_the_library_measures(explorer, made, how):
    model, data = made
    key, refit = how
    before = copy.deepcopy(model.state_dict())
    request = {"key": key, "refit": refit, "ranks": [3, 5], "number": 1, "layer": None}
    explorer.request = request
    options = {"key": key, "refit": refit, "data": data, "progress": False}
    cut = cpnb.truncate(model, rank={"0": 3, "3": 5}, **options)
    assert explorer.wait(LONG) == cpnb.accuracy(cut, data)
    error = explorer.answer["error"]
    assert error == pytest.approx(total_error(model, cut), rel=1e-5)
    right = round(80 * cpnb.accuracy(cut, data))
    assert explorer.answer == {**request, "right": right, "error": error}
    torch.testing.assert_close([*explorer.model.parameters()], [*cut.parameters()])
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_explorer_draws_pictures_when_they_are_wanted(explorer):
    explorer.request = {**explorer.request, "ranks": [2, 6], "layer": 0}
    explorer.wait(LONG)
    picture = explorer.answer["image"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    wrong = round(80 * (1 - explorer.accuracy))
    words = f"{wrong} answers change, {wrong} of them were right"
    assert words in explorer.answer["text"]


def test_explorer_moves_by_assigned_ranks_and_refuses_others(explorer):
    explorer.ranks = {"3": 2}
    assert explorer.ranks == {"0": 8, "3": 2}
    explorer.ranks = {"0": 5}
    assert explorer.ranks == {"0": 5, "3": 2}
    with pytest.raises(ValueError, match="ranks"):
        explorer.ranks = {"0": 9}


def test_explorer_page_holds_what_was_measured(explorer):
    explorer.ranks = {"0": 3, "3": 5}
    accuracy = explorer.wait(LONG)
    page = explorer.to_html()
    table = json.loads(re.search(r'application/json">(.*?)</script>', page).group(1))
    assert [3, 5, round(80 * accuracy)] in [point[:3] for point in table["points"]]


def test_explorer_says_what_goes_wrong_and_goes_on(explorer, monkeypatch):
    with monkeypatch.context() as patch:
        broken = lambda *_: [][0]  # noqa: E731
        patch.setattr("cpnb.explore.rank_explorer.accuracy", broken)
        explorer.ranks = {"0": 3, "3": 5}
        assert explorer.wait(LONG) is None
    assert explorer.answer["failure"] == "IndexError: list index out of range"
    explorer.ranks = {"0": 2, "3": 5}
    assert explorer.wait(LONG) is not None


def test_explorer_is_a_picture_and_a_line_for_pages_without_a_kernel(explorer, sweep):
    data, _ = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    count = sweep.parameters({})
    line = f"Sequential: accuracy 100.00%, {count:,} parameters, "
    assert data["text/plain"].startswith(line)
    assert "application/vnd.jupyter.widget-view+json" in data


def test_explorer_refuses_what_does_not_go_together(sweep, made):
    model, (images, labels) = made
    with pytest.raises(TypeError, match=r"arguments are \(Sequential\), expected"):
        RankExplorer(model)
    with pytest.raises(ValueError, match="data has 40 images, expected the 80"):
        RankExplorer(sweep, model, (images[:40], labels[:40]))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].lam.mul_(2)
    with pytest.raises(ValueError, match="but the Sequential given has other weights"):
        RankExplorer(sweep, other, (images, labels))
    with pytest.raises(ValueError, match="CP layer"):
        RankExplorer(nn.Linear(3, 2), (torch.zeros(4, 3), torch.zeros(4).long()))


def test_newest_wins_drops_what_was_overtaken_and_what_comes_after_the_end():
    gate, done, begun = threading.Event(), [], threading.Event()

    def work(item):
        begun.set()
        assert gate.wait(LONG)
        done.append(item)

    worker = NewestWins(work)
    worker.ask("first")
    assert begun.wait(LONG)
    for item in ("second", "third", "newest"):
        worker.ask(item)
    gate.set()
    worker.wait(LONG)
    assert done == ["first", "newest"]
    worker.close()
    worker.ask("late")
    assert done == ["first", "newest"]


@pytest.mark.parametrize(
    "times", [1, pytest.param(20, marks=pytest.mark.slow)], ids=["once", "often"]
)
def test_explorer_lets_the_interpreter_exit_while_it_measures(times):
    code = NETWORK + (
        "explorer = cpnb.RankExplorer(model, data, progress=False)\n"
        "for rank in range(1, 6): explorer.ranks = {'0': rank, '3': rank}\n"
        "print('asked')"
    )
    for _ in range(times):
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, "asked\n", "")
