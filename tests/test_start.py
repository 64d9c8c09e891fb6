"""start.py installs once, with the pinned versions, and passes on how things ended."""

import ast
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start.py as a module whose repository is an empty folder with two files."""
    spec = importlib.util.spec_from_file_location("start", ROOT / "start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    paths = {"VENV": venv, "PYTHON": venv / "python", "STAMP": venv / "stamp"}
    for name, path in {"ROOT": tmp_path, **paths}.items():
        monkeypatch.setattr(module, name, path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text(name)
    return module


@pytest.fixture
def commands(start, monkeypatch):
    """What start.py runs, recorded; each makes the environment and ends well."""
    recorded = []

    def record(*command):
        recorded.append([str(word) for word in command])
        start.VENV.mkdir(exist_ok=True)
        start.PYTHON.touch()
        return 0

    monkeypatch.setattr(start, "run", record)
    return recorded


def test_start_reads_on_older_pythons_too():
    ast.parse((ROOT / "start.py").read_text(), feature_version=(3, 7))


def test_start_installs_editable_with_the_constraints_then_runs_everything(
    start, commands
):
    assert start.main(["test", "-x"]) == 0
    venv, pip, pytest_command = commands
    assert venv == [sys.executable, "-m", "venv", "--clear", str(start.VENV)]
    assert pip[-4:] == ["-c", "constraints.txt", "-e", ".[notebooks,test]"]
    assert pytest_command[1:] == ["-m", "pytest", "-m", "", "-x"]


def test_start_opens_the_tour(start, commands):
    assert start.main(["lab", "--no-browser"]) == 0
    assert commands[1][-1] == ".[notebooks]"
    lab = ["-m", "jupyterlab", "notebooks/00_tour.ipynb", "--no-browser"]
    assert commands[2][1:5] == lab


def test_start_skips_the_install_until_a_pin_changes(start, commands):
    start.main(["test"])
    del commands[:]
    start.main(["test"])
    start.main(["lab"])  # the tests' environment holds the notebooks' too
    assert ["pip" in command for command in commands] == [False, False]
    (start.ROOT / "constraints.txt").write_text("torch==0")
    start.main(["lab"])
    assert "pip" in commands[3]
    start.main(["test"])  # the notebooks' environment lacks the tests' needs
    assert "pip" in commands[6]


def test_start_installs_again_after_an_install_that_failed(start, monkeypatch):
    ends = iter([0, 1])
    monkeypatch.setattr(start, "run", lambda *command: next(ends))
    with pytest.raises(SystemExit, match="1"):
        start.main(["test"])
    assert not start.STAMP.exists()


def test_start_says_what_to_install_when_python_has_no_venv(start, monkeypatch):
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        start.main(["lab"])


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
def test_start_names_its_commands_when_it_gets_another(start, arguments):
    with pytest.raises(SystemExit, match=r"start.py \{lab,test\}"):
        start.main(arguments)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_start_waits_for_the_command_after_ctrl_c():
    """The command answers Ctrl-C in its own time, and its exit status counts."""
    command = """
try:
    print("ready", flush=True)
    input()
except KeyboardInterrupt:
    raise SystemExit(7)
"""
    code = f"import sys, start; sys.exit(start.run(sys.executable, '-c', {command!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 7
