"""Checkpoints: a resumed training is the training, whatever ended it."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

import cpnb
from cpnb.augmentation import Augment
from cpnb.hooks import Hook
from cpnb.training import fit

LABELS = torch.arange(20) % 3


def images(seed=0, n=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 6, 6, generator=generator)


def network(hidden=8):
    """A network with all that a state can hold: CP, batch norm, dropout."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        cpnb.CPConv2d(2, 4, 3, rank=5, generator=generator),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64, hidden),
        nn.Linear(hidden, 3),
    )
    with torch.no_grad():
        for layer in model[-2:]:
            layer.weight.normal_(0, 0.3, generator=generator)
            layer.bias.zero_()
    return model


def train(path, model=None, data=None, **options):
    settings = {
        "epochs": 4,
        "batch_size": 6,
        "optimizer": "sgd",
        "lr": 0.05,
        "augment": Augment(crop=1),
        "seed": 5,
        "progress": False,
        **options,
    }
    model = network() if model is None else model
    data = (images(), LABELS) if data is None else data
    held_out = images(1), LABELS
    run = fit(model, data, validation=held_out, checkpoint=path, **settings)
    return model, run


def curve(run):
    return [{**record, "seconds": None} for record in run.history]


def same_state(first, second):
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Ending(Hook):
    """Raises in one step, once; a hook's own state goes into the checkpoint."""

    def __init__(self, at=None, error=None):
        self.at, self.error, self.steps = at, error, 0

    def __repr__(self):
        return "Ending()"

    def before_step(self, model, optimizer, step):
        self.steps += 1
        if step == self.at and self.error is not None:
            raise self.error
        model[0].lam.grad.mul_(1 + self.steps / 100)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


