"""Training: the loop against plain torch, seeds, interruption, what it leaves alone."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cpnb.augmentation import Augment
from cpnb.data import Split, load_data
from cpnb.decay import param_groups
from cpnb.evaluation import accuracy, evaluate
from cpnb.hooks import Hook
from cpnb.models import DigitsNet
from cpnb.surgery import canonicalize
from cpnb.training import fast_mode, fit

QUIET = {"progress": False}
SGD = {"optimizer": "sgd", "lr": 0.1}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pair(n=30, features=6, classes=3, seed=0):
    """Random points with the classes of a fixed linear rule."""
    images = torch.randn(n, features, generator=seeded(seed))
    rule = torch.randn(features, classes, generator=seeded(100))
    return images, (images @ rule).argmax(1)


def small_net(dropout=0.0, seed=1):
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=seeded(seed))
    return model


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_fit_equals_a_plain_torch_loop():
    images, labels = pair()
    model, reference = small_net(), small_net()
    run = fit(
        model,
        (images, labels),
        epochs=3,
        batch_size=8,
        optimizer="sgd",
        lr=0.1,
        momentum=0.5,
        weight_decay=0.01,
        schedule="cosine",
        seed=4,
        **QUIET,
    )
    velocity = [torch.zeros_like(parameter) for parameter in reference.parameters()]
    generator, step = seeded(4), 0
    for epoch in range(3):
        losses, correct = 0.0, 0
        for index in torch.randperm(30, generator=generator).split(8):
            lr = 0.1 * (1 + math.cos(math.pi * step / 12)) / 2
            scores = reference(images[index])
            loss = F.cross_entropy(scores, labels[index])
            grads = torch.autograd.grad(loss, list(reference.parameters()))
            with torch.no_grad():
                for parameter, speed, grad in zip(
                    reference.parameters(), velocity, grads, strict=True
                ):
                    decay = 0.01 if parameter.ndim == 2 else 0.0  # not of biases
                    speed.mul_(0.5).add_(grad + decay * parameter)
                    parameter.sub_(lr * speed)
            losses += loss.item() * len(index)
            correct += (scores.argmax(1) == labels[index]).sum().item()
            step += 1
        record = run.history[epoch]
        assert record["train_loss"] == pytest.approx(losses / 30, rel=1e-5)
        assert record["train_accuracy"] == pytest.approx(correct / 30)
    torch.testing.assert_close(weights(model), weights(reference))


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop)]
)
def test_fit_optimizer_name_equals_torch_optimizer(name, kind):
    named, made = small_net(), small_net()
    fit(named, pair(), epochs=2, optimizer=name, lr=0.02, weight_decay=0.1, **QUIET)
    run = fit(
        made,
        pair(),
        epochs=2,
        optimizer=lambda parameters: kind(param_groups(made, 0.1), lr=0.02),
        **QUIET,
    )
    assert same(weights(named), weights(made))
    assert run.recipe["optimizer"] == kind.__name__
    assert run.recipe["lr"] == 0.02


def test_fit_default_recipe_trains_a_cp_network_on_real_digits(digits):
    model = canonicalize(DigitsNet(generator=seeded(0)), generator=seeded(0))
    before = accuracy(model, digits)
    run = fit(model, digits, epochs=8, **QUIET)
    assert before < 0.3
    assert accuracy(model, digits) > 0.93
    assert run.history[-1]["validation_accuracy"] == accuracy(model, digits)
    assert run.history[-1]["validation_loss"] == pytest.approx(
        evaluate(model, digits)["loss"], rel=1e-5
    )


def test_fit_never_reads_the_test_split():
    splits = {"train": pair(), "validation": pair(9, seed=2), "test": None}
    data = SimpleNamespace(name="points", **splits)
    with pytest.raises(TypeError, match="data is a NoneType"):
        accuracy(small_net(), data.test)
    run = fit(small_net(), data, epochs=1, **QUIET)
    assert run.recipe["images"] == [30, 9]
    assert run.recipe["data"] == "points"


def test_fit_records_no_validation_for_a_plain_pair_and_takes_one_given():
    run = fit(small_net(), pair(), epochs=1, **QUIET)
    assert run.history[0]["validation_loss"] is None
    model, held_out = small_net(), pair(9, seed=2)
    run = fit(model, pair(), validation=held_out, epochs=2, **QUIET)
    assert run.history[1]["validation_accuracy"] == accuracy(model, held_out)


def test_fit_repeats_with_the_seed_and_differs_with_another():
    models = [small_net(dropout=0.5) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        torch.rand(seed)  # the global state must not matter
        fit(model, pair(), epochs=2, seed=seed, **QUIET)
    first, again, other = map(weights, models)
    assert same(first, again)
    assert not same(first, other)


def test_fit_dropout_is_active_and_depends_on_the_seed():
    # One batch an epoch: the order of the images plays no part, only dropout does.
    scores = []
    for dropout, seed in ((0.5, 1), (0.5, 2), (0.0, 1), (0.0, 2)):
        model = small_net(dropout)
        fit(model, pair(), epochs=1, batch_size=30, seed=seed, **SGD, **QUIET)
        scores.append(model[2].bias.detach())
    assert not torch.allclose(scores[0], scores[1])
    torch.testing.assert_close(scores[2], scores[3])


@pytest.mark.parametrize("ending", ["finished", "interrupted", "diverged", "failed"])
def test_fit_puts_back_random_state_and_training_flags(ending):
    model = small_net(dropout=0.5).train()
    model[1].eval()

    def stop(epoch, model, record):
        if ending == "interrupted":
            raise KeyboardInterrupt
        if ending == "failed":
            raise RuntimeError("callback")

    lr = math.sqrt(torch.finfo(torch.float32).max) if ending == "diverged" else 0.1
    arguments = {"epochs": 2, "optimizer": "sgd", "lr": lr, "callback": stop, **QUIET}
    state = torch.get_rng_state()
    if ending == "failed":
        with pytest.raises(RuntimeError, match="callback"):
            fit(model, pair(), **arguments)
    else:
        assert fit(model, pair(), **arguments).status == ending
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model] == [True, False, True]
    assert model.training


def test_fit_returns_the_completed_epochs_when_interrupted_in_a_step():
    model, calls = small_net(), []

    class Interrupting(torch.optim.SGD):
        def step(self):
            calls.append(len(calls))
            if len(calls) == 6:  # second of the four steps of epoch 2
                raise KeyboardInterrupt
            super().step()

    run = fit(
        model,
        pair(),
        epochs=5,
        batch_size=8,
        optimizer=lambda parameters: Interrupting(parameters, lr=0.1),
        schedule=None,
        **QUIET,
    )
    assert run.status == "interrupted"
    assert [record["epoch"] for record in run.history] == [1]
    assert not same(weights(model), weights(small_net()))


def test_fit_records_divergence_and_keeps_finite_history():
    run = fit(small_net(), pair(), epochs=9, optimizer="sgd", lr=1e30, **QUIET)
    assert run.status == "diverged"
    assert len(run.history) < 9
    assert "diverged" in run.to_json()


def test_fit_leaves_frozen_parameters_alone():
    model = small_net()
    model[0].weight.requires_grad_(False)
    before = weights(model)
    run = fit(model, pair(), epochs=1, **QUIET)
    assert torch.equal(before[0], model[0].weight)
    assert not torch.equal(before[1], model[0].bias)
    assert run.recipe["trained_parameters"] == 8 + 3 * 8 + 3


def test_fit_calls_back_after_each_epoch_with_its_record():
    model, seen = small_net(), []

    def collect(epoch, trained, record):
        seen.append((epoch, record, weights(trained)))

    run = fit(model, pair(), epochs=3, callback=collect, **QUIET)
    assert [epoch for epoch, _, _ in seen] == [1, 2, 3]
    assert [record for _, record, _ in seen] == run.history
    assert not same(seen[0][2], seen[1][2])
    assert same(seen[2][2], weights(model))


class LayoutProbe(nn.Module):
    """Remembers the strides and dtype of the images it gets."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 3, 4, dtype=torch.float64)
        self.seen = set()

    def forward(self, images):
        self.seen.add((images.stride()[1:], images.dtype, self.training))
        return self.conv(images).flatten(1)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("augment", [None, Augment(crop=1)], ids=["plain", "augmented"])
