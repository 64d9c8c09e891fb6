"""Training: the loop against plain torch, seeds, interruption, what it leaves alone."""

import copy
import math
import re
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
from shared import seeded
from torch import nn
from torch.nn import functional as F

from cpnb.convert import canonicalize
from cpnb.train.batches import Augment
from cpnb.train.data import load_data
from cpnb.train.evaluation import accuracy, evaluate
from cpnb.train.loop import fast_mode, fit
from cpnb.train.models import DigitsNet

QUIET = {"progress": False}
DIGITS = load_data("digits")
SGD = {"optimizer": "sgd", "lr": 0.1}
CALLS = ["start", "before_forward", "before_step", "after_step", "after_epoch", "stop"]


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
    return all(map(torch.equal, first, second))


def test_fit_equals_a_plain_torch_loop():
    images, labels = pair()
    model, reference = small_net(), small_net()
    settings = {"epochs": 3, "batch_size": 8, "lr": 0.1, "momentum": 0.5}
    settings |= {"optimizer": "sgd", "weight_decay": 0.01, "seed": 4}
    run = fit(model, (images, labels), schedule="cosine", **settings, **QUIET)
    groups = [  # no decay of biases
        {"params": [reference[0].weight, reference[2].weight], "weight_decay": 0.01},
        {"params": [reference[0].bias, reference[2].bias]},
    ]
    sgd = torch.optim.SGD(groups, momentum=0.5)
    generator, step = seeded(4), 0
    for record in run.history:
        losses, correct = 0.0, 0
        for index in torch.randperm(30, generator=generator).split(8):
            for group in sgd.param_groups:
                group["lr"] = 0.1 * (1 + math.cos(math.pi * step / 12)) / 2
            scores = reference(images[index])
            loss = F.cross_entropy(scores, labels[index])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses += loss.item() * len(index)
            correct += (scores.argmax(1) == labels[index]).sum().item()
            step += 1
        assert record["train_loss"] == pytest.approx(losses / 30, rel=1e-5)
        assert record["train_accuracy"] == pytest.approx(correct / 30)
    torch.testing.assert_close(weights(model), weights(reference))


def test_fit_default_recipe_trains_a_cp_network_on_real_digits():
    model = canonicalize(DigitsNet(generator=seeded(0)), generator=seeded(0))
    assert accuracy(model, DIGITS) < 0.3
    last = fit(model, DIGITS, epochs=8, **QUIET).history[-1]
    measured = evaluate(model, DIGITS)
    assert measured["accuracy"] > 0.93
    assert last["validation_accuracy"] == measured["accuracy"]
    assert last["validation_loss"] == pytest.approx(measured["loss"], rel=1e-5)


def test_fit_evaluates_what_it_is_given_and_never_the_test_split():
    splits = {"train": pair(), "validation": pair(9, seed=2), "test": None}
    run = fit(small_net(), SimpleNamespace(name="x", **splits), epochs=1, **QUIET)
    assert (run.recipe["images"], run.recipe["data"]) == ([30, 9], "x")
    (record,) = fit(small_net(), pair(), epochs=1, **QUIET).history
    assert record["validation_loss"] is None
    model, held_out = small_net(), pair(9, seed=2)
    run = fit(model, pair(), validation=held_out, epochs=2, **QUIET)
    assert run.history[1]["validation_accuracy"] == accuracy(model, held_out)


def test_fit_repeats_with_the_seed_whose_dropout_differs_from_another():
    biases = []
    for dropout, seed in ((0.5, 1), (0.5, 1), (0.5, 2), (0.0, 1), (0.0, 2)):
        model = small_net(dropout)
        torch.rand(seed)  # the global state must not matter
        # One batch an epoch: the order of the images plays no part, only dropout does.
        fit(model, pair(), epochs=1, batch_size=30, seed=seed, **SGD, **QUIET)
        biases.append(model[2].bias.detach())
    assert torch.equal(biases[0], biases[1])
    assert not torch.allclose(biases[0], biases[2])
    torch.testing.assert_close(biases[3], biases[4])


