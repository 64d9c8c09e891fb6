"""Comparisons: what is trained, resumed and refused; statistics as done by hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

import cpnb
from cpnb.train import (
    REGISTRY,
    Comparison,
    Recipe,
    build,
    compare,
    comparison,
    load_data,
    paired_difference,
)
from cpnb.train.comparison import CELL, RUN_COLUMNS

SETTINGS = {"epochs": 2, "batch_size": 64}
START = {"rank": 4, "init": "power"}
RECIPES = [
    Recipe("none", "DigitsNet", settings=SETTINGS),
    Recipe("canonical", "DigitsNet", "canonical", START, settings=SETTINGS),
]
DIGITS = load_data()
SMALL = partial(load_data, train_size=128)
PLAN = {"seeds": (0, 1), "rates": (1e-3, 1e-2, 0.1), "progress": False}
ONE = {"seeds": [0], "rates": [0.01], "progress": False}
TIMES = ["seconds", "start_seconds", "images_per_second", "date"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The record of a whole comparison; not to be changed."""
    made = tmp_path_factory.mktemp("whole")
    compare(RECIPES, SMALL, **PLAN, path=made)
    return made


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of that record."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


@pytest.fixture
def trained(monkeypatch):
    """The cells that are trained."""
    cells, train_cell = [], comparison.train_cell

    def note(cell, *rest):
        cells.append(cell)
        return train_cell(cell, *rest)

    monkeypatch.setattr(comparison, "train_cell", note)
    return cells


def assert_same(found, expected):
    """Equal in everything that does not depend on when and where it was made."""
    for table in ("runs", "curves"):
        tables = [getattr(each, table) for each in (found, expected)]
        tables = [each.drop(columns=TIMES, errors="ignore") for each in tables]
        pd.testing.assert_frame_equal(*tables)


def test_compare_tunes_then_tests_fresh_seeds_at_the_best_rate(folder):
    found = Comparison.load(folder)
    assert list(found.runs) == RUN_COLUMNS and found.data == repr(SMALL())
    assert list(found.best) == ["none", "canonical"] and found.missing() == []
    for name, lr in found.best.items():
        runs = found.runs[found.runs.recipe == name].set_index("phase")
        tune, final = runs.loc["tune"], runs.loc["final"]
        assert list(tune.lr) == [1e-3, 1e-2, 0.1] and set(tune.seed) == {100}
        assert lr == tune.set_index("lr").validation_accuracy.idxmax()
        assert list(final.lr) == [lr, lr] and list(final.seed) == [0, 1]
        assert tune.test_accuracy.isna().all() and final.test_accuracy.notna().all()


def test_compare_is_the_training_that_fit_does(folder):
    found, data = Comparison.load(folder), SMALL()
    cell = found.finals.query("recipe == 'canonical' and seed == 1").iloc[0]
    network = build(RECIPES[1], data, 1)
    before = cpnb.train.evaluate(network, data)["loss"]
    run = cpnb.fit(network, data, **SETTINGS, lr=cell.lr, seed=1, progress=False)
    assert cell.start_validation_loss == round(before, 5)
    curve = found.final_curves.query("recipe == 'canonical' and seed == 1")
    for name in ("train_loss", "validation_accuracy"):
        assert list(curve[name]) == [round(epoch[name], 5) for epoch in run.history]
    assert cell.validation_accuracy == curve.validation_accuracy.iloc[-1]
    assert cell.test_accuracy == round(cpnb.accuracy(network, data.test), 5)


def test_compare_reads_the_test_split_once_per_network_after_its_training(monkeypatch):
    events, data = [], SMALL()

    def noting(function):
        def noted(network, images, **options):
            events.append((function.__name__, id(network)))
            assert function is fit or images.images.equal(data.test.images)
            return function(network, images, **options)

        return noted

    fit = comparison.fit
    for function in (fit, comparison.accuracy):
        monkeypatch.setattr(comparison, function.__name__, noting(function))
    compare(RECIPES, data, **PLAN)
    # Six trainings to tune come first, then each network is tested after its own.
    assert [name for name, _ in events] == ["fit"] * 6 + ["fit", "accuracy"] * 4
    assert events[6::2] == [("fit", network) for _, network in events[7::2]]