def test_fit_gives_images_in_the_layout_asked_for_and_in_the_models_dtype(
    channels, last, augment
):
    images = torch.randn(5, channels, 4, 4, generator=seeded(0))
    data = images, torch.tensor([0, 1, 2, 0, 1])
    model = LayoutProbe(channels)
    options = {"channels_last": last, "augment": augment, "batch_size": 2, **QUIET}
    fit(model, data, validation=data, epochs=1, **options)
    strides = (1, 4 * channels, channels) if last else (16, 4, 1)
    assert {(stride, dtype) for stride, dtype, _ in model.seen} == {
        (strides, torch.float64)
    }
    assert {training for _, _, training in model.seen} == {True, False}
    assert images.is_contiguous()


def test_fit_agrees_in_both_layouts():
    data = torch.randn(8, 1, 8, 8, generator=seeded(0)).double(), torch.arange(8)
    models = [DigitsNet(generator=seeded(1)).double() for _ in range(2)]
    for model, last in zip(models, (True, False), strict=True):
        fit(model, data, epochs=1, lr=1e-3, channels_last=last, **QUIET)
    torch.testing.assert_close(weights(models[0]), weights(models[1]))


def test_fit_progress_bar_ends_with_the_last_numbers(capsys):
    run = fit(small_net(), pair(), validation=pair(9), epochs=2, progress=True)
    text = capsys.readouterr().err.split("\r")[-1]
    last = run.history[-1]
    assert "epoch 2/2" in text
    assert "60/60" in text
    assert f"loss {last['train_loss']:.3f}" in text
    assert f"validation {last['validation_accuracy']:.1%}" in text
    fit(small_net(), pair(), epochs=1, progress=False)
    assert capsys.readouterr().err == ""


