"""The rank sweep: exact, honest about gaps, safe on disk."""

import copy
import json
import os

import pytest
import torch
from torch import nn

from cpnb._sweep.fingerprints import data_fingerprint, model_fingerprint
from cpnb._sweep.plan import default_ranks
from cpnb._sweep.points import SweptLayer
from cpnb.layers import CPConv2d, CPLinear
from cpnb.sweep import RankSweep, rank_sweep
from cpnb.truncation import truncate

RANKS = {"conv1": 5, "conv2": 4, "fc": 3}


class Net(nn.Module):
    """Stride, batch norm and groups between three CP layers, and one plain layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = CPConv2d(2, 8, 3, stride=2, padding=1, rank=RANKS["conv1"])
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = CPConv2d(8, 6, 3, groups=2, bias=False, rank=RANKS["conv2"])
        self.fc = CPLinear(24, 7, rank=RANKS["fc"])
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
    cut = truncate(model, rank=ranks, **options).eval()
    images, labels = data
    with torch.no_grad():
        accuracy = (cut(images).argmax(1) == labels).double().mean().item()
        errors = {}
        for name in ranks:
            whole = model.get_submodule(name).weight.double()
            kept = cut.get_submodule(name).weight.double()
            errors[name] = ((whole - kept).norm() / whole.norm()).item()
    return cut, accuracy, errors


def rows_of(sweep, layer):
    return [row for row in sweep.to_rows() if row["layer"] == layer]


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("key", ["lam", "greedy"])
@pytest.mark.parametrize("layer", RANKS)
def test_rank_sweep_equals_naive_evaluation(model, data, layer, key, refit):
    options = {"key": key, "refit": refit}
    sweep = rank_sweep(model, data, [layer], progress=False, batch_size=17, **options)
    rows = sweep.to_rows()
    assert [row["rank"] for row in rows] == list(range(1, RANKS[layer] + 1))
    for row in rows:
        cut, accuracy, errors = naive(model, data, {layer: row["rank"]}, **options)
        assert row["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert row["relative_error"] == pytest.approx(errors[layer], abs=1e-5)
        own = cut.get_submodule(layer).parameters()
        assert row["parameters"] == sum(p.numel() for p in own)
        assert row["network_parameters"] == sum(p.numel() for p in cut.parameters())
        assert (row["key"], row["refit"]) == (key, refit)


def test_rank_sweep_equals_naive_evaluation_when_all_layers_are_cut(model, data, sweep):
    rows = rows_of(sweep, "*")
    assert [row["keep"] for row in rows] == [percent / 100 for percent in range(1, 101)]
    for row in rows[::7]:
        cut = truncate(model, keep=row["keep"])
        ranks = {name: cut.get_submodule(name).rank for name in RANKS}
        _, accuracy, errors = naive(model, data, ranks)
        assert row["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert row["rank"] == sum(ranks.values())
        assert row["parameters"] == sum(p.numel() for p in cut.parameters())
        norms = {n: model.get_submodule(n).weight.norm().item() for n in RANKS}
        off = sum((errors[name] * norms[name]) ** 2 for name in RANKS)
        whole = sum(norm**2 for norm in norms.values())
        assert row["relative_error"] == pytest.approx((off / whole) ** 0.5, abs=1e-5)


def test_rank_sweep_rows_compare_with_the_dense_network(model, sweep):
    dense = 8 * 2 * 9 + 8 + 6 * 4 * 9 + 24 * 7 + 7
    others = sum(
        p.numel() for part in (model.norm, model.out) for p in part.parameters()
    )
    for row in sweep.to_rows():
        assert row["network_dense_parameters"] == dense + others
    row = rows_of(sweep, "conv1")[1]
    assert row["dense_parameters"] == 8 * 2 * 9 + 8
    assert row["break_even_rank"] == 9  # 144 / (8 + 2 + 3 + 3 + 1), rounded up
    assert row["full_rank"] == 5
    assert row["relative_rank"] == pytest.approx(2 / 9)
    assert row["keep"] == pytest.approx(2 / 5)
    assert rows_of(sweep, "*")[0]["dense_parameters"] == dense + others


def test_rank_sweep_holds_the_untruncated_network(sweep):
    whole = sweep.point()
    assert whole.accuracy == 1.0
    assert whole.total_error == 0.0
    assert whole.ranks == RANKS


def test_rank_sweep_leaves_the_model_as_it_was(model, data):
    model.train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    rank_sweep(model, data, progress=False, refit=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and model.conv1.training and not model.norm.training


def test_rank_sweep_takes_a_layer_alone():
    layer = CPLinear(9, 4, rank=3)
    images = torch.randn(30, 9)
    with torch.no_grad():
        labels = layer(images).argmax(1)
    sweep = rank_sweep(layer, (images, labels), progress=False)
    assert [row["layer"] for row in sweep.to_rows()][:3] == [""] * 3
    for rank in (1, 2, 3):
        _, accuracy, _ = naive(layer, (images, labels), {"": rank})
        assert sweep.point({"": rank}).accuracy == pytest.approx(accuracy)


def test_rank_sweep_cuts_a_layer_used_twice_in_both_places():
    shared = CPLinear(6, 6, rank=4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    images = torch.randn(40, 6)
    with torch.no_grad():
        labels = net(images).argmax(1)
        sweep = rank_sweep(net, (images, labels), ["0"], [2], progress=False)
        cut = truncate(shared, rank=2)
        expected = cut(cut(images).relu()).argmax(1) == labels
    assert sweep.point({"0": 2}).accuracy == pytest.approx(
        expected.double().mean().item()
    )


def test_rank_sweep_uses_the_validation_split_of_a_data_set(model, data):
    class Splits:
        name = "three"
        train = test = (data[0][:1], data[1][:1])
        validation = data

    sweep = rank_sweep(model, Splits(), ["fc"], progress=False)
    assert sweep.provenance["images"] == 60
    assert sweep.provenance["data"] == "three"
    pair = rank_sweep(model, data, ["fc"], progress=False)
    assert sweep.points() == pair.points()


@pytest.mark.parametrize("together", [True, False])
def test_rank_sweep_keeps_what_is_done_when_interrupted(model, data, together):
    def press(layer, inputs, scores):
        """Press Ctrl-C when as many rows have passed as conv1 and a bit more take."""
        nonlocal rows
        before, rows = rows, rows + len(scores)
        if before <= 560 < rows:
            raise KeyboardInterrupt

    rows = 0
    model.out.register_forward_hook(press)
    if not together:
        for layer in (model.conv1, model.conv2, model.fc):
            layer.register_forward_hook(lambda *_: None)
    stopped = rank_sweep(model, data, progress=False)
    assert stopped.status == "interrupted"
    ranks = [dict(zip(RANKS, key, strict=True)) for key, *_ in stopped.points()]
    assert all({**RANKS, "conv1": rank} in ranks for rank in (1, 2, 3, 4, 5))
    assert len(ranks) < 12  # the number with all of them
    for at, (_, accuracy, _) in zip(ranks, stopped.points(), strict=True):
        assert accuracy == pytest.approx(naive(model, data, at)[1], abs=1e-12)
    assert all(row["accuracy"] is not None for row in stopped.to_rows())


def test_rank_sweep_shows_progress_only_when_asked(model, data, capsys):
    rank_sweep(model, data, ["fc"], progress=False)
    assert capsys.readouterr() == ("", "")
    rank_sweep(model, data, ["fc"], progress=True)
    assert "rank sweep: 100%" in capsys.readouterr().err


def test_rank_sweep_takes_ranks_in_several_ways(model, data):
    def swept(*args):
        rows = rank_sweep(model, data, *args, progress=False).to_rows()
        return [(row["layer"], row["rank"]) for row in rows]

    each = [("conv1", 1), ("conv1", 4), ("conv1", 5)]
    assert swept(["conv1"], [4, 1]) == each  # full rank always
    assert swept(None, {"conv1": (1, 4)}) == each
    listed = swept(None, iter([4]))
    assert listed == [("conv1", 4), ("conv1", 5), ("conv2", 4), ("fc", 3)]
    assert swept(None, {"*": [0.5]}) == [("*", 5)]
    with pytest.raises(ValueError, match=r'"\*", which takes fractions of the compon'):
        swept(["fc", "*"], [1, 2])
    assert swept(["fc", "*"], {"*": [0.5]}) == [("fc", n) for n in (1, 2, 3)] + [
        ("*", 5)
    ]


def test_default_ranks_hold_every_rank_of_a_small_layer_and_a_grid_of_a_large_one():
    def layer(rank, break_even):
        return SweptLayer(
            *("x", "CPLinear", (9, 9), 1.0, rank, break_even, 81, 10, 19, 162, 36)
        )

    assert default_ranks(layer(128, 7)) == list(range(1, 129))
    for rank, break_even in ((129, 100), (270, 84), (1948, 2100), (5000, 4801)):
        grid = default_ranks(layer(rank, break_even))
        assert {1, 2, min(break_even, rank), rank} <= set(grid)
        assert grid == sorted(set(grid)) and grid[-1] == rank
        assert 40 <= len(grid) <= 67


@pytest.mark.parametrize(
    ("layers", "ranks", "error", "match"),
    [
        (["conv3"], None, ValueError, "layer is 'conv3', expected one of 'conv1'"),
        (None, {"head": [1]}, ValueError, "layer is 'head'"),
        ("conv1", None, TypeError, "layers is 'conv1', expected a list"),
        (None, 3, TypeError, "ranks is 3, expected a list"),
        (None, [0], ValueError, "hold 0, expected 1 to 5"),
        (None, [2.0], TypeError, "hold 2.0, expected integers"),
        (None, [True], TypeError, "hold True, expected integers"),
        (None, [99], ValueError, r"ranks is \[99\], expected at least one rank within"),
        (None, {"fc": [4]}, ValueError, "'fc' hold 4, expected 1 to 3"),
        (None, {"*": [3]}, ValueError, "expected fractions of the components"),
        (None, {"*": [float("nan")]}, ValueError, "holds nan"),
        (None, {"*": ["half", 0.5]}, TypeError, "holds 'half', expected fractions of"),
        (None, {"*": [True]}, TypeError, "holds True, expected fractions"),
        (None, {"*": 0.5}, TypeError, r"ranks.'\*'. is 0.5, expected a list.*0.25"),
        (None, {"fc": 3}, TypeError, "ranks.'fc'. is 3, expected a list.*1, 2, 4"),
        (None, {"fc": "12"}, TypeError, "ranks.'fc'. is '12', expected a list"),
        (
            [],
            None,
            ValueError,
            r"layers is \[\], expected at least one of .'conv1'.*'*'",
        ),
        (iter([]), [1], ValueError, r"layers is \[\], expected at least one of"),
        (None, {}, ValueError, r"ranks is {}, expected at least one of .'conv1'"),
    ],
)
def test_rank_sweep_refuses_bad_layers_and_ranks(
    model, data, layers, ranks, error, match
):
    with pytest.raises(error, match=match):
        rank_sweep(model, data, layers, ranks, progress=False)


def test_rank_sweep_refuses_other_bad_input(model, data):
    with pytest.raises(ValueError, match="Sequential without a CP layer"):
        rank_sweep(nn.Sequential(nn.Linear(3, 2)), data)
    with pytest.raises(ValueError, match="key is 'size', expected one of"):
        rank_sweep(model, data, key="size")
    with pytest.raises(TypeError, match="data is a NoneType"):
        rank_sweep(model, None)
    with pytest.raises(TypeError, match=r"batch_size is 0\.5"):
        rank_sweep(model, data, batch_size=0.5, progress=False)
    with pytest.raises(TypeError, match="model is a str, expected"):
        rank_sweep("model", data)


def test_rank_sweep_says_why_a_kernel_of_zeros_has_no_relative_error():
    net = nn.Sequential(CPLinear(6, 5, rank=2), CPLinear(5, 4, rank=3))
    with torch.no_grad():
        for factor in net[0].factors:
            factor[:, 1] = factor[:, 0]
        net[0].lam.copy_(torch.tensor([1.0, -1.0]))
    assert not net[0].weight.any()
    data = torch.randn(9, 6), torch.arange(9) % 4
    with pytest.raises(ValueError, match=r"'0' is inf.*norm of its kernel is 0.*Leave"):
        rank_sweep(net, data, progress=False)
    assert len(rank_sweep(net, data, ["1"], progress=False)) == 3


def test_rank_sweep_point_is_a_gap_where_nothing_was_measured(model, data):
    sweep = rank_sweep(model, data, ["conv1"], [1, 4], progress=False)
    between = sweep.point({"conv1": 3})
    assert between.accuracy is None
    assert between.relative_error == {"conv1": None, "conv2": 0.0, "fc": 0.0}
    assert between.total_error is None
    cut = truncate(model, rank={"conv1": 3})
    assert between.parameters == sum(p.numel() for p in cut.parameters())
    assert [rank for rank, _ in sweep.curve("conv1")] == [1, 4, 5]
    assert sweep.curve("conv1", {"fc": 2}) == []
    both = sweep.point({"conv1": 4, "fc": 2})
    assert both.accuracy is None and both.relative_error["conv1"] is not None


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1])
def test_rank_sweep_add_refuses_what_no_evaluation_gives(sweep, value):
    with pytest.raises(
        ValueError, match=r"accuracy is .*, expected a number from 0 to 1"
    ):
        sweep.add({"fc": 1}, value, 1.0, {})
    with pytest.raises(ValueError, match="relative error of layer 'fc' is inf"):
        sweep.add({"fc": 1}, 0.5, 1.0, {"fc": float("inf")})
    with pytest.raises(ValueError, match=r"ranks\['fc'\] is 4, expected 1 to 3"):
        sweep.point({"fc": 4})
    with pytest.raises(TypeError, match=r"ranks\['fc'\] is 1.5, expected an int"):
        sweep.point({"fc": 1.5})


def test_rank_sweep_copy_grows_on_its_own(model, data):
    sweep = rank_sweep(model, data, ["fc"], [1], progress=False)
    other = sweep.copy()
    assert other == sweep
    other.add({"fc": 2}, 0.25, 1.5, {"fc": 0.5})
    assert sweep.point({"fc": 2}).accuracy is None
    assert sweep.point({"fc": 2}).relative_error["fc"] is None


def test_rank_sweep_survives_a_file(sweep, model, tmp_path):
    path = tmp_path / "sweep.json"
    sweep.save(path)
    again = RankSweep.load(path, model=model)
    assert again == sweep
    assert again.to_rows() == sweep.to_rows()
    assert {"date", "versions", "device", "images"} <= again.provenance.keys()
    assert again.provenance["images"] == 60
    assert "torch" in again.provenance["versions"]
    assert path.stat().st_size < 20_000
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]


def test_rank_sweep_save_keeps_the_old_file_when_writing_fails(
    sweep, tmp_path, monkeypatch
):
    path = tmp_path / "sweep.json"
    sweep.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    sweep.provenance["images"] = 1
    with pytest.raises(OSError, match="no space left"):
        sweep.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def _changed(**changes):
    return lambda text: json.dumps(json.loads(text) | changes)


def _without(name):
    def edit(text):
        content = json.loads(text)
        del content[name]
        return json.dumps(content)

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda text: text[: len(text) // 2], "not readable as JSON"),
        (lambda text: "", "not readable as JSON"),
        (lambda text: "[1, 2]", "has the format None, expected 'cpnb rank sweep'"),
        (_changed(format="cpnb run"), "has the format 'cpnb run', expected"),
        (_changed(version=99), "has version 99 of the format, expected 2"),
        (_without("layers"), "damaged rank sweep: 'layers'"),
        (_changed(provenance=None), "damaged rank sweep: provenance is None, expected"),
        (_without("key"), "damaged rank sweep.*'key'"),
        (
            _changed(measured=[[1, 1, 1, 7.0, 1.0]]),
            "sweep: accuracy is 7.0",
        ),
        (_changed(measured=[[1, 1, 0.5, 1.0]]), "damaged rank sweep"),
        (
            _changed(measured=[[1, 1, 9, 0.5, 1.0]]),
            "sweep: ranks.'fc'. is 9",
        ),
        (_changed(measured=[[1, 1, 1, "high", 1.0]]), "damaged rank sweep"),
        (_changed(errors=[[], []]), "damaged rank sweep"),
        (_changed(layers=[{"name": "fc"}]), "damaged rank sweep"),
        (_changed(surprise=1), "damaged rank sweep.*'surprise'"),
    ],
)
def test_rank_sweep_load_refuses_a_damaged_file(sweep, tmp_path, edit, match):
    path = tmp_path / "sweep.json"
    sweep.save(path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=match) as caught:
        RankSweep.load(path)
    assert str(path) in str(caught.value)
    assert "Make it again with rank_sweep" in str(caught.value)


def test_rank_sweep_load_says_that_a_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        RankSweep.load(tmp_path / "none.json")


def test_rank_sweep_load_refuses_another_model(sweep, model, tmp_path):
    path = tmp_path / "sweep.json"
    sweep.save(path)
    with pytest.raises(ValueError, match="other weights or modules"):
        RankSweep.load(path, model=Net())
    with pytest.raises(ValueError, match=r"'fc': 3.*but model has.*'fc': 2"):
        RankSweep.load(path, model=truncate(model, rank={"fc": 2}))
    RankSweep.load(path, model=copy.deepcopy(model).train())


def test_model_fingerprint_changes_with_weights_buffers_names_and_types(model):
    original = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model).requires_grad_(False)) == original
    other = copy.deepcopy(model)
    other.norm.running_mean[0] += 1e-3
    assert model_fingerprint(other) != original
    assert model_fingerprint(copy.deepcopy(model).double()) != original
    plain = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    smooth = nn.Sequential(plain[0], nn.GELU())
    assert model_fingerprint(plain) != model_fingerprint(smooth)
    half = nn.Linear(3, 2, dtype=torch.bfloat16)
    assert len(model_fingerprint(half)) == 64


def test_data_fingerprint_changes_with_images_and_labels(data):
    images, labels = data
    original = data_fingerprint(data)
    assert data_fingerprint((images.clone(), labels.clone())) == original
    assert data_fingerprint((images + 1, labels)) != original
    assert data_fingerprint((images, labels.flip(0))) != original


def test_rank_sweep_repr_names_points_ranks_and_images(sweep):
    text = repr(sweep)
    assert text.startswith(f"RankSweep({len(sweep)} points of conv1 5, conv2 4, fc 3;")
    assert "images=60, finished" in text
