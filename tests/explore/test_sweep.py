"""The rank sweep: exact, honest about gaps, safe on disk."""

import copy
import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from shared import count
from torch import nn

import cpnb
from cpnb.explore.sweep import RankSweep, default_ranks, rank_sweep, weights_hash

RANKS = {"conv1": 5, "conv2": 4, "fc": 3}


class Net(nn.Module):
    """Stride, batch norm and groups between three CP layers, and one plain layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = cpnb.CPConv2d(2, 8, 3, stride=2, padding=1, rank=5)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = cpnb.CPConv2d(8, 6, 3, groups=2, bias=False, rank=4)
        self.fc = cpnb.CPLinear(24, 7, rank=3)
        self.out = nn.Linear(7, 5)

    def forward(self, images):
        hidden = torch.relu(self.norm(self.conv1(images)))
        hidden = torch.relu(self.conv2(hidden)).flatten(1)
        return self.out(torch.relu(self.fc(hidden)))


@pytest.fixture
def model():
    net = Net()
    with torch.no_grad():  # unequal components, the largest of them negative
        for layer in (net.conv1, net.conv2, net.fc):
            layer.lam.mul_(torch.linspace(0.3, -2, layer.rank))
        net.norm.running_mean.uniform_(-0.2, 0.2)
        net.norm.running_var.uniform_(0.5, 1.5)
    return net


@pytest.fixture
def data(model):
    """Images labelled by the untruncated network itself, so that its accuracy is 1."""
    images = torch.randn(60, 2, 8, 8)
    with torch.no_grad():
        return images, copy.deepcopy(model).eval()(images).argmax(1)


@pytest.fixture
def sweep(model, data):
    return rank_sweep(model, data, progress=False)


def naive(model, data, ranks, **options):
    """Cut and count, without a shortcut."""
    options |= {"data": data, "progress": False}
    cut = cpnb.truncate(model, rank=ranks, **options).eval()
    images, labels = data
    with torch.no_grad():
        right = (cut(images).argmax(1) == labels).sum().item()
    whole, kept = (
        torch.cat([net.get_submodule(name).weight.flatten().double() for name in ranks])
        for net in (model, cut)
    )
    return cut, right, ((whole - kept).norm() / whole.norm()).item()


@pytest.mark.parametrize("refit", [False, True, "data"])
@pytest.mark.parametrize("key", ["lam", "greedy", "activation"])
@pytest.mark.parametrize("layer", RANKS)
def test_rank_sweep_equals_naive_evaluation(model, data, layer, key, refit):
    options = {"key": key, "refit": refit}
    sweep = rank_sweep(model, data, ranks={layer: None}, progress=False, **options)
    assert sweep.table["axis"].unique().tolist() == [layer]
    assert sweep.table["rank"].tolist() == list(range(1, RANKS[layer] + 1))
    assert (sweep.key, sweep.refit) == (key, refit)
    for row in sweep.table.to_dict("records"):
        at = {layer: row["rank"]}
        cut, right, error = naive(model, data, at, **options)
        assert (row["right"], row["accuracy"]) == (right, right / 60)
        assert row["relative_error"] == pytest.approx(error, abs=1e-5)
        assert row["parameters"] == count(cut)
        assert row["keep"] == row["rank"] / RANKS[layer]


def test_rank_sweep_equals_naive_evaluation_when_all_layers_are_cut(model, data, sweep):
    curve = sweep.curve("*")
    assert curve["keep"].tolist() == [percent / 100 for percent in range(1, 101)]
    for row in curve.to_dict("records")[::7]:
        ranks = sweep.ranks_at(row["keep"])
        cut, right, error = naive(model, data, ranks)
        assert row["right"] == right
        assert {name: row[f"rank_{name}"] for name in RANKS} == ranks
        assert row["rank"] == sum(ranks.values())
        assert row["break_even_rank"] == sum(
            layer.break_even_rank for layer in cpnb.cp_layers(cut).values()
        )
        assert row["relative_error"] == pytest.approx(error, abs=1e-5)
        assert row["parameters"] == count(cut)


def test_rank_sweep_knows_the_size_of_networks_that_were_not_measured(model, sweep):
    dense = 8 * 2 * 9 + 8 + 6 * 4 * 9 + 24 * 7 + 7
    others = count(model.norm) + count(model.out)
    assert sweep.dense_parameters == dense + others
    assert sweep.ranks == RANKS
    cut = {"conv1": 2, "fc": 1}
    assert sweep.accuracy(cut) is None
    assert sweep.parameters(cut) == count(cpnb.truncate(model, rank=cut))
    # 2 FLOPs a multiply-add. A component of conv1 takes 2 channels at 8x8 positions, a
    # window at 4x4, 8 channels there; then the matrices of fc and out.
    one, two = (sweep.flops({"conv1": rank, "fc": 2}) for rank in (1, 2))
    assert two - one == 2 * (64 * 2 + 16 * 9 + 16 * 8)
    assert two - sweep.flops({"conv1": 2, "fc": 1}) == 2 * (24 + 7)


def test_rank_sweep_leaves_the_model_as_it_was(model, data):
    model.train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    rank_sweep(model, data, progress=False, refit=True)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert model.training and model.conv1.training and not model.norm.training


def test_rank_sweep_takes_a_layer_alone():
    layer = cpnb.CPLinear(9, 4, rank=3)
    images = torch.randn(30, 9)
    data = images, layer(images).argmax(1)
    sweep = rank_sweep(layer, data, progress=False)
    assert sweep.curve("")["rank"].tolist() == [1, 2, 3]
    for rank in (1, 2, 3):
        cut = cpnb.truncate(layer, rank=rank)
        assert sweep.accuracy({"": rank}) == cpnb.accuracy(cut, data)
    assert "layer 3" in repr(sweep)


def test_rank_sweep_uses_the_validation_split_of_a_data_set(model, data):
    others = dict.fromkeys(("train", "test"), (data[0][:1], data[1][:1]))
    splits = SimpleNamespace(name="three", validation=data, **others)
    sweep = rank_sweep(model, splits, ranks={"fc": None}, progress=False)
    assert (sweep.images, sweep.data, sweep.network) == (60, "three", "Net")
    assert sweep.accuracy() == 1.0


@pytest.mark.parametrize("together", [True, False])
def test_rank_sweep_keeps_what_is_done_when_interrupted(
    model, data, together, monkeypatch
):
    rows = 0

    def press(layer, inputs, scores):
        """Press Ctrl-C when as many rows have passed as conv1 and a bit more take."""
        nonlocal rows
        rows += len(scores)
        if rows > 560:
            raise KeyboardInterrupt

    model.out.register_forward_hook(press)
    if not together:
        monkeypatch.setattr("cpnb.explore.fan_out._agree", lambda *_: False)
    stopped = rank_sweep(model, data, progress=False)
    model.out._forward_hooks.clear()
    assert stopped.status == "interrupted" and "interrupted" in repr(stopped)
    assert stopped.curve("conv1")["rank"].tolist() == [1, 2, 3, 4, 5]
    assert stopped.curve("*")["keep"].tolist() == [1.0]
    for row in stopped.table.to_dict("records"):
        ranks = {name: row[f"rank_{name}"] for name in RANKS}
        assert row["right"] == naive(model, data, ranks)[1]


def test_rank_sweep_measures_at_the_ranks_asked_for_and_the_whole_network(model, data):
    ranks = {"conv1": (4, 1), "fc": None, "*": iter([0.5])}
    sweep = rank_sweep(model, data, ranks=ranks, progress=False)
    assert list(zip(sweep.table["axis"], sweep.table["rank"], strict=True)) == [
        *(("conv1", rank) for rank in (1, 4, 5)),
        *(("fc", rank) for rank in (1, 2, 3)),
        *(("*", rank) for rank in (5, 12)),
    ]
    assert sweep.accuracy() == sweep.accuracy(RANKS) == 1.0
    assert sweep.accuracy({"conv1": 3}) is None


def test_default_ranks_hold_every_rank_of_a_small_layer_and_a_grid_of_a_large_one():
    assert default_ranks(128, 7) == list(range(1, 129))
    for rank, break_even in ((129, 100), (270, 84), (1948, 2100), (5000, 4801)):
        grid = default_ranks(rank, break_even)
        assert {1, 2, min(break_even, rank), rank} <= set(grid)
        assert grid == sorted(set(grid)) and grid[-1] == rank
        assert 40 <= len(grid) <= 67


@pytest.mark.parametrize(
    ("ranks", "match"),
    [
        ({"conv3": [1]}, "ranks names layer 'conv3', expected some of .'conv1'.*'\\*'"),
        ({"fc": [0]}, r"ranks\['fc'\] holds \[0\], expected 1 to 3"),
        ({"fc": [4]}, r"ranks\['fc'\] holds \[4\], expected 1 to 3"),
        ({"*": [3]}, "keep is 3.0, expected a fraction"),
    ],
)
def test_rank_sweep_refuses_axes_and_ranks_that_are_not_there(
    model, data, ranks, match
):
    with pytest.raises(ValueError, match=match):
        rank_sweep(model, data, ranks=ranks, progress=False)


def test_sweep_survives_a_file(sweep, tmp_path):
    path = tmp_path / "sweep.json"
    sweep.save(path)
    again = RankSweep.load(path)
    assert again.table.equals(sweep.table)
    assert again.table.dtypes.equals(sweep.table.dtypes)
    fields = {name: value for name, value in vars(sweep).items() if name != "table"}
    assert fields == {name: getattr(again, name) for name in fields}
    assert path.stat().st_size < 50_000


def test_sweep_load_refuses_other_files(tmp_path):
    path = tmp_path / "sweep.json"
    text = r"expected a file written by RankSweep\.save"
    for content in ({"format": "cpnb rank sweep", "version": 2}, [1], "sweep"):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=text):
            RankSweep.load(path)


def test_weights_hash_is_that_of_names_types_shapes_and_bytes():
    layer = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    layer.register_buffer("n", torch.tensor([7], dtype=torch.uint8))
    content = b"weight:torch.bfloat16:(1, 2);" + b"\x80\x3f" * 2
    expected = hashlib.sha256(content + b"n:torch.uint8:(1,);\x07").hexdigest()
    assert weights_hash(layer) == expected
