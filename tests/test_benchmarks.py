"""The benchmarks start, measure something small and print their ratios."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def _same_threads():
    """Give torch its threads back, which a benchmark sets."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_benchmark_says_how_to_call_it(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_decompositions_compares_both_methods_with_those_of_the_peer(capsys):
    import tensorly

    script = runpy.run_path(str(FOLDER / "decompositions.py"))
    script["compare"].__globals__["SWEEPS"] = (1, 50)
    kernel = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    tensorly.set_backend("pytorch")
    try:
        for peer in "parafac", "CPPower":
            script["compare"]("small", kernel, 4, peer, repeats=1)
    finally:
        tensorly.set_backend("numpy")
    parafac, power = capsys.readouterr().out.splitlines()
    found = [re.search(r"error (0\.\d+) \|", line)[1] for line in (parafac, power)]
    ours = re.search(r"power_method [\d.]+x faster, error (0\.\d+)", power)[1]
    # Two greedy methods from different random starts, ten of each, end alike.
    assert abs(float(ours) - float(found[1])) < 0.02
    assert 0 < float(found[0]) < 1


@pytest.mark.slow
def test_training_prints_the_ratio_to_a_plain_loop(monkeypatch, capsys):
    arguments = ["--network", "DigitsNet", "--images", "64", "--turns", "1"]
    monkeypatch.setattr(sys, "argv", ["training.py", *arguments])
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(FOLDER / "training.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[1:]
    names = [line[:20].strip() for line in lines]
    assert names == ["plain loop", "fit", "fit, two processes"]
    assert lines[0].endswith(" 1.00x")
    assert all(re.search(r"\d+ images/s +\d+\.\d\dx$", line) for line in lines)