@pytest.mark.parametrize("at", [2, 4, 9, 15])  # four steps an epoch
@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("sgd", "one-cycle"), ("adam", "cosine"), ("rmsprop", "step"), ("sgd", None)],
)
def test_resumed_training_equals_an_uninterrupted_one(
    optimizer, schedule, at, tmp_path
):
    settings = {"optimizer": optimizer, "schedule": schedule, "lr": 0.01}
    whole, expected = train(None, hooks=[Ending()], **settings)
    path = tmp_path / "state.pt"
    with pytest.raises(ArithmeticError):
        train(path, hooks=[Ending(at, ArithmeticError())], **settings)
    assert path.exists() == (at >= 4)
    hook, model, torch_state = Ending(), network(), torch.get_rng_state()
    _, run = train(path, model, hooks=[hook], **settings)
    assert hook.steps == 16
    assert run.status == "finished"
    assert curve(run) == curve(expected)
    assert same_state(model, whole)
    assert torch.equal(torch_state, torch.get_rng_state())
    resumed = [at // 4] if at >= 4 else []
    assert run.provenance.get("resumed_after", []) == resumed


def test_interrupted_training_goes_on_with_the_same_model(tmp_path):
    path, model = tmp_path / "state.pt", network()
    hooks = [Ending(9, KeyboardInterrupt())]
    assert train(path, model, hooks=hooks)[1].status == "interrupted"
    _, run = train(path, model, hooks=[Ending()])
    whole, expected = train(None, hooks=[Ending()])
    assert curve(run) == curve(expected)
    assert same_state(model, whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
def test_epoch_is_kept_with_what_the_callback_did_also_when_it_raises(error, tmp_path):
    path = tmp_path / "state.pt"

    def halve(epoch, model, record):
        with torch.no_grad():
            model[-1].weight.mul_(0.5)

    def stop(epoch, model, record):
        halve(epoch, model, record)
        if epoch == 2:
            raise error

    whole, expected = train(None, callback=halve)
    with suppress(ArithmeticError):
        train(path, callback=stop)
    assert torch.load(path, weights_only=True)["epoch"] == 2
    model, run = train(path, callback=halve)
    assert curve(run) == curve(expected)
    assert same_state(model, whole)
    assert run.provenance["resumed_after"] == [2]


def test_finished_training_is_returned_at_once(tmp_path):
    path = tmp_path / "state.pt"
    model, run = train(path)

    def refuse(epoch, model, record):
        raise AssertionError("trained again")

    other, again = train(path, callback=refuse)
    assert again == run
    assert same_state(model, other)
    assert list(tmp_path.iterdir()) == [path]


def test_diverged_training_is_returned_at_once(tmp_path):
    path = tmp_path / "state.pt"
    settings = {"optimizer": "sgd", "lr": 1e30, "schedule": None}
    _, run = train(path, **settings)
    assert run.status == "diverged"
    assert train(path, **settings)[1] == run


class Killing(Hook):
    """Ends the process in the middle of a step, with no chance to tidy up."""

    def __init__(self, at=None):
        self.at = at

    def after_step(self, model, optimizer, step):
        if step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_training_resumes_to_the_same_curve(tmp_path):
    path = tmp_path / "state.pt"
    code = (
        "import sys; from test_training_checkpoint import Killing, train; "
        "train(sys.argv[1], hooks=[Killing(at=9)])"  # in the third epoch
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(path, weights_only=True)["epoch"] == 2
    model, run = train(path, hooks=[Killing()])
    whole, expected = train(None)
    assert run.provenance["resumed_after"] == [2]
    for ours, theirs in zip(run.history, expected.history, strict=True):
        del ours["seconds"], theirs["seconds"]
        assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(model.state_dict(), whole.state_dict())


def test_crash_while_writing_leaves_the_state_of_the_epoch_before(
    tmp_path, monkeypatch
):
    path, save = tmp_path / "state.pt", torch.save

    def crash(state, file):
        if state["epoch"] < 3:
            return save(state, file)
        file.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(OSError, match="disk full"):
            train(path)
    assert torch.load(path, weights_only=True)["epoch"] == 2
    assert curve(train(path)[1]) == curve(train(None)[1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": 0.06}, "lr was 0.05, now it is 0.06"),
        ({"seed": 6}, "seed was 5, now it is 6"),
        ({"epochs": 5}, "epochs was 4, now it is 5"),
        ({"augment": None}, "augment was {'crop': 1, 'flip': True, 'cutout': 0}, now"),
        ({"hooks": [Ending()]}, "hooks was [], now it is ['Ending()']"),
        ({"model": network(hidden=9)}, "trained_parameters was 625, now it is 693"),
        ({"model": nn.Sequential(*network(), nn.ReLU())}, "hash of the modules was "),
        ({"data": (images(2), LABELS)}, "hash of the training data was "),
    ],
)
def test_checkpoint_of_another_training_is_refused(change, text, tmp_path):
    path = tmp_path / "state.pt"
    train(path)
    model = change.get("model", network())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        train(path, **{"model": model, **change})
    assert "Delete it, or give this training another path" in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_checkpoint_leaves_on_the_cpu_what_was_there(tmp_path, monkeypatch):
    """Adam counts its steps there, and would wait for each count on a GPU."""
    path, load, places = tmp_path / "state.pt", torch.load, []

    class Storage:
        def to(self, *, device):
            return device

    def spy(file, *, map_location, **options):
        places.extend(map_location(Storage(), was) for was in ("cpu", "cuda:1"))
        return load(file, map_location=map_location, **options)

    train(path)
    monkeypatch.setattr(torch, "load", spy)
    train(path)
    assert isinstance(places[0], Storage)
    assert places[1] == torch.device("cpu"), "where this training is"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_resumed_adam_counts_its_steps_on_the_cpu(tmp_path):
    path, found = tmp_path / "state.pt", []

    class Watching(Hook):
        def after_step(self, model, optimizer, step):
            found.extend(state["step"].device for state in optimizer.state.values())

    def stop(epoch, model, record):
        raise KeyboardInterrupt

    settings = {"optimizer": "adam", "lr": 0.01, "hooks": [Watching()]}
    train(path, network().cuda(), callback=stop, **settings)
    train(path, network().cuda(), **settings)
    assert {device.type for device in found} == {"cpu"}


@pytest.mark.parametrize("content", ["half", "empty", "text", "other", "weights"])
def test_damaged_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "state.pt"
    train(path)
    if content == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content in ("empty", "text"):
        path.write_text("" if content == "empty" else json.dumps({"a": 1}))
    else:
        torch.save(nn.Linear(2, 2) if content == "other" else {"a": 1}, path)
    with pytest.raises(ValueError, match=r"checkpoint .*state\.pt .* Delete it to"):
        train(path)


def test_checkpoint_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"an existing folder\. Create"):
        train(tmp_path / "nowhere" / "state.pt")