def test_compare_gives_each_training_hooks_of_its_own(monkeypatch):
    made = []

    class Counting:
        def __init__(self, start):
            made.append(self)
            self.steps = start

        def after_step(self, model, optimizer, step):
            self.steps += 1

    monkeypatch.setitem(REGISTRY, "Counting", Counting)
    recipe = replace(RECIPES[0], hooks=[{"name": "Counting", "start": 10}])
    compare([recipe], SMALL, **ONE | {"seeds": [0, 1]})
    # 2 epochs of 128 images by 64; with one rate there is nothing to tune.
    assert [hook.steps for hook in made] == [14, 14]


def test_compare_asked_twice_for_a_rate_or_a_seed_does_it_once(trained):
    plan = {"rates": [0.01, 0.01], "seeds": [np.int64(0), 0], "progress": False}
    assert compare(RECIPES[:1], SMALL, **plan).seeds == [0]
    assert trained == [("none", "final", 0.01, 0)]


def test_compare_augments_as_a_recipe_says():
    moved = replace(RECIPES[0], settings={**SETTINGS, "augment": {"crop": 2}})
    first, other = (compare([r], SMALL, **ONE).curves for r in (RECIPES[0], moved))
    assert (first.train_loss != other.train_loss).all()


def test_compare_measures_more_on_the_tested_networks(tmp_path, monkeypatch):
    def measure(network, data, recipe, seed, times):
        values = {"n": [1, 2], "value": [seed / 3, times * len(recipe.name)]}
        return values | {"layer": ["conv1", "fc"]}

    monkeypatch.setitem(REGISTRY, "measure", measure)
    asked = {"name": "measure", "times": 5}
    found = compare(RECIPES[:1], SMALL, **PLAN, measure=asked, path=tmp_path)
    measured = Comparison.load(tmp_path).measured
    assert list(measured.seed) == [0, 0, 1, 1] and list(measured.n) == [1, 2, 1, 2]
    assert list(measured.value) == [0.0, 20.0, 0.33333, 20.0]
    assert list(measured.layer) == ["conv1", "fc"] * 2
    pd.testing.assert_frame_equal(found.measured, measured)


def test_compare_never_chooses_a_rate_that_diverged(tmp_path):
    compare(RECIPES[:1], SMALL, **ONE | {"rates": (1e-3, 1e30)}, path=tmp_path)
    found = Comparison.load(tmp_path)
    runs = found.runs.set_index(["phase", "lr"])
    assert runs.status["tune", 1e30] == "diverged"
    assert runs.epochs["tune", 1e30] < 2 and runs.status["tune", 1e-3] == "finished"
    assert found.best == {"none": 1e-3} and found.missing() == []


def test_compare_does_no_training_twice(folder, trained):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    compare(RECIPES, SMALL, **PLAN, path=folder)
    assert trained == []
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_compare_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch, stop):
    fit, count = comparison.fit, 0

    def stops(*arguments, **options):
        nonlocal count
        count += 1
        run = fit(*arguments, **options)
        run.status = "interrupted" if count == stop else run.status
        return run

    monkeypatch.setattr(comparison, "fit", stops)
    with pytest.raises(KeyboardInterrupt):
        compare(RECIPES, SMALL, **PLAN, path=tmp_path)
    if stop > 1:
        assert len(Comparison.load(tmp_path).runs) == stop - 1
    found = compare(RECIPES, SMALL, **PLAN, path=tmp_path)
    assert count == 10 + 1, "ten trainings, one of them in two attempts"
    assert_same(found, Comparison.load(folder))


@pytest.mark.parametrize("name", ["runs.csv", "curves.csv"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "conflict", "lost"])
def test_compare_repeats_a_training_whose_line_is_damaged(
    folder, copied, trained, name, damage, recwarn
):
    *lines, last = (copied / name).read_text().splitlines(keepends=True)
    damaged = {
        "cut": last.rstrip("\n"),
        "garbage": last.replace("100", "1x0", 1),
        "conflict": "<<<<<<< HEAD\n",
        "lost": "",  # of runs.csv as where it stopped between two files
    }
    (copied / name).write_text("".join([*lines, damaged[damage]]))
    found = compare(RECIPES, SMALL, **PLAN, path=copied)
    said = [str(each.message) for each in recwarn]
    expected = [f"{name}, line {len(lines) + 1} is left out"] * (damage != "lost")
    expected += ["1 trainings lack whole curves"] * (name == "curves.csv")
    for text, part in zip(said, expected, strict=True):
        assert part in text
    assert [list(cell[:2]) for cell in trained] == [last.split(",")[:2]]
    assert_same(found, Comparison.load(folder))
    assert_same(Comparison.load(copied), found)