def acting_hook(act, at):
    """A hook that acts on the model after one step."""
    hook = Mock(spec=CALLS)
    hook.after_step.side_effect = lambda model, _, step: step == at and act(model)
    return hook


def spoil(model):
    nn.init.constant_(model[0].weight, math.nan)


@pytest.mark.parametrize(
    ("ending", "act", "epochs"),
    [
        ("finished", len, 3),
        ("diverged", spoil, 1),
        ("interrupted", Mock(side_effect=KeyboardInterrupt), 1),
        ("failed", Mock(side_effect=ArithmeticError("here")), 1),
    ],
)
def test_fit_keeps_epochs_puts_back_states_and_stops_hooks(ending, act, epochs):
    model = small_net(dropout=0.5).train()
    model[1].eval()
    hook = acting_hook(act, at=3)  # the last step of the second epoch
    arguments = {"validation": pair(9), "epochs": 3, "batch_size": 15, **SGD, **QUIET}
    before, state = weights(model), torch.get_rng_state()
    if ending == "failed":
        with pytest.raises(ArithmeticError, match="here"):
            fit(model, pair(), hooks=[hook], **arguments)
    else:
        run = fit(model, pair(), hooks=[hook], **arguments)
        assert (run.status, len(run.history)) == (ending, epochs)
    assert not same(weights(model), before)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    hook.stop.assert_called_once_with(model)


def test_fit_recipe_names_what_was_used():
    settings = {"epochs": 1, "batch_size": 500, "seed": 3, "lr": 0.01}
    settings |= {"schedule": None, "weight_decay": 0.1}
    run = fit(DigitsNet(), DIGITS, augment=Augment(crop=1), **settings, **QUIET)
    assert run.recipe == settings | {
        **{"model": "DigitsNet", "data": "digits", "data_seed": 0},
        **{"images": [1079, 359], "optimizer": "adam", "momentum": None},
        **{"augment": {"crop": 1, "flip": True, "cutout": 0}, "hooks": []},
        **{"amp": False, "compile": False},
    }
    made = fit(small_net(), pair(), epochs=1, optimizer=torch.optim.SGD, **QUIET)
    used = [made.recipe[name] for name in ("optimizer", "lr", "weight_decay")]
    assert used == ["SGD", 0.001, None]


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_fit_leaves_frozen_submodules_in_eval_mode(mode):
    backbone = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)).requires_grad_(False)
    model = nn.Sequential(backbone, nn.Dropout(0.5), nn.Linear(6, 3)).train(mode)
    backbone.eval()
    before, seen = copy.deepcopy(backbone.state_dict()), set()

    def note(head, inputs):
        seen.add(tuple(m.training for m in (backbone, *backbone, *model[1:])))

    model[2].register_forward_pre_hook(note)
    fit(model, pair(), epochs=2, callback=lambda *_: model.eval(), **QUIET)
    # All in evaluation mode where a first image is tried.
    assert seen == {(False,) * 5, (False, False, False, True, True)}
    assert same(before.values(), backbone.state_dict().values())
    assert [m.training for m in model.modules()] == [mode, *[False] * 3, mode, mode]


def test_fit_says_at_which_step_and_rate_it_diverged_and_what_to_try():
    settings = {"epochs": 3, "batch_size": 10, "schedule": "step", **SGD}
    # Nine steps; the rate falls after 5 and after 7. NaN weights spoil the next loss.
    hook = acting_hook(spoil, at=6)
    run = fit(small_net(), pair(), hooks=[hook], **settings, **QUIET)
    assert (run.status, len(run.history)) == ("diverged", 2)
    assert run.message == (
        "The loss was no longer finite at step 7 (in epoch 3), at a learning rate of "
        "0.001. Build the network anew and try a smaller lr, such as 0.0001."
    )
    assert run.message in repr(run)


