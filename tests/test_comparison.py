"""Comparisons: cells run once, survive, and the test split is read last."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import cpnb
from cpnb import Comparison, Recipe, compare, comparison, load_data
from cpnb._compare import cells as cells_module
from cpnb._compare import running
from cpnb._compare.record import Cell, Record

SETTINGS = {"epochs": 2, "batch_size": 64}
RECIPES = (
    Recipe("none", "DigitsNet", settings=SETTINGS),
    Recipe("canonical", "DigitsNet", "canonical", {"rank": 4}, settings=SETTINGS),
)
SMALL = partial(load_data, train_size=128)
PLAN = {"seeds": (0, 1), "tune": {"lr": (1e-3, 1e-2)}, "progress": False}


def explode(network):
    """A normalizer under which the loss is never finite."""
    with torch.no_grad():
        network.fc2.bias.fill_(torch.nan)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The records of a whole comparison; not to be changed."""
    made = tmp_path_factory.mktemp("whole")
    compare(RECIPES, SMALL, **PLAN, results=made)
    return made


def without_times(comparison):
    """Everything that does not depend on when and where it was made."""
    gone = ("seconds", "start_seconds", "provenance")
    return {
        name: sorted(
            json.dumps({key: cell[key] for key in cell if key not in gone})
            for cell in record.cells
        )
        for name, record in comparison.records.items()
    }


def refuse(task):
    raise AssertionError("a finished cell ran again")


@pytest.fixture
def epochs(monkeypatch):
    """The epochs that are trained: each takes a second, and nothing else any time."""
    clock, seen, stop_in_time = 0.0, [], cells_module._stop_in_time

    def one_second(task, epoch, *rest):
        nonlocal clock
        clock += 1
        seen.append(epoch)
        stop_in_time(task, epoch, *rest)

    monkeypatch.setattr(cells_module, "_stop_in_time", one_second)
    monkeypatch.setattr(cells_module.time, "time", lambda: clock)
    return seen


# --- what is run ----------------------------------------------------------------------


def test_compare_tunes_then_tests_fresh_seeds_at_the_best_rate(folder):
    found = Comparison.load(folder, ["none", "canonical"])
    assert list(found.records) == ["none", "canonical"]
    for record in found.records.values():
        phases = [(cell["phase"], cell["lr"], cell["seed"]) for cell in record.cells]
        lr = record.best[0]
        wanted = [("tune", 1e-3, 100), ("tune", 1e-2, 100)]
        assert sorted(phases) == sorted([*wanted, ("test", lr, 0), ("test", lr, 1)])
        assert record.is_complete


def test_compare_is_the_training_that_fit_does(folder):
    record = Comparison.load(folder).records["canonical"]
    cell, data = record.tested[1], SMALL()
    network = RECIPES[1].build(data, 1)
    before = cpnb.evaluate(network, data)["loss"]
    run = cpnb.fit(network, data, **SETTINGS, lr=cell["lr"], seed=1, progress=False)
    assert cell["start_validation_loss"] == round(before, 5)
    for name in ("train_loss", "validation_accuracy"):
        assert cell[name] == [round(epoch[name], 5) for epoch in run.history]
    assert cell["test_accuracy"] == round(cpnb.accuracy(network, data.test), 5)


def test_compare_reads_the_test_split_once_per_network_after_its_training(monkeypatch):
    seen, trained = [], []
    accuracy, fit = cells_module.accuracy, cells_module.fit

    def spy(network, data, **options):
        seen.append((id(network), len(trained), data))
        return accuracy(network, data, **options)

    def note(networks, data, **options):
        runs = fit(networks, data, **options)
        trained.extend(map(id, networks))
        return runs

    monkeypatch.setattr(cells_module, "accuracy", spy)
    monkeypatch.setattr(cells_module, "fit", note)
    data = SMALL()
    compare(RECIPES, data, **PLAN)
    # Four tuning cells come first; then each network is tested after its own training.
    assert [place for _, place, _ in seen] == [5, 6, 7, 8]
    assert [network for network, *_ in seen] == trained[4:]
    assert all(split.images.equal(data.test.images) for *_, split in seen)