def test_compare_takes_more_recipes_rates_and_seeds_later(copied, trained):
    recipes = [*RECIPES, replace(RECIPES[0], name="more")]
    plan = {**PLAN, "seeds": (0, 1, 2), "rates": (1e-6, 1e-3, 1e-2, 0.1)}
    found = compare(recipes, SMALL, **plan, path=copied)
    old = [cell[1:] for cell in trained if cell[0] == "none"]
    assert old == [("tune", 1e-6, 100), ("final", found.best["none"], 2)]
    assert list(found.runs.recipe.unique()) == ["none", "canonical", "more"]


@pytest.mark.parametrize("executor", [False, True])
def test_compare_begins_no_training_after_its_limit(trained, monkeypatch, executor):
    now = iter([0, 0, 0, *[100] * 99])  # begun, a look, before the first training
    monkeypatch.setattr(comparison.time, "monotonic", lambda: next(now))
    with ThreadPoolExecutor(1) as pool:
        where = {"executor": pool} if executor else {}
        found = compare(RECIPES, SMALL, **PLAN, limit=10, **where)
    assert len(found.runs) == len(trained) == 1
    assert found.missing()


def test_save_leaves_whole_files(folder, copied, monkeypatch):
    def fails(self, target):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr(Path, "replace", fails)
        made_by_hand(SCORES).save(copied)
    Comparison.load(copied).save(copied / "deeper" / "again")
    for path in folder.glob("*.*s*"):  # .csv and .json
        assert (copied / path.name).read_bytes() == path.read_bytes()
        again = copied / "deeper" / "again" / path.name
        assert again.read_bytes() == path.read_bytes()


def test_compare_keeps_what_ended_when_it_is_interrupted(tmp_path):
    class Cluster:
        """Runs everything at once; the second result cannot be had."""

        results = iter([True, False, True, True, True, True])

        def submit(self, function, *task):
            future = Future()
            if next(self.results):
                future.set_result(function(*task))
            else:
                future.set_exception(KeyboardInterrupt())
            return future

    with pytest.raises(KeyboardInterrupt):
        compare(RECIPES, SMALL, **PLAN, path=tmp_path, executor=Cluster())
    kept = Comparison.load(tmp_path).runs
    assert len(kept) == 5, "of six trainings to tune one was interrupted"


def in_processes(data, **changes):
    """The comparison in two processes; threads decide in which order sums are added."""
    threads = (torch.get_num_threads(),)
    context = get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, threads) as pool:
        return compare(RECIPES, data, **PLAN | changes, executor=pool)


@pytest.mark.slow
@pytest.mark.parametrize("data", [SMALL, SMALL()], ids=["function", "data set"])
def test_compare_gives_the_same_in_other_processes(folder, data):
    assert_same(in_processes(data), Comparison.load(folder))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a signal to a group")
def test_ctrl_c_ends_all_processes_and_keeps_what_they_finished(tmp_path):
    path = tmp_path / "record"
    script = "import sys, test_comparison as here; "
    script += "here.in_processes(here.SMALL, seeds=range(99), path=sys.argv[1])"
    paths = f"{Path(__file__).parents[2]}:{Path(__file__).parent}"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        while process.poll() is None:
            time.sleep(0.05)
            if (path / "runs.csv").exists() and len(Comparison.load(path).runs):
                break
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    assert 1 <= len(Comparison.load(path).runs) < 202
    assert compare(RECIPES, SMALL, **PLAN, path=path).missing() == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recipes": RECIPES[:1] * 2}, ValueError, r"\['none', 'none'\], .* each once"),
        ({"seeds": [0, 100]}, ValueError, r"tune_seeds shares \[100\] with seeds"),
        ({"recipes": [Recipe("x", "LeNet9")]}, ValueError, "'LeNet9', expected one in"),
        ({"recipes": [Recipe("x", "LeNet", "wieght")]}, ValueError, "name is 'wieght'"),
        ({"measure": "nothing"}, ValueError, "'nothing', expected one in REGISTRY: "),
        ({"recipes": [Recipe("x", "LeNet", hooks=["Rank"])]}, ValueError, "is 'Rank'"),
        ({"recipes": [Recipe("x", "LeNet", settings={"k": 1})]}, TypeError, "'k'"),
        ({"recipes": [Recipe("none", "LeNet")]}, ValueError, "another none: .* Move"),
        ({"data": DIGITS}, ValueError, "was made with another data: .* Move it"),
    ],
)
def test_compare_refuses_what_would_fail(folder, trained, changes, error, message):
    plan = {"recipes": RECIPES, "data": SMALL, "path": folder, **PLAN, **changes}
    with pytest.raises(error, match=message):
        compare(**plan)
    assert trained == []