def test_fit_recipe_names_what_was_used():
    run = fit(small_net(), pair(), epochs=1, optimizer="adam", momentum=0.4, **QUIET)
    expected = {
        "model": "Sequential",
        "trained_parameters": 6 * 8 + 8 + 8 * 3 + 3,
        "data": "pair of tensors",
        "data_seed": None,
        "images": [30],
        "epochs": 1,
        "batch_size": 32,
        "optimizer": "adam",
        "lr": 0.003,
        "momentum": None,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "seed": 0,
        "augment": None,
        "amp": None,
        "compile": False,
        "cuda_graph": False,
        "hooks": [],
        "channels_last": True,
    }
    assert run.recipe == expected
    assert run.provenance["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"epochs": 0}, ValueError, "epochs is 0, expected at least 1"),
        ({"epochs": 2.0}, TypeError, "epochs is 2.0, expected an int"),
        ({"seed": None}, TypeError, "seed is None, expected an int"),
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected at least 1"),
        ({"lr": 0.0}, ValueError, "lr is 0.0, expected a number above 0"),
        ({"lr": math.nan}, ValueError, "lr is nan, expected a number above 0"),
        ({"lr": math.inf}, ValueError, "lr is inf, expected a number above 0"),
        ({"lr": "fast"}, TypeError, "lr is 'fast', expected a number"),
        ({"momentum": 1.0}, ValueError, "momentum is 1.0, expected a number from 0 to"),
        ({"weight_decay": -1}, ValueError, "weight_decay is -1, expected a number at"),
        ({"optimizer": "lion"}, ValueError, "optimizer is 'lion', expected one of 'ad"),
        ({"optimizer": list}, TypeError, "optimizer returned a list, expected a torch"),
        ({"schedule": "steps"}, ValueError, "schedule is 'steps', expected one of No"),
        ({"augment": True}, TypeError, "augment is True, expected a cpnb.Augment or"),
        ({"augment": Augment()}, ValueError, "images have shape (30, 6), expected (n"),
        ({"amp": 1}, ValueError, "amp is 1, expected False, True, 'bfloat16"),
        ({"amp": "half"}, ValueError, "amp is 'half', expected False, True, 'bfloat16"),
        ({"cuda_graph": True}, ValueError, "cuda_graph is True with a cpu device, exp"),
        ({"callback": 1}, TypeError, "callback is a int, expected a function of epoch"),
        ({"hooks": [len]}, TypeError, "hooks[0] is a builtin_function_or_method, exp"),
        ({"hooks": Hook()}, TypeError, "hooks is a single hook, expected a list"),
        ({"data": "digits"}, TypeError, "data is a str, expected a data set"),
        ({"data": pair(classes=9)}, ValueError, "labels contain class 8, but the mod"),
        ({"validation": pair(classes=9)}, ValueError, "labels contain class 8, but"),
        ({"validation": pair(features=5)}, RuntimeError, "shapes cannot be multiplied"),
    ],
)
def test_fit_refuses_before_anything_changes(arguments, error, text):
    model = small_net().eval()
    before, state = weights(model), torch.get_rng_state()
    with pytest.raises(error, match=re.escape(text)):
        fit(model, **{"data": pair(), **arguments})
    assert same(before, weights(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in model.modules())


def test_fit_refuses_what_cannot_be_trained():
    with pytest.raises(ValueError, match="model has no parameters to train, expected"):
        fit(nn.Flatten(), pair())
    with pytest.raises(TypeError, match=re.escape("expected a torch.nn.Module")):
        fit(torch.relu, pair())


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", True), ("True", True), (" on ", True), ("0", False), ("no", False)],
)
def test_fast_mode_reads_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("CPNB_FAST", value)
    assert fast_mode() is expected
    monkeypatch.delenv("CPNB_FAST")
    assert fast_mode() is False


