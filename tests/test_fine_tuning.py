"""Training after truncation: the optimizer is new, and gradual cuts end where asked."""

import math
import sys

import pytest
import torch

import cpnb
from cpnb import cp_layers, fine_tune, truncate, truncate_gradually


def trained():
    generator = torch.Generator().manual_seed(0)
    net = cpnb.canonicalize(cpnb.DigitsNet(generator=generator), generator=generator)
    data = cpnb.load_data("digits", train_size=300)
    cpnb.fit(net, data, epochs=3, lr=0.01, progress=False)
    return net, data


def test_fine_tune_moves_every_parameter_of_a_cut_network():
    net, data = trained()
    small = truncate(net, keep=0.5)
    before = [p.detach().clone() for p in small.parameters()]
    run = fine_tune(small, data, epochs=1, progress=False)
    assert run.status == "finished"
    assert run.recipe["lr"] == 1e-3
    for old, new in zip(before, small.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_fine_tune_refuses_an_optimizer_from_before_the_cut():
    net, data = trained()
    stale = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer is"):
        fine_tune(truncate(net, keep=0.5), data, optimizer=stale, progress=False)


def test_truncate_gradually_shrinks_by_the_same_share_each_time():
    net, data = trained()
    goal = {"conv2": 21, "fc1": 14}
    small, stages = truncate_gradually(
        net, data, rank=goal, steps=2, epochs=1, progress=False
    )
    assert [stage.ranks["conv2"] for stage in stages] == [42, 21]
    assert [stage.ranks["fc1"] for stage in stages] == [28, 14]
    found = {name: layer.rank for name, layer in cp_layers(small).items()}
    assert found == {"conv1": 7, "conv2": 21, "fc1": 14, "fc2": 9}
    assert [len(stage.run.history) for stage in stages] == [1, 1]
    last = stages[-1].accuracy_after_training
    assert last == cpnb.accuracy(small, data)


def test_truncate_gradually_leaves_the_source_alone():
    net, data = trained()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    truncate_gradually(net, data, keep=0.5, steps=1, epochs=1, progress=False)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_truncate_gradually_of_one_step_is_truncate_and_fine_tune():
    net, data = trained()
    small, (stage,) = truncate_gradually(
        net, data, keep=0.5, steps=1, epochs=1, key="greedy", progress=False
    )
    cut = truncate(net, keep=0.5, key="greedy")
    assert stage.accuracy_after_cut == cpnb.accuracy(cut, data)
    fine_tune(cut, data, epochs=1, progress=False)
    for ours, theirs in zip(small.parameters(), cut.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_truncate_gradually_stops_with_what_is_done_after_ctrl_c():
    net, data = trained()

    def stop(epoch, model, record):
        raise KeyboardInterrupt

    small, stages = truncate_gradually(
        net, data, keep=0.25, steps=3, epochs=1, callback=stop, progress=False
    )
    assert [stage.run.status for stage in stages] == ["interrupted"]
    assert stages[0].ranks["conv2"] == cp_layers(small)["conv2"].rank == 53


def test_truncate_gradually_measures_a_pair_on_its_own_images():
    net, data = trained()
    pair = cpnb.evaluation.images_and_labels(data, "train")
    small, (stage,) = truncate_gradually(
        net, pair, keep=0.5, steps=1, epochs=1, progress=False
    )
    assert stage.accuracy_after_training == cpnb.accuracy(small, pair)


@pytest.mark.parametrize(
    ("key", "refit"), [("activation", False), ("gradient", False), ("lam", "data")]
)
def test_truncate_gradually_cuts_by_what_images_say(key, refit):
    net, data = trained()
    small, (stage,) = truncate_gradually(
        net, data, keep=0.5, steps=1, epochs=1, key=key, refit=refit, progress=False
    )
    cut = truncate(net, keep=0.5, key=key, refit=refit, data=data)
    assert stage.accuracy_after_cut == cpnb.accuracy(cut, data)
    assert {name: layer.rank for name, layer in cp_layers(small).items()} == stage.ranks


def test_truncate_gradually_refuses_bad_arguments():
    net, data = trained()
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        truncate_gradually(net, data, keep=0.5, steps=0)
    with pytest.raises(ValueError, match="expected exactly one"):
        truncate_gradually(net, data)


@pytest.mark.parametrize("at", ["cut", "accuracy"])
def test_truncate_gradually_keeps_finished_stages_after_ctrl_c(monkeypatch, at):
    net, data = trained()
    module = sys.modules["cpnb.fine_tuning"]
    name = {"cut": "truncate", "accuracy": "accuracy"}[at]
    own, calls = getattr(module, name), []

    def press(*args, **options):
        calls.append(1)
        if len(calls) == {"cut": 2, "accuracy": 4}[at]:
            raise KeyboardInterrupt
        return own(*args, **options)

    monkeypatch.setattr(module, name, press)
    options = {"keep": 0.25, "steps": 3, "epochs": 1, "progress": False}
    small, stages = truncate_gradually(net, data, **options)
    assert [stage.run.status for stage in stages] == ["finished"] * len(stages)
    assert len(stages) == {"cut": 1, "accuracy": 2}[at]
    ranks = {name: layer.rank for name, layer in cp_layers(small).items()}
    assert stages[-1].ranks == ranks
    assert math.isnan(stages[-1].accuracy_after_training) == (at == "accuracy")


def test_truncate_gradually_says_so_when_ctrl_c_comes_before_any_training(monkeypatch):
    net, data = trained()

    def press(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["cpnb.fine_tuning"], "truncate", press)
    with pytest.raises(KeyboardInterrupt):
        truncate_gradually(net, data, keep=0.5, progress=False)


def test_truncate_gradually_goes_on_from_its_checkpoints(tmp_path):
    net, data = trained()
    options = {"keep": 0.5, "steps": 2, "epochs": 1, "progress": False}
    whole, _ = truncate_gradually(net, data, **options)
    options["checkpoint"] = tmp_path / "cut.pt"
    (kept, stages), (again, _) = (
        truncate_gradually(net, data, **options) for _ in range(2)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut-1.pt", "cut-2.pt"]
    assert [len(stage.run.history) for stage in stages] == [1, 1]
    for values in zip(*(m.parameters() for m in (whole, kept, again)), strict=True):
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_truncate_gradually_names_the_ranks_of_every_layer():
    net, data = trained()
    options = {"steps": 2, "epochs": 1, "progress": False}
    _, stages = truncate_gradually(net, data, rank={"fc1": 5}, **options)
    whole = {name: layer.rank for name, layer in cp_layers(net).items()}
    assert stages[-1].ranks == whole | {"fc1": 5}
    assert stages[0].ranks.keys() == whole.keys()