def test_build_takes_registered_functions_and_gives_them_what_they_take(monkeypatch):
    def tiny(num_classes, generator):
        layer = cpnb.CPLinear(64, num_classes, generator=generator)
        return nn.Sequential(nn.Flatten(), layer)

    def noisy(network, by, generator, data):
        assert data.equal(DIGITS.train.standardized()[:256])
        with torch.no_grad():
            network[1].bias.normal_(generator=generator).mul_(by)
        return network

    monkeypatch.setitem(REGISTRY, "tiny", tiny)
    monkeypatch.setitem(REGISTRY, "noisy", noisy)
    recipe = Recipe("x", "tiny", "noisy", {"by": 2.0})
    data = replace(DIGITS, classes=tuple("abcdefg"))
    first, again, other = (build(recipe, data, seed)[1].bias for seed in (0, 0, 1))
    halved = build(replace(recipe, options={"by": 1.0}), data, 0)[1].bias
    assert first.equal(again) and not first.equal(other) and first.shape == (7,)
    torch.testing.assert_close(halved, first / 2)


def test_recipe_equals_the_one_read_from_json():
    ranks = {"rank": {"conv1": 3, "fc1": 0.5}, "steps": (1, 2)}
    hooks = ("NestedRank", {"name": "FrobeniusDecay", "scale": False})
    recipe = Recipe("x", "DigitsNet", "canonical", ranks, hooks, {"schedule": None})
    again = Recipe(**json.loads(json.dumps(asdict(recipe))))
    assert again == recipe
    assert replace(recipe, settings={"schedule": "step"}) != recipe
    with pytest.raises(TypeError, match="is not JSON serializable"):
        Recipe("x", "LeNet", options={"init": nn.ReLU()})


# --- tables and statistics ------------------------------------------------------------

SCORES = {0.1: (0.5, 0.5), 0.2: (0.9, 0.9), 0.4: (0.6, 0.6)}


def made_by_hand(scores, finals=()):
    """A comparison of one recipe from tuning scores by rate, and final accuracies."""
    recipes = {"x": Recipe("x", "DigitsNet")}
    found = Comparison(recipes, "data", [0.1, 0.2, 0.4], [8, 9], [0, 1, 2])
    cells = [("tune", lr, 8 + n, v) for lr in scores for n, v in enumerate(scores[lr])]
    cells += [("final", 0.2, seed, value) for seed, value in enumerate(finals)]
    runs, curves = [], []
    for phase, lr, seed, value in cells:
        key = dict(zip(CELL, ("x", phase, lr, seed), strict=True))
        run = dict.fromkeys(RUN_COLUMNS, 1.0) | key
        status = "finished" if value > 0 else "diverged"  # as a score below 0 says
        run |= {"status": status, "validation_accuracy": abs(value)}
        runs.append(run | {"test_accuracy": abs(value) / 2, "seconds": 10.0 * seed})
        for epoch, part in ((1, 0.5), (2, 1.0), (3, 0.9)):
            measures = {"epoch": epoch, "validation_accuracy": part * abs(value)}
            curves.append(key | measures)
    found.add(runs, curves, [])
    return found


def test_best_is_the_best_mean_among_the_rates_that_always_finished():
    scores = {0.1: (0.5, 0.7), 0.2: (0.9, 0.4), 0.4: (0.6, 0.6)}
    assert made_by_hand(scores).best == {"x": 0.2}
    broken = scores | {0.2: (0.95, -0.94), 0.05: (0.1, 0.1)}
    assert made_by_hand(broken).best == {"x": 0.1}
    assert made_by_hand(dict.fromkeys(scores, (-0.5, 0.5))).missing() == []


