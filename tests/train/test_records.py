"""Run records: what they say of themselves, provenance that is true."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import torch

import cpnb
from cpnb.train import records
from cpnb.train.records import MEASURES, Run, provenance, write_text

CPU = torch.device("cpu")


def test_run_repr_names_status_time_last_accuracies_and_what_went_wrong():
    epoch = dict.fromkeys([*MEASURES, "seconds"], 0.25)
    run = Run("finished", [epoch, epoch | {"validation_accuracy": None}], {}, {})
    assert run.seconds == 0.5
    assert repr(run) == "Run(finished, 2 epochs in 0.5 s, train accuracy 25.0%)"
    ended = Run("diverged", [], {}, {}, message="Try another rate.")
    assert repr(ended) == "Run(diverged, 0 epochs in 0.0 s) Try another rate."


def test_provenance_describes_this_process():
    found = provenance(CPU)
    age = datetime.now(UTC) - datetime.fromisoformat(found["date"])
    assert timedelta(0) <= age < timedelta(minutes=5)
    versions = [cpnb.__version__, torch.__version__, torch.get_num_threads(), "cpu"]
    assert [found[k] for k in ("cpnb", "torch", "threads", "device")] == versions
    assert found["processor"]
    assert json.loads(json.dumps(found)) == found


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", folder, *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def commit_now():
    records._commit.cache_clear()
    return provenance(CPU)["commit"]


def test_provenance_names_the_commit_of_the_package_and_no_other(tmp_path, monkeypatch):
    source, other = tmp_path / "cpnb/train/records.py", tmp_path / "other"
    monkeypatch.setattr(records, "__file__", str(source))
    source.parent.mkdir(parents=True)
    source.write_text("1")
    other.write_text("1")
    try:
        assert commit_now() is None  # no repository
        git(tmp_path, "init", "-q")
        git(tmp_path, "add", "other")
        git(tmp_path, "commit", "-q", "-m", "first")
        monkeypatch.setenv("CPNB_COMMIT", "named")
        assert commit_now() == "named"  # a repository that does not track it
        git(tmp_path, "add", source)
        git(tmp_path, "commit", "-q", "-m", "second")
        commit = git(tmp_path, "rev-parse", "HEAD").strip()
        other.write_text("2")
        (source.parent / "untracked").write_text("1")
        assert commit_now() == commit
        source.write_text("2")
        assert commit_now() == f"{commit}-dirty"
    finally:
        records._commit.cache_clear()


def test_files_are_whole_in_the_users_home_and_with_the_users_rights(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    texts = [str(n) * 100_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_text, ["~/table"] * 8, texts))
    path = tmp_path / "table"
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o666 & ~mask