def test_fit_calls_back_after_each_epoch_with_its_record():
    model, callback = small_net(), Mock()
    run = fit(model, pair(), epochs=3, callback=callback, **QUIET)
    expected = [call(n, model, record) for n, record in enumerate(run.history, 1)]
    assert callback.call_args_list == expected and len(expected) == 3


def test_fit_calls_hooks_around_each_step_and_those_of_the_model_first():
    model, both = small_net(), Mock()
    both.attach_mock(Mock(spec=CALLS), "own")
    both.attach_mock(Mock(spec=CALLS), "given")
    model.training_hooks = [both.own]
    both.own.before_step.side_effect = lambda net, *_: net[0].weight.grad.zero_()
    both.given.after_step.side_effect = lambda net, _, n: net[2].bias.data.fill_(n)
    settings = {"epochs": 2, "batch_size": 15, "hooks": [both.given], **SGD, **QUIET}
    run = fit(model, pair(), **settings)
    epoch = [*CALLS[1:4], *CALLS[1:4], "after_epoch"]
    calls = [name for name, *_ in both.method_calls]
    expected = [f"{who}.{n}" for n in ["start", *epoch * 2] for who in ("own", "given")]
    assert calls == [*expected, "given.stop", "own.stop"]
    steps = [each.args[-1] for each in both.given.after_step.call_args_list]
    assert steps == [0, 1, 2, 3]
    # Gradients change before a step, weights after it.
    assert torch.equal(model[0].weight, small_net()[0].weight)
    assert not torch.equal(model[0].bias, small_net()[0].bias)
    assert model[2].bias.tolist() == [3, 3, 3]
    assert run.recipe["hooks"] == [str(both.own), str(both.given)]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"hooks": [len]}, TypeError, "in hooks has none of start, before_forward"),
        ({"data": pair(classes=9)}, ValueError, "as the labels go up to 8"),
        ({"validation": pair(classes=9)}, ValueError, "as the labels go up to 8"),
        ({"validation": pair(features=5)}, RuntimeError, "shapes cannot be multiplied"),
    ],
    ids=["hook", "labels", "validation", "shape"],
)
def test_fit_refuses_before_anything_changes(arguments, error, text):
    model = small_net().eval()
    model[1].train()
    before, state = weights(model), torch.get_rng_state()
    with pytest.raises(error, match=re.escape(text)):
        fit(model, **{"data": pair(), **arguments})
    assert same(before, weights(model))
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [False, False, True, False]


def test_fit_trains_in_bfloat16_and_evaluates_in_full():
    plain, model, seen = small_net(), small_net(), set()
    model[0].register_forward_hook(lambda m, _, out: seen.add((out.dtype, m.training)))
    options = {"validation": pair(9), "epochs": 4, "batch_size": 8, **SGD, **QUIET}
    loss = fit(plain, pair(), **options).history[-1]["train_loss"]
    mixed = fit(model, pair(), amp=True, **options).history[-1]["train_loss"]
    assert seen == {(torch.bfloat16, True), (torch.float32, False)}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert mixed == pytest.approx(loss, rel=0.05)  # bfloat16 keeps 8 bits


def test_fit_compiled_agrees_with_plain(monkeypatch):
    modes, compiler = [], torch.compile

    def eagerly(model, mode):
        modes.append(mode)
        return compiler(model, backend="eager")

    monkeypatch.setattr(torch, "compile", eagerly)
    models = [small_net() for _ in range(3)]
    for model, compile in zip(models, (False, True, "reduce-overhead"), strict=True):
        run = fit(model, pair(), epochs=1, compile=compile, **QUIET)
        assert run.recipe["compile"] is compile
        torch.testing.assert_close(weights(model), weights(models[0]))
    assert modes == [None, "reduce-overhead"]


@pytest.mark.parametrize("value", ["1", "True", "0", "no", ""])
def test_fast_mode_reads_the_environment(monkeypatch, value):
    monkeypatch.setenv("CPNB_FAST", value)
    assert fast_mode() is (value in ("1", "True"))
