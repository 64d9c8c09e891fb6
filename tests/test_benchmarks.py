"""The benchmarks' own checks."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

SWEEP = Path(__file__).parents[1] / "benchmarks" / "sweep.py"


@pytest.mark.parametrize(
    ("found", "word", "status"), [(7, "equal", 0), (8, "DIFFER", 1)]
)
def test_sweep_benchmark_fails_when_the_counts_differ(
    found, word, status, monkeypatch, capsys
):
    pair = torch.randn(10, 1, 28, 28), torch.zeros(10, dtype=torch.long)
    main = runpy.run_path(str(SWEEP))["main"]
    fakes = {
        "load": lambda name: (pair, pair),
        "trained": lambda kind, pair: kind(),
        "naive": lambda net, axis, places, pair, size: dict.fromkeys(places, 7),
        "together": lambda net, axis, pair: (dict.fromkeys(range(1, 11), found), ""),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(main.__globals__, name, fake)
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--only", "fc2"])
    with pytest.raises(SystemExit) as ended:
        main()
    torch.set_num_threads(threads)
    assert ended.value.code == status
    assert f"10 counts {word}" in capsys.readouterr().out