def test_fast_mode_refuses_what_is_neither_yes_nor_no(monkeypatch):
    monkeypatch.setenv("CPNB_FAST", "fast")
    with pytest.raises(ValueError, match="CPNB_FAST is 'fast', expected 1 or 0"):
        fast_mode()


class ViewNet(nn.Module):
    """Flattens with ``view``, which the channels_last layout does not allow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 36, 10)

    def forward(self, images):
        hidden = self.conv(images).relu()
        return self.fc(hidden.view(hidden.size(0), -1))


@pytest.mark.parametrize("augment", [None, Augment(crop=1, flip=False)])
@pytest.mark.parametrize("last", [True, False])
def test_fit_trains_a_network_that_calls_view(digits, augment, last):
    images, labels = digits.train
    few = Split(images[:64], labels[:64], digits.mean, digits.std)
    run = fit(ViewNet(), few, epochs=1, augment=augment, channels_last=last, **QUIET)
    assert run.status == "finished"
    assert run.recipe["channels_last"] is False


def test_fit_takes_a_single_image_left_over_into_the_batch_before():
    """Batch norm cannot normalise one row, and the weights would be half trained."""
    rows, labels = torch.randn(65, 6), torch.arange(65) % 3
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    sizes = []
    model.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0])) if module.training else None
    )
    run = fit(model, (rows, labels), epochs=1, batch_size=32, progress=False)
    assert run.status == "finished"
    assert sizes == [32, 33]


def test_fit_takes_numpy_integers():
    import numpy as np

    pair = torch.randn(8, 6), torch.arange(8) % 3
    counts = {"epochs": np.int64(1), "batch_size": np.int32(4), "seed": np.int64(0)}
    run = fit(nn.Linear(6, 3), pair, **counts, progress=False)
    assert json.loads(json.dumps(run.recipe))["batch_size"] == 4


class Diary(Hook):
    """Writes down every call, and can end the training in a step."""

    def __init__(self, name="", ending=None, at=None):
        self.name, self.ending, self.at, self.calls = name, ending, at, []

    def start(self, model, optimizer):
        self.calls.append("start")

    def before_forward(self, model, step):
        self.calls.append(f"forward {step}")

    def before_step(self, model, optimizer, step):
        self.calls.append(f"step {step}")
        if step == self.at:
            raise self.ending

    def after_step(self, model, optimizer, step):
        self.calls.append(f"after {step}")

    def stop(self, model):
        self.calls.append("stop")


def test_fit_calls_hooks_around_each_step_and_those_of_the_model_too():
    model, given, own = small_net(), Diary(), Diary()
    model.training_hooks = [own]
    run = fit(model, pair(), epochs=2, batch_size=15, hooks=[given], **QUIET)
    steps = [f"{what} {n}" for n in range(4) for what in ("forward", "step", "after")]
    assert given.calls == own.calls == ["start", *steps, "stop"]
    assert run.recipe["hooks"] == ["Diary()", "Diary()"]


def test_fit_hooks_change_gradients_before_and_weights_after_the_step():
    class Freeze(Hook):
        def before_step(self, model, optimizer, step):
            model[0].weight.grad.zero_()

        def after_step(self, model, optimizer, step):
            with torch.no_grad():
                model[2].bias.fill_(step)

    model, before = small_net(), small_net()
    fit(model, pair(), epochs=1, batch_size=10, hooks=[Freeze()], **SGD, **QUIET)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[0].bias, before[0].bias)
    assert model[2].bias.tolist() == [2, 2, 2]


class Narrowing(Augment):
    """Returns images that the network has no weights for."""

    def apply(self, images, draws):
        return super().apply(images, draws)[..., 1:]


def test_fit_tries_an_augmented_image_before_anything_starts(digits):
    hook = Diary()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(LeNetLike(), digits, augment=Narrowing(crop=1), hooks=[hook], **QUIET)
    assert hook.calls == []


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), ArithmeticError("here")])
def test_fit_stops_hooks_once_whatever_happens(ending):
    hook = Diary(ending=ending, at=1)
    arguments = {"epochs": 2, "batch_size": 15, "hooks": [hook], **QUIET}
    if isinstance(ending, KeyboardInterrupt):
        assert fit(small_net(), pair(), **arguments).status == "interrupted"
    else:
        with pytest.raises(ArithmeticError, match="here"):
            fit(small_net(), pair(), **arguments)
    assert hook.calls[-2:] == ["step 1", "stop"]
    assert hook.calls.count("stop") == 1


def test_fit_reads_pixels_as_the_standardised_images(digits):
    models = [DigitsNet(generator=seeded(1)) for _ in range(2)]
    split = digits.train
    standardised = split.standardized(), split.labels
    for model, data in zip(models, (digits, standardised), strict=True):
        fit(model, data, validation=digits.validation, epochs=1, **QUIET)
    assert same(weights(models[0]), weights(models[1]))


class Memory(nn.Module):
    """Remembers what it is trained on."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.seen = []

    def forward(self, images):
        if self.training:
            self.seen.append(images)
        return self.head(images.mean((2, 3)))


