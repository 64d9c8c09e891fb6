"""Checkpoints: a resumed training is the training, whatever ended it."""

import copy
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
from cpnb._training import batches, checkpoint
from cpnb.augmentation import Augment
from cpnb.data import Split
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
    settings.setdefault("validation", (images(1), LABELS))
    run = fit(model, data, checkpoint=path, **settings)
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
    assert torch.load(path, weights_only=True)["epoch"] == at // 4
    hook, model, torch_state = Ending(), network(), torch.get_rng_state()
    _, run = train(path, model, hooks=[hook], **settings)
    assert hook.steps == 16
    assert run.status == "finished"
    assert curve(run) == curve(expected)
    assert same_state(model, whole)
    assert torch.equal(torch_state, torch.get_rng_state())
    resumed = [at // 4] if at >= 4 else []
    assert run.provenance.get("resumed_after", []) == resumed


SETTINGS = [{}, {"optimizer": "adam"}, {"amp": "float16", "schedule": None}]


@pytest.mark.parametrize("at", [2, 9])
@pytest.mark.parametrize("settings", SETTINGS)
def test_interrupted_training_goes_on_with_the_same_model(settings, at, tmp_path):
    path, model, start = tmp_path / "state.pt", network(), network()
    for _ in range(2):
        hooks = [Ending(at, KeyboardInterrupt())]
        assert train(path, model, hooks=hooks, **settings)[1].status == "interrupted"
        assert not same_state(model, start)
    _, run = train(path, model, hooks=[Ending()], **settings)
    whole, expected = train(None, hooks=[Ending()], **settings)
    assert curve(run) == curve(expected)
    assert same_state(model, whole)
    assert run.provenance.get("resumed_after") == (None if at < 4 else [2])


class Stopping(Hook):
    """Ctrl-C in one step."""

    def __init__(self, at=None):
        self.at = at

    def before_step(self, model, optimizer, step):
        if step == self.at:
            raise KeyboardInterrupt


class Standardizing(nn.Module):
    """Takes its shift and scale from the first batch that it is trained on."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.zeros(72)) for _ in range(2))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, rows):
        self.shift.copy_(rows.mean(0))
        self.scale.copy_(1 / rows.std(0))
        self.started.fill_(True)

    def forward(self, rows):
        if self.training and not self.started:
            self.start(rows)
        return (rows - self.shift) * self.scale


@pytest.mark.parametrize("again", [True, False], ids=["same model", "fresh model"])
def test_training_of_a_network_that_starts_late_goes_on(again, tmp_path):
    def late():
        return nn.Sequential(nn.Flatten(), Standardizing(), nn.LazyLinear(3))

    path, model = tmp_path / "state.pt", late()
    assert train(path, model, hooks=[Stopping(2)])[1].status == "interrupted"
    assert model[1].started
    model, run = train(path, model if again else late(), hooks=[Stopping()])
    whole, expected = train(None, late(), hooks=[Stopping()])
    assert curve(run) == curve(expected)
    assert same_state(model, whole)


def test_interrupted_before_the_first_step_leaves_the_model(tmp_path, monkeypatch):
    def interrupt(state, file):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    model, run = train(tmp_path / "state.pt")
    assert (run.status, run.history) == ("interrupted", [])
    assert same_state(model, network())
    assert list(tmp_path.iterdir()) == []


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
        ({"model": network().double()}, "dtype of 0.scale was torch.float32, now"),
        ({"data": (images(2), LABELS)}, "hash of the training data was "),
        ({"data": (images(), 2 - LABELS)}, "hash of the training data was "),
        ({"validation": (images(2), LABELS)}, "hash of the validation data was "),
        ({"validation": (images(1), 2 - LABELS)}, "hash of the validation data was "),
    ],
)
def test_checkpoint_of_another_training_is_refused(change, text, tmp_path):
    path = tmp_path / "state.pt"
    train(path)
    model = change.get("model", network())
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        train(path, **{"model": model, **change})
    assert "Delete it, or give this training another path" in str(error.value)
    assert same_state(model, before)


@pytest.mark.parametrize(
    ("name", "values"), [("mean", (9.0, 10.0)), ("std", (5.0, 7.0))]
)
def test_checkpoint_of_pixels_standardised_otherwise_is_refused(name, values, tmp_path):
    pixels = (images() * 50).to(torch.uint8)
    statistics = {"mean": (9.0, 9.0), "std": (5.0, 5.0)}
    train(tmp_path / "state.pt", data=Split(pixels, LABELS, **statistics))
    other = Split(pixels, LABELS, **{**statistics, name: values})
    before, now = map(list, (statistics[name], values))
    text = f"{name} of the training data was {before}, now it is {now}"
    with pytest.raises(ValueError, match=re.escape(text)):
        train(tmp_path / "state.pt", data=other)


def own(kind=torch.optim.SGD, lr=0.05, **settings):
    return lambda parameters: kind(parameters, lr=lr, **settings)


class Descent(torch.optim.SGD):
    """The optimizer of another library, to tell by its place only."""


Descent.__name__ = "SGD"


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (own(), own(momentum=0.9), "momentum of optimizer group 0 was 0, now it is"),
        (own(weight_decay=0.1), own(), "weight_decay of optimizer group 0 was 0.1, n"),
        (
            own(torch.optim.Adam),
            own(torch.optim.Adam, betas=(0.5, 0.9)),
            "betas of optimizer group 0 was [0.9, 0.999], now it is [0.5, 0.9]",
        ),
        (
            own(),
            lambda ps: torch.optim.SGD([{"params": ps[1:]}, {"params": ps[:1]}], 0.05),
            "params of optimizer group 0 was ['0.scale', '0.lam', ",
        ),
        (
            lambda ps: torch.optim.SGD(
                [{"params": ps[1:]}, {"params": ps[:1], "lr": torch.tensor(0.5)}], 0.05
            ),
            lambda ps: torch.optim.SGD([{"params": ps[1:]}, {"params": ps[:1]}], 0.05),
            "lr of optimizer group 1 was 0.5, now it is 0.05",
        ),
        (own(), own(Descent), "optimizer class was torch.optim.sgd.SGD, now it is tes"),
    ],
)
def test_checkpoint_of_a_function_that_makes_another_optimizer_is_refused(
    first, second, text, tmp_path
):
    path = tmp_path / "state.pt"
    settings = {"schedule": "one-cycle", "epochs": 2}
    _, run = train(path, optimizer=first, **settings)
    assert train(path, optimizer=first, **settings)[1] == run
    with pytest.raises(ValueError, match=re.escape(text)):
        train(path, optimizer=second, **settings)


def test_data_are_hashed_once_for_all_networks(tmp_path, monkeypatch):
    hashed, digest = [], batches._digest
    monkeypatch.setattr(
        batches, "_digest", lambda *data: hashed.append(data) or digest(*data)
    )
    train(tmp_path / "state.pt", [network(), network()], seeds=[0, 1], epochs=1)
    assert len(hashed) == 2, "training and validation data"
    train(None, [network(), network()], seeds=[0, 1], epochs=1)
    assert len(hashed) == 2, "nothing without a checkpoint"


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


def flipped(whole, place):
    damaged = bytearray(whole)
    damaged[place] ^= 4
    return bytes(damaged)


def stop_after_two(epoch, model, record):
    if epoch == 2:
        raise KeyboardInterrupt


class Starting(Hook):
    """Changes the model before the first step."""

    @torch.no_grad()
    def start(self, model, optimizer):
        model[-1].bias.add_(1)


def assert_damaged(path):
    model = network()
    with pytest.raises(
        ValueError, match=r"checkpoint .*state\.pt cannot be read: dama"
    ):
        train(path, model, hooks=[Starting()])
    assert same_state(model, network())


def test_damaged_checkpoint_is_refused_and_the_model_stays(tmp_path):
    path = tmp_path / "state.pt"
    model, _ = train(path, callback=stop_after_two, hooks=[Starting()])
    whole = path.read_bytes()
    weights = model[-1].weight.detach().numpy().tobytes()
    places = {
        "records": whole.index(b'"history"'),
        "weights": whole.index(weights) + 3,
        "a name": whole.index(b"5.weight"),
        "checksum": len(whole) - 1,
    }
    damaged = {what: flipped(whole, place) for what, place in places.items()}
    damaged |= {f"at {n}": flipped(whole, n) for n in range(0, len(whole), 2003)}
    damaged |= {f"first {n}": whole[:n] for n in (0, 20, len(whole) // 2)}
    damaged |= {"longer": whole + b"0", "text": b'{"a": 1}', "old": whole[:-32]}
    for what, content in damaged.items():
        path.write_bytes(content)
        assert content != whole, what
        assert_damaged(path)
    path.write_bytes(whole)
    assert train(path, hooks=[Starting()])[1].provenance["resumed_after"] == [2]


@pytest.mark.parametrize("name", ["networks", "optimizer", "chance", "runs", "epoch"])
def test_checkpoint_that_lacks_something_is_refused(name, tmp_path):
    path = tmp_path / "state.pt"
    train(path, callback=stop_after_two, hooks=[Starting()])
    state = torch.load(path, weights_only=True)
    del state[name]
    torch.save(state, path)
    assert_damaged(path)


def test_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_FORMAT", "cpnb training 9")
        train(path)
    with pytest.raises(ValueError, match=r"has format 'cpnb training 9', expected 'cp"):
        train(path)


@pytest.mark.parametrize("fault", ["of another training: lr was", "cannot be read"])
def test_fault_in_a_later_checkpoint_leaves_all_networks(fault, tmp_path):
    path, seeds = tmp_path / "state.pt", [0, 1, 2]
    train(path, [network() for _ in seeds], seeds=seeds, callback=stop_after_two)
    train(path, [network() for _ in seeds], seeds=seeds, callback=stop_after_two)
    second = tmp_path / "state-1.pt"
    rates = [0.05, 0.05, 0.05]
    if fault == "cannot be read":
        second.write_bytes(flipped(second.read_bytes(), 3000))
    else:
        rates[1] = 0.06
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    models = [network() for _ in seeds]
    with pytest.raises(ValueError, match=rf"checkpoint .*state-1\.pt .*{fault}"):
        train(path, models, seeds=seeds, lr=rates)
    assert all(same_state(model, network()) for model in models)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_checkpoint_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"an existing folder\. Create"):
        train(tmp_path / "nowhere" / "state.pt")
