"""Checkpoints carry their ranks, and a bad one leaves the model as it was."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import cpnb


def network(rank=6, out=10):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, out),
    )
    return cpnb.canonicalize(model, rank=rank, skip=()).eval()


def test_truncated_model_loads_into_a_full_rank_one(tmp_path):
    cut = cpnb.truncate(network(), rank={"0": 2, "4": 3})
    with torch.no_grad():
        cut[1].running_mean.add_(0.3)
    path = tmp_path / "cut.safetensors"
    cpnb.save_model(cut, path)
    fresh = network()
    assert cpnb.load_weights(fresh, path) is fresh
    images = torch.randn(3, 1, 8, 8)
    assert_close(fresh(images), cut(images))
    assert [layer.rank for layer in cpnb.cp_layers(fresh).values()] == [2, 3]


def test_save_model_writes_the_ranks_and_nothing_beside_the_file(tmp_path):
    path = tmp_path / "net.safetensors"
    cpnb.save_model(network(), path)
    cpnb.save_model(network(rank=4), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["ranks"]) == {"0": 4, "4": 4}
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_bare_layer_and_a_dense_model_make_the_round_trip(tmp_path):
    for model, twin in (
        (cpnb.CPConv2d(3, 4, 3, rank=5), cpnb.CPConv2d(3, 4, 3, rank=2)),
        (nn.Linear(3, 2), nn.Linear(3, 2)),
    ):
        cpnb.save_model(model, tmp_path / "file")
        cpnb.load_weights(twin, tmp_path / "file")
        assert torch.equal(twin.weight, model.weight)


def saved(folder, model):
    cpnb.save_model(model, folder / "file")
    return folder / "file"


def shortened(folder, model):
    path = saved(folder, model)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def foreign(folder, model):
    save_file({"weight": torch.ones(2)}, folder / "file")
    return folder / "file"


@pytest.mark.parametrize(
    ("make", "source", "error", "text"),
    [
        (
            saved,
            network(out=7),
            ValueError,
            r"another architecture: 4.bias: expected \(10,\), got \(7,\)",
        ),
        (
            saved,
            nn.Sequential(nn.Conv2d(1, 4, 3)),
            ValueError,
            r"0.factors.0: expected \(4, 6\), got nothing.* more. Build the model",
        ),
        (shortened, network(), ValueError, "not a complete safetensors file"),
        (foreign, None, ValueError, "has format None, expected 'cpnb-checkpoint-1'"),
        (
            lambda folder, _: folder / "none",
            None,
            FileNotFoundError,
            "none', expected an existing file",
        ),
    ],
    ids=["sizes", "layers", "shortened", "foreign", "missing"],
)
def test_load_weights_refuses_and_leaves_the_model(tmp_path, make, source, error, text):
    path = make(tmp_path, source)
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        cpnb.load_weights(model, path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_save_model_refuses_tied_weights_and_missing_folders(tmp_path):
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' in the same mem"):
        cpnb.save_model(tied, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        cpnb.save_model(network(), tmp_path / "no" / "file")
    assert not list(tmp_path.iterdir())
