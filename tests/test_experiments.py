"""Experiments: cells run once, the record survives, the test split is read last."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cpnb
from cpnb import experiments
from cpnb._experiments import cells as cells_module
from cpnb._experiments.cells import Cell, run_cell, tuning_cells
from cpnb._experiments.record import missing, record_path, write_record
from cpnb.data import Dataset, Split
from cpnb.experiments import (
    EXPERIMENTS,
    RESULTS,
    STARTS,
    read_record,
    run_experiment,
    runs,
    select,
    status_text,
    tuned_rates,
)

TINY = replace(
    EXPERIMENTS["initialization-mnist"],
    starts=("unified", "power"),
    ranks={"conv1": 2, "conv2": 3, "fc1": 2, "fc2": 2},
    rates=(1e-3, 1e-2),
    seeds=(0, 1),
    epochs=1,
    batch_size=20,
)


@pytest.fixture
def tiny_data(monkeypatch):
    """Forty random images instead of MNIST."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        shape = (count, 1, 28, 28)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(count) % 10, mean=(127.5,), std=(73.9,))

    data = Dataset(
        name="mnist",
        train=split(40),
        validation=split(10),
        test=split(10),
        classes=tuple("0123456789"),
        licence="none",
        seed=0,
    )
    monkeypatch.setattr(cells_module, "experiment_data", lambda *_: data)
    monkeypatch.setattr(experiments, "experiment_data", lambda *_: data)
    return data


@pytest.fixture
def made(tiny_data, tmp_path):
    """A complete record in a folder."""
    run_experiment(TINY, tmp_path)
    return tmp_path


def without_times(record):
    cells = []
    for cell in record["cells"]:
        gone = ("seconds", "start_seconds", "provenance")
        cells.append({name: cell[name] for name in cell if name not in gone})
    return cells


def test_run_experiment_fills_every_cell_once(made):
    record = read_record(record_path(made, TINY.name))
    found = [(c["phase"], c["start"], c["lr"], c["seed"]) for c in record["cells"]]
    assert len(found) == len(set(found)) == 2 * (2 * 1 + 2)
    rates = tuned_rates(record)
    for start in TINY.starts:
        assert {c["lr"] for c in select(record, phase="test", start=start)} == {
            rates[start]
        }


def test_run_experiment_never_runs_a_finished_cell_again(made, monkeypatch):
    path = record_path(made, TINY.name)
    before = path.read_bytes()

    def refuse(*_):
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(experiments, "run_cell", refuse)
    run_experiment(TINY, made)
    assert path.read_bytes() == before


