"""Run records: JSON there and back, damaged files refused, provenance true."""

import json
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from cpnb import records
from cpnb.records import Run, provenance


def record(epoch, **changes):
    values = {
        "train_loss": 1.5 / epoch,
        "train_accuracy": 0.5,
        "validation_loss": 2.0,
        "validation_accuracy": 0.25,
        "seconds": 0.125,
    }
    return {"epoch": epoch, **values, **changes}


def example_run(**changes):
    fields = {
        "status": "finished",
        "history": [record(1), record(2, validation_loss=None)],
        "recipe": {"lr": 0.1, "momentum": None},
        "provenance": provenance(),
    }
    return Run(**{**fields, **changes})


def test_run_survives_json_text_and_file(tmp_path):
    run = example_run()
    assert Run.from_json(run.to_json()) == run
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_run_repr_names_status_time_and_last_accuracies():
    assert repr(example_run()) == (
        "Run(finished, 2 epochs in 0.2 s, train accuracy 50.0%, "
        "validation accuracy 25.0%)"
    )
    assert repr(example_run(history=[])) == "Run(finished, 0 epochs)"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"status": "done"}, "status is 'done', expected one of finished, interrupted"),
        ({"recipe": []}, "recipe is a list, expected a dict"),
        ({"provenance": None}, "provenance is a NoneType, expected a dict"),
        ({"history": {}}, "history is a dict, expected a list of dicts"),
        ({"history": [1]}, "history[0] has int, expected the keys ['epoch', 'seconds'"),
        ({"history": [{"epoch": 1}]}, "history[0] has ['epoch'], expected the keys"),
        ({"history": [record(2)]}, "history[0] is epoch 2, expected 1"),
        (
            {"history": [record(1), record(2, train_loss=float("nan"))]},
            "history[1]['train_loss'] is nan, expected a number",
        ),
        (
            {"history": [record(1, seconds="3")]},
            "history[0]['seconds'] is '3', expected a number",
        ),
        (
            {"history": [record(1, train_accuracy=None)]},
            "history[0]['train_accuracy'] is None, expected a number",
        ),
    ],
)
def test_run_refuses_malformed_fields(changes, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        example_run(**changes)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda run: "{", "text is no JSON (Expecting property name"),
        (lambda run: [run], "text has format None, expected 'cpnb run'"),
        (lambda run: run | {"format": "other"}, "text has format 'other', expected"),
        (lambda run: run | {"version": 2}, "run has version 2, expected 1. Repeat it"),
        (lambda run: run | {"extra": 0}, "run has the fields ['extra', 'history', "),
        (lambda run: run | {"status": 3}, "status is 3, expected one of finished"),
    ],
)
def test_run_load_names_the_file_and_what_is_wrong_in_it(tmp_path, damage, text):
    damaged = damage(json.loads(example_run().to_json()))
    path = tmp_path / "run.json"
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {text}")):
        Run.load(path)


def test_run_save_keeps_the_old_file_when_it_cannot_write_the_new_one(tmp_path):
    path = tmp_path / "run.json"
    run = example_run()
    run.save(path)
    run.history[0]["train_loss"] = float("inf")
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.save(path)
    assert Run.load(path).history[0]["train_loss"] == 1.5
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_provenance_describes_this_process():
    found = provenance("cpu")
    age = datetime.now(UTC) - datetime.fromisoformat(found["date"])
    assert timedelta(0) <= age < timedelta(minutes=5)
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found)) == found


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", folder, *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_provenance_names_the_commit_of_the_source_and_no_other(tmp_path, monkeypatch):
    source = tmp_path / "records.py"
    monkeypatch.setattr(records, "__file__", str(source))
    source.write_text("1")
    assert provenance()["commit"] is None  # no repository
    git(tmp_path, "init", "-q")
    Path(tmp_path, "other").write_text("1")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert provenance()["commit"] is None  # a repository that does not track it
    git(tmp_path, "add", "records.py")
    git(tmp_path, "commit", "-q", "-m", "second")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert provenance()["commit"] == commit
    source.write_text("2")
    assert provenance()["commit"] == f"{commit}-dirty"
