"""The table of keys: the library's own numbers, over the same networks."""

import statistics

import pytest
import torch
from torch import nn

import cpnb
from cpnb import keys


@pytest.fixture
def nets():
    def net(seed):
        generator = torch.Generator().manual_seed(seed)
        dense = nn.Sequential(
            nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4)
        )
        return cpnb.canonicalize(dense, rank=6, generator=generator)

    return [net(seed) for seed in range(2)]


@pytest.fixture
def data():
    return torch.randn(50, 1, 4, 4), torch.arange(50) % 4


def test_compare_keys_holds_what_truncating_and_evaluating_gives(nets, data):
    ranks = {"*": [0.5], "0": [2]}
    table = cpnb.compare_keys(nets, data, ranks, progress=False)
    rows = table.to_rows()
    ways = {(row["key"], row["refit"]) for row in rows}
    assert ways == {(k, r) for k in keys.COMPARED for r in (False, True, "data")}
    assert len(rows) == len(ways) * 3  # the convolution cut and whole, and half of all
    for row in rows:
        how = {"key": row["key"], "refit": row["refit"], "data": data}
        cut = {"keep": row["keep"]}
        if row["layer"] == "0":
            cut = {"rank": {"0": row["rank"]}}
        found = [cpnb.evaluate(cpnb.truncate(net, **cut, **how), data) for net in nets]
        accuracies = [one["accuracy"] for one in found]
        assert row["accuracy"] == pytest.approx(statistics.mean(accuracies))
        assert row["accuracy_std"] == pytest.approx(statistics.stdev(accuracies))
        losses = [one["loss"] for one in found]
        assert row["loss"] == pytest.approx(statistics.mean(losses), rel=1e-5)
        assert row["networks"] == 2


def test_compare_keys_prints_a_line_for_each_key_and_refit(nets, data):
    options = {"keys": ["lam", "random"], "refits": ["weight"], "progress": False}
    table = cpnb.compare_keys(nets[0], data, {"*": [0.5], "3": [2]}, **options)
    head, *lines = repr(table).splitlines()
    assert head.split("  ")[0] == "key"
    assert "50% kept" in head and "3 2" in head
    assert [line.split()[:4] for line in lines] == [
        ["lam", "on", "the", "kernel"],
        ["random", "on", "the", "kernel"],
    ]
    (row,) = [r for r in table.to_rows() if (r["key"], r["layer"]) == ("lam", "*")]
    assert f"{100 * row['accuracy']:.1f} %" in lines[0]
    assert row["accuracy_std"] is None
    assert f"<td>{100 * row['accuracy']:.1f} %</td>" in table._repr_html_()


def test_compare_keys_keeps_what_is_done_when_interrupted(nets, data):
    seen = []

    def press(*_):
        seen.append(1)
        if len(seen) == 40:
            raise KeyboardInterrupt

    nets[-1][2].register_forward_hook(press)
    table = cpnb.compare_keys(nets, data, keys=["lam", "greedy"], progress=False)
    assert table.status == "interrupted"
    assert 0 < len(table.sweeps) < 6
    assert all(len(sweeps) == 2 for sweeps in table.sweeps.values())


def test_compare_keys_refuses_what_is_no_network(nets, data):
    with pytest.raises(TypeError, match=r"models\[1\] is a str, expected"):
        cpnb.compare_keys([nets[0], "net"], data)
    with pytest.raises(ValueError, match="key is 'size', expected one of"):
        cpnb.compare_keys(nets, data, keys=["size"], progress=False)


def test_compare_keys_refuses_networks_without_a_common_rank(nets, data):
    other = cpnb.canonicalize(cpnb.to_dense(nets[1]), rank=5)
    with pytest.raises(ValueError, match=r"models\[1\] has the CP ranks {'0': 5, '3'"):
        cpnb.compare_keys([nets[0], other], data, progress=False)
    with pytest.raises(ValueError, match="models is empty, expected at least one"):
        cpnb.compare_keys([], data)
    for name, wrong in (("keys", "lam"), ("refits", False), ("models", None)):
        given = {"models": nets, name: wrong}
        with pytest.raises(TypeError, match=f"{name} is {wrong!r}, expected a list"):
            cpnb.compare_keys(data=data, **given)
    for name in ("keys", "refits"):
        with pytest.raises(ValueError, match=f"{name} is empty, expected at least one"):
            cpnb.compare_keys(nets, data, **{name: []})
    with pytest.raises(TypeError, match=r"ranks\['0'\] is 3, expected a list"):
        cpnb.compare_keys(nets, data, {"0": 3})
    with pytest.raises(TypeError, match="ranks is a list, expected a mapping from"):
        cpnb.compare_keys(nets, data, [1, 2])


def test_compare_keys_shows_cuts_of_nearly_the_same_share_apart(nets, data):
    options = {"keys": ["lam"], "refits": [False], "progress": False}
    table = cpnb.compare_keys(nets[0], data, {"*": [0.12, 0.125, 0.504]}, **options)
    head, _ = repr(table).splitlines()
    assert [f"{share}% kept" in head for share in (12, 12.5, 50.4)] == [True] * 3