@pytest.mark.parametrize("last", [True, False])
def test_fit_augments_pixels_before_it_standardises_them(last):
    pixels = torch.randint(0, 256, (10, 3, 5, 5), generator=seeded(0)).byte()
    mean, std = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
    split = Split(pixels, torch.arange(10) % 3, mean, std)
    model, augment = Memory(), Augment(crop=2, cutout=2)
    options = {"channels_last": last, "batch_size": 4, "epochs": 2, **QUIET}
    run = fit(model, split, augment=augment, **options)
    assert run.recipe["augment"] == {"crop": 2, "flip": True, "cutout": 2}
    seen = torch.cat(model.seen)
    assert seen.shape == (20, 3, 5, 5)
    assert model.seen[0].stride()[1] == (1 if last else 25)
    # Every image is one of the ten, changed in one of the possible ways.
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    found = (seen * scale + shift).round().byte()
    places = torch.cartesian_prod(*map(torch.arange, (5, 5, 2, 5, 5)))
    every = [
        augment.apply(image.expand(len(places), -1, -1, -1), places) for image in pixels
    ]
    for image in found:
        assert any((image == ways).flatten(1).all(1).any() for ways in every)
    assert not torch.equal(seen[:10].sort(0)[0], seen[10:].sort(0)[0])