def test_compare_without_tune_trains_at_the_recipes_own_rate():
    recipe = replace(RECIPES[0], settings={**SETTINGS, "lr": 0.02, "epochs": 1})
    record = compare([recipe], SMALL(), seeds=[3], progress=False).records["none"]
    assert [Cell(*list(cell.values())[:4]) for cell in record.cells] == [
        Cell("test", 0.02, 0.0, 3)
    ]


def test_compare_tunes_the_weight_decay_too():
    recipe = replace(RECIPES[0], settings={**SETTINGS, "epochs": 1})
    tune = {"lr": [1e-3], "weight_decay": [0.0, 10.0]}
    found = compare([recipe], SMALL(), seeds=[0], tune=tune, progress=False)
    record = found.records["none"]
    assert {cell["weight_decay"] for cell in record.cells} == {0.0, 10.0}
    assert record.best == (1e-3, 0.0), "a decay of 10 leaves nothing"


def test_compare_gives_the_same_when_networks_train_together(folder, tmp_path):
    calls = []
    fit = cells_module.fit

    def note(networks, data, **options):
        calls.append(len(networks))
        return fit(networks, data, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells_module, "fit", note)
        found = compare(RECIPES, SMALL, **PLAN, results=tmp_path, together=8)
    # For each recipe two rates at once, then two seeds at once.
    assert calls == [2, 2, 2, 2]
    assert without_times(found) == without_times(Comparison.load(folder))
    assert len(list(tmp_path.iterdir())) == 2, "nothing unfinished is left"