def test_run_experiment_goes_on_where_it_stopped(made, tmp_path_factory, monkeypatch):
    whole = read_record(record_path(made, TINY.name))
    folder, count = tmp_path_factory.mktemp("stopped"), 0

    def stops_in_the_third(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return run_cell(*arguments)

    monkeypatch.setattr(experiments, "run_cell", stops_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(TINY, folder)
    assert len(read_record(record_path(folder, TINY.name))["cells"]) == 2
    run_experiment(TINY, folder)
    assert count == 3 + 6, "8 cells in all, the third in two attempts"
    again = read_record(record_path(folder, TINY.name))
    assert without_times(again) == without_times(whole)


def test_run_experiment_gives_the_same_with_an_executor(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("executor")
    with ThreadPoolExecutor(1) as pool:
        record = run_experiment(TINY, folder, executor=pool)
    whole = read_record(record_path(made, TINY.name))
    again = read_record(record_path(folder, TINY.name))
    assert without_times(again) == without_times(whole)
    assert len(record["cells"]) == 8


def test_run_experiment_reads_the_test_split_in_test_cells_only(
    tiny_data, tmp_path, monkeypatch
):
    seen = []
    original = cells_module.accuracy

    def spy(net, data):
        seen.append(data)
        return original(net, data)

    monkeypatch.setattr(cells_module, "accuracy", spy)
    for cell in tuning_cells(TINY):
        assert run_cell(TINY, cell)["test_accuracy"] is None
    assert seen == []
    found = run_cell(TINY, Cell("test", "unified", 1e-3, 0))
    assert len(seen) == 1
    assert seen[0].images.equal(tiny_data.test.images)
    assert 0 <= found["test_accuracy"] <= 1


def test_run_cell_carries_its_provenance(tiny_data):
    found = run_cell(TINY, Cell("tune", "unified", 1e-3, 0))
    assert found["provenance"]["versions"]["cpnb"] == cpnb.__version__
    assert found["provenance"]["versions"]["torch"] == torch.__version__
    assert {"date", "device", "threads", "commit"} <= found["provenance"].keys()


def test_run_cell_depends_on_its_seed_alone(tiny_data):
    first = run_cell(TINY, Cell("tune", "unified", 1e-3, 0))
    torch.randn(3)
    again = run_cell(TINY, Cell("tune", "unified", 1e-3, 0))
    other = run_cell(TINY, Cell("tune", "unified", 1e-3, 1))
    assert first["train_loss"] == again["train_loss"] != other["train_loss"]


def test_run_cell_records_a_divergence_as_failed(tiny_data):
    found = run_cell(TINY, Cell("test", "unified", 1e30, 0))
    assert found["status"] == "diverged"
    assert found["test_accuracy"] is None
    json.dumps(found, allow_nan=False)


def test_run_cell_hands_an_interrupt_on(tiny_data, monkeypatch):
    original = cells_module.fit

    def interrupted(*arguments, **options):
        run = original(*arguments, **options)
        run.status = "interrupted"
        return run

    monkeypatch.setattr(cells_module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cell(TINY, Cell("tune", "unified", 1e-3, 0))


def test_run_experiment_refuses_a_record_with_other_settings(made):
    with pytest.raises(ValueError, match="made with other settings"):
        run_experiment(replace(TINY, epochs=2), made)


def record_with(scores, statuses=None):
    """A record of tuning cells alone: scores by rate."""
    cells = [
        {
            "phase": "tune",
            "start": "unified",
            "lr": lr,
            "seed": 100,
            "status": (statuses or {}).get(lr, "finished"),
            "validation_accuracy": [score],
        }
        for lr, score in scores.items()
    ]
    wanted = {"starts": ["unified"], "rates": [0.1, 0.2, 0.3], "tuning_seeds": [100]}
    return {"settings": wanted, "cells": cells}


def test_tuned_rates_takes_the_best_finished_rate():
    scores = {0.1: 0.5, 0.2: 0.8, 0.3: 0.9}
    assert tuned_rates(record_with(scores)) == {"unified": 0.3}
    diverged = record_with(scores, {0.3: "diverged"})
    assert tuned_rates(diverged) == {"unified": 0.2}


def test_tuned_rates_refuses_what_is_not_tuned():
    with pytest.raises(ValueError, match=r"'unified' is not tuned yet at rate 0\.3"):
        tuned_rates(record_with({0.1: 0.5, 0.2: 0.8}))
    scores = dict.fromkeys((0.1, 0.2, 0.3), 0.5)
    failed = record_with(scores, dict.fromkeys(scores, "diverged"))
    with pytest.raises(ValueError, match="'unified' diverged at every rate"):
        tuned_rates(failed)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}'])
def test_read_record_names_a_file_that_holds_none(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_record(path)


def test_write_record_leaves_the_old_file_when_it_fails(made):
    path = record_path(made, TINY.name)
    before, record = path.read_bytes(), read_record(path)
    record["cells"].append({"phase": "x", "start": "x", "lr": float("nan"), "seed": 0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(record, path)
    assert path.read_bytes() == before
    assert [file.name for file in made.iterdir()] == [path.name]


def test_runs_are_what_plot_training_takes(made):
    record = read_record(record_path(made, TINY.name))
    found = runs(record, phase="test", start="unified")
    assert [run.recipe["seed"] for run in found] == [0, 1]
    cell = select(record, phase="test", start="unified")[1]
    assert found[1].history[0]["train_loss"] == cell["train_loss"][0]
    assert found[1].history[0]["epoch"] == 1


def test_status_text_says_what_is_outstanding(made, tmp_path_factory):
    assert status_text(made).count("**Outstanding**: never run") == 1
    assert "complete, 8 cells" in status_text(made)
    empty = status_text(tmp_path_factory.mktemp("empty"))
    assert empty.count("**Outstanding**: never run") == len(EXPERIMENTS)
    path = record_path(made, TINY.name)
    record = read_record(path)
    record["cells"].pop()
    write_record(record, path)
    assert "**outstanding**: not complete, 7 cells" in status_text(made)


def test_starts_of_every_experiment_are_known():
    for name, experiment in EXPERIMENTS.items():
        assert experiment.name == name
        assert set(experiment.starts) <= STARTS.keys()
        assert not set(experiment.seeds) & set(experiment.tuning_seeds)


def test_unified_small_has_the_variance_of_torchs_default():
    generator = torch.Generator().manual_seed(0)
    shape = (64, 32, 3, 3)
    lam, factors = STARTS["unified_small"](
        shape, 64, generator=generator, dtype=torch.float64
    )
    # n = 18,432 entries; components are independent, so that the relative spread of
    # the mean square is about 1 % (see test_initializers): five of them.
    variance = cpnb.cp_to_kernel(lam, factors).square().mean().item()
    assert variance * 3 * 32 * 9 == pytest.approx(1, abs=0.05)


def test_command_lists_and_says_status(capsys, tmp_path):
    experiments.main(["list"])
    assert all(
        f"{name}: " in capsys.readouterr().out for name in ["initialization-mnist"]
    )
    experiments.main(["status", "--results", str(tmp_path), "--write"])
    assert capsys.readouterr().out == (tmp_path / "README.md").read_text() + "\n"


def test_command_refuses_an_unknown_experiment(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["run", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no records beside an installed copy")
def test_committed_records_are_small_complete_and_listed():
    assert (RESULTS / "README.md").read_text() == status_text(RESULTS)
    for path in RESULTS.glob("*.json"):
        record = read_record(path)
        experiment = EXPERIMENTS[path.stem]
        assert path.stat().st_size < 200_000
        assert record["settings"] == experiments.settings(experiment)
        assert missing(tuning_cells(experiment), record) == []
        assert "tmp" not in path.read_text()
        assert not Path(record["command"]).is_absolute()