def test_a_best_rate_at_the_edge_asks_for_the_next_one_beyond():
    rising = {0.1: (0.5, 0.5), 0.2: (0.6, 0.6), 0.4: (0.7, 0.7)}
    found = made_by_hand(rising)
    assert found.best == {"x": None}
    assert found.missing() == [("x", "tune", 0.8, 8), ("x", "tune", 0.8, 9)]
    assert made_by_hand(rising | {0.8: (0.7, 0.7)}).best == {"x": 0.4}, "no better"
    assert made_by_hand(rising | {0.8: (0.9, -0.9)}).best == {"x": 0.4}, "diverged"
    alike = {lr: (0.1, 0.1) for lr in (0.1, 0.2, 0.4)}
    assert made_by_hand(alike).missing()[0] == ("x", "tune", 0.05, 8)
    smaller = (0.05, 0.025, 0.0125, 0.00625, 0.00313, 0.00157, 0.000788)
    less = dict.fromkeys(smaller, (0.1, 0.1))
    assert made_by_hand(alike | less).missing()[0][1] == "final", "there is an end"
    falling = {0.1: (0.7, 0.7), 0.2: (0.6, 0.6), 0.4: (0.5, 0.5)}
    assert made_by_hand(falling).missing()[0] == ("x", "tune", 0.05, 8)
    assert made_by_hand(falling | {0.05: (0.1, 0.1)}).best == {"x": 0.1}


def test_tune_epochs_shorten_the_trainings_that_tune(trained):
    plan = ONE | {"rates": [1e-3, 1e-2, 1.0], "tune_epochs": 1}
    found = compare(RECIPES[:1], SMALL, **plan)
    assert set(found.runs.query("phase == 'tune'").epochs) == {1}
    assert set(found.runs.query("phase == 'final'").epochs) == {2}


def test_table_is_what_one_computes_by_hand():
    row = made_by_hand(SCORES, finals=(0.8, 0.6, -0.7)).table().loc["x"]
    assert (row.lr, row.n, row.diverged) == (0.2, 2, 1)
    assert (row.test, row.validation) == pytest.approx((0.35, 0.7))
    deviations = (row.test_std * 2**0.5, row.validation_std * 2**0.5)
    assert deviations == pytest.approx((0.1, 0.2))
    assert row.seconds == 5
    assert made_by_hand(SCORES | {0.4: (1.0, 1.0)}).table().n["x"] == 0
    more = made_by_hand(SCORES, finals=(0.8, 0.6, 0.7, 0.1))
    assert list(more.finals.seed) == [0, 1, 2], "the fourth is not planned"
    more.rates = [0.1, 0.4]
    assert len(more.finals) == 0


def test_against_is_the_difference_of_test_accuracies_seed_by_seed(folder):
    found = Comparison.load(folder)
    tests = found.finals.set_index(["recipe", "seed"]).test_accuracy
    first, second = (100 * (tests["canonical", n] - tests["none", n]) for n in (0, 1))
    row = found.against("none").loc["canonical"]
    assert row["mean"] == pytest.approx((first + second) / 2)
    deviation = abs(first - second) / 2**0.5
    assert row.half == pytest.approx(12.706 * deviation / 2**0.5, rel=1e-4)
    assert row.n == 2 and row.told_apart == (abs(row["mean"]) > row.half)


@pytest.mark.parametrize(
    ("values", "told_apart"),
    [([1.1, 2.2, 3.3], False), ([1.1, 2.15, 3.1], True), ([0.2, 0.9, 2.2], True)],
    ids=["t=3.46", "t=7", "t=-9"],  # the bound is 4.30
)
def test_paired_difference_is_students_interval(values, told_apart):
    found = paired_difference(values, [1, 2, 3])
    interval = stats.ttest_rel(values, [1, 2, 3]).confidence_interval(0.95)
    ends = (found.mean - found.half, found.mean + found.half)
    assert ends == pytest.approx((interval.low, interval.high))
    assert found.told_apart is told_apart and found.n == 3
    assert paired_difference([2.0], [1.0]).told_apart is False
    assert f", n = 3, {'' if told_apart else 'not '}told apart" in str(found)


def test_paired_difference_pairs_series_by_seed():
    values = pd.Series({0: 1.0, 1: 2.0, 2: None, 5: 9.0})
    reference = pd.Series({1: 1.0, 0: 0.5, 2: 3.0})
    found = paired_difference(values, reference)
    assert (found.n, found.mean) == (2, 0.75)
    scale = stats.t.ppf(0.975, 1)
    assert found.half == pytest.approx(scale * 0.25)  # deviation 0.3536, over √2


@pytest.mark.parametrize("seeds", [(0, 1), (0, 0)], ids=["others", "same"])
def test_two_comparisons_that_write_one_record_lose_nothing(tmp_path, seeds):
    def run(seed):
        plan = ONE | {"seeds": [seed], "path": tmp_path}
        return compare(RECIPES[:1], SMALL, **plan)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, seeds))
    found = Comparison.load(tmp_path)
    assert sorted(found.runs.seed) == sorted({*seeds})
    assert len(found.curves) == SETTINGS["epochs"] * len({*seeds})