def test_compare_records_which_networks_trained_in_one_graph():
    settings = {**SETTINGS, "epochs": 1, "vectorise": True}
    recipe = replace(RECIPES[0], settings=settings)
    alone = replace(RECIPES[0], settings={**SETTINGS, "epochs": 1})
    plan = {"seeds": [0, 1], "progress": False}
    found = compare([recipe], SMALL, **plan, together=2).records["none"]
    expected = compare([alone], SMALL, **plan).records["none"]
    assert [cell["together"] for cell in found.cells] == [2, 2]
    assert [cell["together"] for cell in expected.cells] == [1, 1]
    for cell, other in zip(found.cells, expected.cells, strict=True):
        assert cell["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)


def test_compare_measures_more_where_a_recipe_asks():
    recipe = replace(RECIPES[0], measure=lambda network, data, seed: {"seed": seed})
    record = compare([recipe], SMALL(), **PLAN).records["none"]
    assert [cell["measured"] for cell in record.tested] == [{"seed": 0}, {"seed": 1}]
    assert all(
        "measured" not in cell for cell in record.cells if cell["phase"] == "tune"
    )


def test_compare_records_each_network_once_it_is_measured(tmp_path):
    calls = []

    def measure(network, data, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"seed": seed}

    recipe = replace(RECIPES[0], measure=measure)
    plan = {**PLAN, "results": tmp_path, "together": 8}
    with pytest.raises(KeyboardInterrupt):
        compare([recipe], SMALL, **plan)
    (cell,) = Comparison.load(tmp_path).records["none"].tested
    assert cell["measured"] == {"seed": 0}
    assert compare([recipe], SMALL, **plan).is_complete
    assert calls == [0, 1, 1], "the second network in two attempts"


def test_compare_gives_each_training_hooks_of_its_own():
    made = []

    class Counting(cpnb.hooks.Hook):
        def __init__(self):
            made.append(self)
            self.steps = 0

        def after_step(self, model, optimizer, step):
            self.steps += 1

    recipe = replace(RECIPES[0], hooks=(Counting,))
    compare([recipe], SMALL(), seeds=[0, 1], progress=False)
    assert [hook.steps for hook in made] == [4, 4]  # 2 epochs of 128 images by 64


# --- failure --------------------------------------------------------------------------


def test_a_nan_run_is_recorded_as_failed_and_never_wins():
    recipes = [replace(RECIPES[0], settings={**SETTINGS, "epochs": 1})]
    tune = {"lr": (1e-3, 1e30)}
    record = compare(recipes, SMALL(), seeds=[0], tune=tune, progress=False).records[
        "none"
    ]
    status = {cell["lr"]: cell["status"] for cell in record.cells}
    assert status == {1e-3: "finished", 1e30: "diverged"}
    assert record.best == (1e-3, 0.0)
    (failed,) = record.at("tune", (1e30, 0.0))
    assert failed["test_accuracy"] is None
    json.dumps(failed, allow_nan=False)


def test_a_recipe_that_always_diverges_fails_alone():
    recipes = [RECIPES[0], Recipe("bad", "DigitsNet", explode, settings=SETTINGS)]
    found = compare(recipes, SMALL(), **PLAN)
    good, bad = found.rows()
    assert good["n"] == 2
    assert bad["n"] == 0 and bad["lr"] is None and bad["test"] is None
    assert found.is_complete
    assert "none works" in repr(found)
    assert list(found.runs()) == ["none"]


def test_a_test_network_that_diverges_is_counted_and_not_read(monkeypatch):
    recipe = Recipe("bad", "DigitsNet", explode, settings=SETTINGS)
    found = compare([recipe], SMALL(), seeds=[0], progress=False)
    (row,) = found.rows()
    assert (row["n"], row["diverged"], row["test"]) == (0, 1, None)
    (cell,) = found.records["bad"].tested
    assert cell["start_validation_loss"] is None and cell["train_loss"] == []


# --- stopping and going on ------------------------------------------------------------


def test_compare_never_runs_a_finished_cell_again(folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(running, "train", refuse)
    compare(RECIPES, SMALL, **PLAN, results=folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_compare_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch, stop):
    train, count = running.train, 0

    def stops(task):
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        return train(task)

    monkeypatch.setattr(running, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        compare(RECIPES, SMALL, **PLAN, results=tmp_path)
    kept = [json.loads(path.read_text())["cells"] for path in tmp_path.iterdir()]
    assert sum(map(len, kept)) == stop - 1
    found = compare(RECIPES, SMALL, **PLAN, results=tmp_path)
    assert count == 8 + 1, "eight cells, one of them in two attempts"
    assert without_times(found) == without_times(Comparison.load(folder))


def test_compare_starts_nothing_after_its_limit(tmp_path):
    found = compare(RECIPES, SMALL, **PLAN, results=tmp_path, limit=0)
    assert not found.is_complete
    assert all(row["n"] == 0 and row["lr"] is None for row in found.rows())
    assert "none works" not in repr(found), "nothing is known yet"
    assert list(tmp_path.iterdir()) == []


def test_compare_goes_on_within_a_cell_that_ran_out_of_time(tmp_path, epochs):
    recipe = replace(RECIPES[1], settings={**SETTINGS, "epochs": 4})
    plan = {"seeds": [0], "progress": False}
    whole = compare([recipe], SMALL, **plan)
    epochs.clear()
    stopped = compare([recipe], SMALL, **plan, results=tmp_path, limit=2)
    assert stopped.records["canonical"].cells == []
    found = compare([recipe], SMALL, **plan, results=tmp_path, limit=2)
    # The epoch in which the time ran out is kept; the last one ends the cell anyway.
    assert epochs == [1, 2, 3, 4]
    assert without_times(found) == without_times(whole)
    (cell,) = found.records["canonical"].cells
    assert cell["provenance"]["resumed_after"] == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["canonical.json"]


def test_compare_goes_on_by_an_epoch_when_its_limit_is_shorter(tmp_path, epochs):
    recipe = replace(RECIPES[0], settings={**SETTINGS, "epochs": 3})
    plan = {"seeds": [0, 1], "together": 2, "results": tmp_path, "progress": False}
    # Two networks, one after the other: of each the last epoch ends it in time.
    for done in ([1], [1, 2], [1, 2, 3, 1], [1, 2, 3, 1, 2], [1, 2, 3, 1, 2, 3]):
        found = compare([recipe], SMALL, **plan, limit=0.5)
        assert epochs == done
    assert found.is_complete
    resumed = [
        cell["provenance"]["resumed_after"] for cell in found.records["none"].cells
    ]
    assert resumed == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("options", "data"),
    [({"init": "unified"}, SMALL), ({"init": "gaussian"}, partial(SMALL, seed=1))],
    ids=["recipe", "data"],
)
def test_compare_goes_on_with_no_training_of_something_else(
    options, data, tmp_path, epochs
):
    recipe = replace(RECIPES[1], options={"rank": 4, "init": "gaussian"})
    recipe = replace(recipe, settings={**SETTINGS, "epochs": 3})
    plan = {"seeds": [0], "results": tmp_path, "progress": False}
    assert not compare([recipe], SMALL, **plan, limit=2).is_complete
    other = replace(recipe, options={"rank": 4, **options})
    found = compare([other], data, **plan)
    assert epochs == [1, 2, 1, 2, 3]
    (cell,) = found.records["canonical"].cells
    assert "resumed_after" not in cell["provenance"]


def test_compare_keeps_the_folder_of_a_training_when_another_ends(
    tmp_path, monkeypatch
):
    one_is_recorded, fit = threading.Event(), cells_module.fit
    first = iter([True])

    def waits(*arguments, **options):
        if next(first, False):  # its folder is made, its first state not written
            assert one_is_recorded.wait(60)
        return fit(*arguments, **options)

    def forget(task):
        cells_module.forget(task)
        one_is_recorded.set()

    monkeypatch.setattr(cells_module, "fit", waits)
    monkeypatch.setattr(comparison, "forget", forget)
    # Two threads stand for two processes, which do not wait for each other.
    monkeypatch.setattr(cells_module, "_alone", contextlib.nullcontext())
    with ThreadPoolExecutor(2) as pool:
        found = compare(RECIPES, SMALL, **PLAN, results=tmp_path, executor=pool)
    assert found.is_complete
    assert not (tmp_path / "unfinished").exists()


def test_compare_takes_more_seeds_and_values_later(folder, tmp_path, monkeypatch):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    train, cells = running.train, []

    def note(task):
        cells.extend(task.cells)
        return train(task)

    monkeypatch.setattr(running, "train", note)
    wider = {**PLAN, "seeds": (0, 1, 2), "tune": {"lr": (1e-6, 1e-3, 1e-2)}}
    found = compare(RECIPES[:1], SMALL, **wider, results=tmp_path)
    best = found.records["none"].best
    assert cells == [Cell("tune", 1e-6, 0.0, 100), Cell("test", *best, 2)]


def test_compare_keeps_finished_futures_when_it_is_interrupted(tmp_path):
    class Cluster:
        """Runs everything at once; the second result cannot be had."""

        def __init__(self):
            self.futures = []

        def submit(self, function, task):
            future = Future()
            future.set_running_or_notify_cancel()
            if len(self.futures) == 1:
                future.set_exception(KeyboardInterrupt())
            else:
                future.set_result(function(task))
            self.futures.append(future)
            return future

    with pytest.raises(KeyboardInterrupt):
        compare(RECIPES, SMALL, **PLAN, results=tmp_path, executor=Cluster())
    kept = [json.loads(path.read_text())["cells"] for path in tmp_path.iterdir()]
    assert sum(map(len, kept)) == 3, "of four tuning cells one was interrupted"


SCRIPT = """
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import test_comparison as here

if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        plan = {**here.PLAN, "seeds": range(99), "results": sys.argv[1]}
        here.compare(here.RECIPES, here.SMALL, **plan, executor=pool)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a signal to a group")
def test_ctrl_c_ends_all_processes_and_keeps_what_they_finished(tmp_path):
    script, results = tmp_path / "script.py", tmp_path / "results"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(script), str(results)]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        while not list(results.glob("*.json")) and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    kept = Comparison.load(results)
    cells = sum(len(record.cells) for record in kept.records.values())
    assert 1 <= cells < 202
    again = compare(RECIPES, SMALL, **PLAN, results=results)
    assert again.is_complete


def test_train_hands_an_interrupt_on(monkeypatch):
    fit = cells_module.fit

    def interrupted(*arguments, **options):
        runs = fit(*arguments, **options)
        runs[0].status = "interrupted"
        return runs

    monkeypatch.setattr(cells_module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(RECIPES, SMALL, **PLAN)


@pytest.mark.parametrize(
    ("recipe", "data", "what"),
    [
        (replace(RECIPES[0], settings={"epochs": 3}), SMALL, "recipe"),
        (RECIPES[0], partial(load_data, train_size=129), "data"),
    ],
)
def test_compare_refuses_a_record_of_something_else(folder, recipe, data, what):
    with pytest.raises(ValueError, match=f"was made with another {what}"):
        compare([recipe], data, **PLAN, results=folder)


# --- executors ------------------------------------------------------------------------


def test_compare_gives_the_same_in_threads(folder, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        found = compare(RECIPES, SMALL, **PLAN, results=tmp_path, executor=pool)
    assert without_times(found) == without_times(Comparison.load(folder))
    assert without_times(Comparison.load(tmp_path)) == without_times(found)


def test_compare_trains_one_cell_at_a_time_in_a_process(monkeypatch):
    fit, inside, most = cells_module.fit, [], []

    def watched(*arguments, **options):
        inside.append(1)
        most.append(len(inside))
        try:
            return fit(*arguments, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(cells_module, "fit", watched)
    with ThreadPoolExecutor(3) as pool:
        compare(RECIPES, SMALL, seeds=range(3), executor=pool, progress=False)
    assert most == [1] * 6


@pytest.mark.slow
def test_compare_gives_the_same_in_other_processes(folder):
    threads = torch.get_num_threads()  # they decide the order in which sums are added
    with ProcessPoolExecutor(
        2, get_context("spawn"), torch.set_num_threads, (threads,)
    ) as pool:
        found = compare(RECIPES, SMALL, **PLAN, executor=pool)
    assert without_times(found) == without_times(Comparison.load(folder))


@pytest.mark.slow
def test_compare_gives_the_same_on_a_dask_cluster(folder):
    distributed = pytest.importorskip("distributed")
    threads = torch.get_num_threads()
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.run(torch.set_num_threads, threads)
        found = compare(RECIPES, SMALL, **PLAN, executor=client.get_executor())
    assert without_times(found) == without_times(Comparison.load(folder))


# --- arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": []}, r"recipes have the names \[\], expected at least one"),
        ({"recipes": RECIPES[:1] * 2}, r"\['none', 'none'\], .* each once"),
        ({"seeds": []}, r"seeds is \[\], expected at least one"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\], expected .* each once"),
        ({"seeds": [-1]}, r"seeds is -1, expected at least 0"),
        ({"seeds": [0, 100]}, r"tune_seeds shares \[100\] with seeds"),
        ({"tune": {"momentum": [0.9]}}, r"tune names \['momentum'\], expected 'lr' or"),
        ({"tune": {"lr": []}}, r"tune\['lr'\] is \[\], expected one or more numbers"),
        ({"tune": {"lr": [float("nan")]}}, r"tune\['lr'\] is \[nan\]"),
        ({"tune": {"lr": [0.01, 0.01]}}, r"tune\['lr'\] is .* above 0, each once"),
        ({"tune": {"lr": [0, 0.01]}}, r"tune\['lr'\] is \[0.0, 0.01\], .* above 0"),
        ({"together": 0}, "together is 0, expected at least 1"),
        ({"limit": float("nan")}, "limit is nan, expected a finite number"),
    ],
)
def test_compare_refuses_what_cannot_be_run(changes, message):
    with pytest.raises(ValueError, match=message):
        compare(**{"recipes": RECIPES, "data": SMALL, **PLAN} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": torch.zeros(2)}, "data is a Tensor, expected a data set or a funct"),
        ({"data": "digits"}, "data is a str, expected a data set or a function"),
        ({"seeds": 3}, r"seeds is 3, expected a list, such as range\(5\)"),
        ({"tune": {"lr": 0.1}}, r"tune\['lr'\] is 0.1, expected a list"),
        ({"executor": 2}, "executor is a int, expected a concurrent.futures.Executor"),
    ],
)
def test_compare_refuses_arguments_of_another_type(changes, message):
    with pytest.raises(TypeError, match=message):
        compare(**{"recipes": RECIPES, "data": SMALL, **PLAN} | changes)


@pytest.mark.parametrize("value", [torch.tensor(1.0), float("nan")])
def test_compare_names_a_measure_whose_result_no_record_can_hold(tmp_path, value):
    recipe = replace(RECIPES[0], measure=lambda network, data, seed: {"x": value})
    with pytest.raises(TypeError, match=r"measure of recipe 'none' returned {'x': "):
        compare([recipe], SMALL, seeds=[0], results=tmp_path, progress=False)


def test_compare_tells_data_sets_with_other_labels_apart(tmp_path):
    data = SMALL()
    compare(RECIPES[:1], data, seeds=[0], results=tmp_path, progress=False)
    labels = data.train.labels.roll(1)
    other = replace(data, train=replace(data.train, labels=labels))
    assert repr(other) == repr(data)
    with pytest.raises(ValueError, match="was made with another data"):
        compare(RECIPES[:1], other, seeds=[0], results=tmp_path, progress=False)


def test_compare_loads_each_of_two_functions_that_look_alike():
    def holds(size):
        def load():
            return load_data(train_size=size)

        found = compare(RECIPES[:1], load, seeds=[0], progress=False)
        return found.records["none"].data["images"][0]

    assert [holds(size) for size in (128, 64)] == [128, 64]


# --- records and the table ------------------------------------------------------------


def test_record_survives_its_file(folder, tmp_path):
    record = Record.load(folder / "canonical.json")
    record.save(tmp_path / "deeper" / "again.json")
    text = (tmp_path / "deeper" / "again.json").read_text()
    assert text == (folder / "canonical.json").read_text()
    assert len(text.splitlines()) < 80, "one line per cell"


def test_record_carries_its_provenance(tmp_path):
    note = {"command": "make it", "remark": "upside down"}
    found = compare(
        RECIPES[:1], SMALL, seeds=[0], results=tmp_path, note=note, progress=False
    )
    record = Record.load(tmp_path / "none.json")
    assert record == found.records["none"]
    (cell,) = record.cells
    assert note.items() <= cell["provenance"].items()
    assert cell["provenance"]["versions"]["cpnb"] == cpnb.__version__
    assert {"date", "device", "machine", "threads", "commit"} <= cell[
        "provenance"
    ].keys()
    assert record.data["source"]["call"] == "cpnb.load_data"
    assert record.data["holds"] == repr(SMALL())
    assert record.data["images"] == [128, 359, 359]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": "other"}',
        '{"format": "cpnb comparison", "version": 2}',
        '{"format": "cpnb comparison", "version": 1, "cells": []}',
    ],
)
def test_record_names_a_file_that_holds_none(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Record.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda read: read.update(cells=None),
        lambda read: read.update(cells=[{}]),
        lambda read: read.update(recipe="x"),
        lambda read: read["plan"].pop("tune"),
        lambda read: read["cells"][-1].pop("lr"),
        lambda read: read["cells"][-1].pop("test_accuracy"),
        lambda read: read["cells"][-1].update(test_accuracy="0.9"),
        lambda read: read["cells"][-1].update(status="weird"),
        lambda read: read["cells"][-1].update(validation_accuracy=[]),
        lambda read: read["cells"][-1].update(lr="0.01"),
        lambda read: read["data"].pop("source"),
    ],
)
def test_record_names_a_file_that_was_damaged(folder, tmp_path, damage):
    read = json.loads((folder / "none.json").read_text())
    assert read["cells"][-1]["phase"] == "tune"
    read["cells"].reverse()  # last one that was tested
    damage(read)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(read))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        Record.load(path)


def test_record_leaves_the_old_file_when_it_cannot_be_written(folder, tmp_path):
    record = Record.load(folder / "none.json")
    record.save(path := tmp_path / "none.json")
    before = path.read_bytes()
    record.cells[0]["train_loss"] = [float("nan")]
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def record_of(scores, status="finished"):
    """A record of tuning cells alone: final accuracies by rate and seed."""
    cells = [
        {
            **Cell("tune", lr, 0.0, seed)._asdict(),
            "status": status if score < 0 else "finished",
            "validation_accuracy": [abs(score)],
        }
        for lr, row in scores.items()
        for seed, score in enumerate(row)
    ]
    tune = {"lr": [0.1, 0.2], "weight_decay": [0.0]}
    plan = {"tune": tune, "tune_seeds": [0, 1], "seeds": [7]}
    return Record({"name": "x"}, plan, {}, cells)


def test_record_takes_the_best_mean_of_the_values_that_always_finished():
    assert record_of({0.1: (0.5, 0.7), 0.2: (0.9, 0.4)}).best == (0.2, 0.0)
    assert record_of({0.1: (0.5, 0.7), 0.2: (0.9, 0.2)}).best == (0.1, 0.0)
    # A negative score here stands for a run that diverged.
    diverged = {0.1: (0.5, 0.7), 0.2: (0.9, -0.9)}
    assert record_of(diverged, "diverged").best == (0.1, 0.0)
    assert record_of({0.1: (-1, 0.7), 0.2: (0.9, -0.9)}, "diverged").best is None


def test_record_is_not_tuned_before_its_last_tuning_cell():
    record = record_of({0.1: (0.5, 0.7), 0.2: (0.9,)})
    assert record.best is None and record.tested == []
    assert record.missing("tune") == [Cell("tune", 0.2, 0.0, 1)]
    assert record.missing("test") == []
    assert not record.is_complete


def test_record_counts_no_network_whose_seed_is_not_planned():
    record = record_of({0.1: (0.5, 0.7), 0.2: (0.9, 0.4)})
    record.cells += [Cell("test", 0.2, 0.0, seed)._asdict() for seed in (8, 7)]
    assert [cell["seed"] for cell in record.tested] == [7]


def test_rows_are_means_over_the_tested_networks(folder):
    found = Comparison.load(folder)
    row = {row["recipe"]: row for row in found.rows()}["none"]
    cells = found.records["none"].tested
    tests = torch.tensor([cell["test_accuracy"] for cell in cells], dtype=torch.double)
    assert row["test"] == pytest.approx((tests.mean().item(), tests.std().item()))
    seconds = [sum(cell["seconds"]) for cell in cells]
    assert row["seconds"] == pytest.approx(sum(seconds) / 2)
    speeds = [2 * 128 / s for s in seconds]  # two epochs of 128 images
    assert row["images_per_second"] == pytest.approx(sum(speeds) / 2)
    peaks = [1 + torch.tensor(c["validation_accuracy"]).argmax().item() for c in cells]
    assert row["best_epoch"] == sum(peaks) / 2


def test_comparison_shows_a_table(folder):
    found = Comparison.load(folder, ["none", "canonical", "no such recipe"])
    head, *lines = repr(found).splitlines()
    assert head.startswith("recipe") and len(lines) == 2
    assert re.match(r"none +0\.0\d+ .*\d\d\.\d\d% ± \d\.\d\d +2 ", lines[0])
    assert found._repr_html_().count("<tr>") == 3


def test_comparison_gives_runs_to_draw(folder):
    runs = Comparison.load(folder).runs()
    assert [run.recipe["seed"] for run in runs["none"]] == [0, 1]
    assert [record["epoch"] for record in runs["none"][0].history] == [1, 2]


def test_comparison_says_when_a_folder_holds_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no record, expected RECIPE"):
        Comparison.load(tmp_path)