class PrecisionProbe(nn.Module):
    """Remembers the dtype that its layer computes in."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.seen = set()

    def forward(self, rows):
        hidden = self.body(rows)
        self.seen.add((hidden.dtype, self.training))
        return self.head(hidden.relu())


@pytest.mark.parametrize("amp", ["bfloat16", "float16", True])
def test_fit_trains_in_mixed_precision_and_evaluates_in_full(amp):
    torch.manual_seed(0)
    models = PrecisionProbe(), PrecisionProbe()
    models[1].load_state_dict(models[0].state_dict())
    options = {"validation": pair(9), "epochs": 4, "batch_size": 8, **SGD, **QUIET}
    gradients = [], []

    class Watch(Hook):
        def __init__(self, kept):
            self.kept = kept

        def before_step(self, model, optimizer, step):
            self.kept.append(model.head.weight.grad.clone())

    plain = fit(models[0], pair(), hooks=[Watch(gradients[0])], **options)
    mixed = fit(models[1], pair(), hooks=[Watch(gradients[1])], amp=amp, **options)
    half = torch.float16 if amp == "float16" else torch.bfloat16
    assert models[1].seen == {(half, True), (torch.float32, False)}
    assert all(p.dtype == torch.float32 for p in models[1].parameters())
    # Bfloat16 keeps 8 bits; the loss scale of float16 is out before the hooks.
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=0.05, atol=0.01)
    assert mixed.history[-1]["train_loss"] == pytest.approx(
        plain.history[-1]["train_loss"], rel=0.05
    )
    assert mixed.recipe["amp"] == str(half).removeprefix("torch.")


def test_fit_stops_within_an_epoch_once_the_loss_is_not_finite():
    hook = Diary()
    settings = {"optimizer": "sgd", "lr": 1e30, "schedule": None}
    run = fit(
        small_net(),
        pair(400),
        epochs=3,
        batch_size=2,
        hooks=[hook],
        **settings,
        **QUIET,
    )
    assert run.status == "diverged"
    assert run.history == []
    assert hook.calls[-2:] == ["after 49", "stop"]  # of 200 steps


def test_fit_compiled_agrees_with_plain(digits, monkeypatch):
    models = [DigitsNet(generator=seeded(1)) for _ in range(2)]
    backends = []
    compiler = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model: backends.append(1) or compiler(model, backend="eager"),
    )
    small = digits.train.images[:64], digits.train.labels[:64]
    data = Split(*small, digits.train.mean, digits.train.std)
    for model, compiled in zip(models, (False, True), strict=True):
        run = fit(model, data, epochs=1, compile=compiled, **QUIET)
        assert run.recipe["compile"] is compiled
    assert backends == [1]
    torch.testing.assert_close(weights(models[0]), weights(models[1]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_fit_captures_a_graph_on_a_device_that_is_not_the_current_one(digits):
    model = LeNetLike().to("cuda:1")
    run = fit(model, digits.to("cuda:1"), epochs=2, cuda_graph=True, **QUIET)
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("amp", [False, "bfloat16"])
def test_fit_captured_in_a_cuda_graph_agrees_with_plain(digits, optimizer, amp):
    models = [LeNetLike().cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    runs = [
        fit(
            model,
            digits.to("cuda"),
            epochs=3,
            lr=0.003,
            optimizer=optimizer,
            augment=Augment(crop=1, flip=False),
            amp=amp,
            cuda_graph=captured,
            **QUIET,
        )
        for model, captured in zip(models, (False, True), strict=True)
    ]
    for plain, captured in zip(runs[0].history, runs[1].history, strict=True):
        assert captured["train_loss"] == pytest.approx(plain["train_loss"], rel=0.05)


class LeNetLike(nn.Sequential):
    """Convolution, batch norm and dropout for 8×8 images."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(8 * 36, 10),
        )
