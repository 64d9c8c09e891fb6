"""Several networks at once: one graph against one after the other, and when not."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import cpnb
from cpnb._training.steps import Step
from cpnb.augmentation import Augment
from cpnb.data import Split
from cpnb.evaluation import evaluate
from cpnb.hooks import Hook
from cpnb.training import fit

SEEDS = (3, 8, 11)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(n=22, seed=0):
    images = torch.randint(0, 256, (n, 2, 6, 6), generator=generator(seed)).byte()
    return Split(images, torch.arange(n) % 3, (120.0, 130.0), (70.0, 75.0))


def network(seed, dropout=0.0, mode="auto"):
    """CP and dense layers, batch norm in two and one dimensions, a frozen bias."""
    source = generator(seed)
    model = nn.Sequential(
        cpnb.CPConv2d(2, 5, 3, rank=6, forward_mode=mode, generator=source),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Dropout2d(dropout),
        nn.Conv2d(5, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        cpnb.CPLinear(16, 6, rank=4, forward_mode=mode, generator=source),
        nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    )
    with torch.no_grad():
        for layer in (model[4], model[10]):
            layer.weight.normal_(0, 0.3, generator=source)
            layer.bias.zero_()
    model[4].bias.requires_grad_(False)
    return model.double()


def train(models, **options):
    settings = {
        "seeds": SEEDS[: len(models)],
        "validation": pixels(9, 1),
        "epochs": 3,
        "batch_size": 8,
        "optimizer": "sgd",
        "lr": 0.05,
        "progress": False,
        **options,
    }
    return fit(models, pixels(), **settings)


def assert_same(models, others, runs, expected):
    for model, other, run, wanted in zip(models, others, runs, expected, strict=True):
        # Adam divides the gradient of a bias before batch norm, which is rounding
        # noise, by its own size.
        assert_close(model.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-8)
        assert run.status == wanted.status
        for record, right in zip(run.history, wanted.history, strict=True):
            measured = {name: record[name] for name in record if name != "seconds"}
            # The sums of an epoch are kept in float32.
            assert measured == pytest.approx({n: right[n] for n in measured}, rel=1e-5)


@pytest.mark.parametrize(("mode", "dropout"), [("dense", 0.3), ("chain", 0.0)])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "schedule": "one-cycle", "weight_decay": 0.01},
        {
            "optimizer": "adam",
            "lr": (0.01, 0.01, 0.02),
            "augment": Augment(1, cutout=2),
        },
        {"optimizer": "rmsprop", "lr": [0.001, 0.002, 0.001], "schedule": "step"},
    ],
    ids=lambda options: options["optimizer"],
)
def test_one_graph_equals_one_network_after_the_other(options, mode, dropout):
    together, apart, alone = (
        [network(seed, dropout, mode) for seed in range(3)] for _ in range(3)
    )
    runs = train(together, vectorise=True, **options)
    expected = train(apart, vectorise=False, **options)
    assert [run.recipe["members"] for run in runs] == ["vectorised"] * 3
    assert [run.recipe["members"] for run in expected] == ["sequential"] * 3
    assert_same(together, apart, runs, expected)
    # Each is also what fit makes of one network, and no two are alike.
    rates = options.get("lr", [0.05] * 3)
    shared = {"epochs": 3, "batch_size": 8, "progress": False, **options}
    shared["validation"] = pixels(9, 1)
    singles = [
        fit(model, pixels(), **{**shared, "seed": seed, "lr": rate})
        for model, seed, rate in zip(alone, SEEDS, rates, strict=True)
    ]
    assert_same(apart, alone, expected, singles)
    assert [run.recipe["lr"] for run in runs] == list(rates)
    assert not torch.allclose(together[0][10].bias, together[1][10].bias)


def test_one_graph_trains_networks_with_parametrizations():
    together = [network(seed) for seed in range(2)]
    for model in together:
        parametrizations.weight_norm(model[4])
        parametrizations.orthogonal(model[10])
    apart = copy.deepcopy(together)
    runs = train(together, vectorise=True)
    assert_same(together, apart, runs, train(apart, vectorise=False))


@pytest.mark.parametrize("name", cpnb.NORMALIZERS)
def test_one_graph_trains_the_normalizers_it_can(name):
    """Spectral norm writes its buffers with ``out=``; scaling acts through a hook."""
    digits = cpnb.load_data("digits", train_size=40)
    options = {"data": digits.train.standardized()} if "data" in name else {}
    if name in ("weight_data_init", "spectral", "canonical"):
        options["generator"] = generator()
    together = [
        cpnb.normalize(cpnb.DigitsNet(generator=generator(seed)), name, **options)
        for seed in range(2)
    ]
    together = [model.double() for model in together]
    apart, shared = copy.deepcopy(together), {"seeds": (1, 2), "epochs": 1, "lr": 1e-3}
    shared |= {"optimizer": "sgd", "progress": False}
    if name in ("spectral", "scaling"):
        with pytest.raises(ValueError, match=r"hooks act|torch\.vmap fails: Batching"):
            cpnb.fit(together, digits, vectorise=True, **shared)
    else:
        runs = cpnb.fit(together, digits, vectorise=True, **shared)
        assert_same(together, apart, runs, cpnb.fit(apart, digits, **shared))


def test_one_graph_records_and_evaluates_each_network():
    models, seen = [network(seed).eval() for seed in range(2)], []
    models[1][1].train()

    def watch(epoch, model, record):
        seen.append((epoch, models.index(model), record))

    runs = train(models, vectorise=True, callback=watch, epochs=2)
    assert [(epoch, n) for epoch, n, _ in seen] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [record for _, _, record in seen[::2]] == runs[0].history
    for model, run in zip(models, runs, strict=True):
        held_out = evaluate(model, pixels(9, 1))
        assert run.history[-1]["validation_loss"] == pytest.approx(held_out["loss"])
    seconds = [[record["seconds"] for record in run.history] for run in runs]
    assert seconds[0] == seconds[1]  # each a half of what both took
    assert [run.recipe["seed"] for run in runs] == [3, 8]
    assert runs[0].recipe["members_reason"] == "asked for"
    assert [layer.training for layer in models[0]] == [False] * 11
    assert [layer.training for layer in models[1]] == [False, True] + [False] * 9


@pytest.mark.parametrize("vectorise", [True, False])
def test_a_diverging_network_leaves_the_others_alone(vectorise):
    models = [network(seed) for seed in range(3)]
    others = [network(seed) for seed in (0, 2)]
    rates = (0.05, 1e300, 0.05)
    runs = train(models, lr=rates, vectorise=vectorise)
    assert [run.status for run in runs] == ["finished", "diverged", "finished"]
    assert len(runs[1].history) < 3
    assert "NaN" not in runs[1].to_json()
    expected = train(others, seeds=(SEEDS[0], SEEDS[2]), vectorise=vectorise)
    assert_same(models[::2], others, runs[::2], expected)


def test_networks_that_all_diverge_end_the_training():
    runs = train([network(0), network(1)], lr=1e300, epochs=50, vectorise=True)
    assert [run.status for run in runs] == ["diverged"] * 2


@pytest.mark.parametrize("vectorise", [True, False])
def test_networks_resume_to_the_same_curves(vectorise, tmp_path):
    whole, models = ([network(seed, 0.3) for seed in range(3)] for _ in range(2))
    options = {"vectorise": vectorise, "lr": (0.05, 1e300, 0.02), "epochs": 4}
    expected = train(whole, **options)
    path, calls = tmp_path / "state.pt", []

    def stop(epoch, model, record):
        calls.append(epoch)
        if len(calls) == 5:
            raise KeyboardInterrupt

    runs = train(models, checkpoint=path, callback=stop, **options)
    assert "interrupted" in {run.status for run in runs}
    fresh = [network(seed, 0.3) for seed in range(3)]
    runs = train(fresh, checkpoint=path, **options)
    assert_same(fresh[::2], whole[::2], runs[::2], expected[::2])
    assert [run.status for run in runs] == ["finished", "diverged", "finished"]
    names = ["state.pt"] if vectorise else [f"state-{n}.pt" for n in range(3)]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    # A second time everything is there already.
    fresh = [network(seed, 0.3) for seed in range(3)]
    assert train(fresh, checkpoint=path, **options) == runs
    fresh = [network(seed, 0.3) for seed in range(3)]
    with pytest.raises(ValueError, match=f"Set vectorise={vectorise} to go on from it"):
        train(fresh, checkpoint=path, **{**options, "vectorise": not vectorise})


@pytest.mark.parametrize("vectorise", [True, False])
def test_the_same_networks_go_on_from_the_first_epoch(vectorise, tmp_path):
    models, whole = ([network(seed, 0.3) for seed in range(2)] for _ in range(2))
    options = {"vectorise": vectorise, "optimizer": "adam", "lr": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", interrupted_at(2))
        runs = train(models, checkpoint=tmp_path / "state.pt", **options)
    assert [(run.status, run.history) for run in runs] == [("interrupted", [])] * 2
    assert not torch.equal(models[0][10].bias, whole[0][10].bias)
    runs = train(models, checkpoint=tmp_path / "state.pt", **options)
    assert_same(models, whole, runs, train(whole, **options))


def interrupted_at(step, call=Step.__call__):
    """The step that is given, but Ctrl-C comes in one of them."""

    def interrupted(self, number, *inputs):
        if number == step:
            raise KeyboardInterrupt
        call(self, number, *inputs)

    return interrupted


def test_networks_go_on_in_the_same_way_whatever_led_to_it(tmp_path):
    def stop(epoch, model, record):
        raise KeyboardInterrupt

    path = tmp_path / "state.pt"
    train([network(0), network(1)], checkpoint=path, callback=stop)
    runs = train([network(0), network(1)], checkpoint=path, vectorise=False)
    assert [run.status for run in runs] == ["finished"] * 2
    assert runs[0].provenance["resumed_after"] == [1]
    assert runs[0].recipe["members_reason"] == "asked for"


def test_one_graph_trains_networks_of_either_mode():
    together, apart = ([network(0).train(), network(1).eval()] for _ in range(2))
    runs = train(together, vectorise=True)
    assert_same(together, apart, runs, train(apart, vectorise=False))
    assert [model.training for model in together] == [True, False]


def test_ctrl_c_ends_all_networks():
    models = [network(seed) for seed in range(3)]

    def stop(epoch, model, record):
        if model is models[1]:
            raise KeyboardInterrupt

    runs = train(models, callback=stop)
    assert [run.status for run in runs] == ["finished", "interrupted", "interrupted"]
    assert [len(run.history) for run in runs] == [3, 1, 0]


def test_networks_train_one_after_the_other_on_a_cpu_unless_asked():
    runs = train([network(0), network(1)], epochs=1)
    reasons = {(r.recipe["members"], r.recipe["members_reason"]) for r in runs}
    assert reasons == {("sequential", "the default on cpu")}
    (run,) = train([network(0)], epochs=1)
    assert "members" not in run.recipe


class Gain(nn.Module):
    """Scales by a number that no text and no state shows."""

    def __init__(self, gain):
        super().__init__()
        self._gain = gain

    def forward(self, numbers):
        return numbers * self._gain


class Counting(nn.Module):
    """Puts a new tensor in the place of its buffer instead of changing it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, numbers):
        if self.training:
            self.calls = self.calls + 1
        return numbers


class Noisy(nn.Module):
    """Draws from torch's own generator."""

    def forward(self, numbers):
        return numbers + 0.1 * torch.randn_like(numbers)


class Branching(nn.Module):
    """Decides by the numbers what to do."""

    def forward(self, numbers):
        return numbers if numbers.sum() > 0 else -numbers


def with_last(*layers):
    return [nn.Sequential(*network(n), layer) for n, layer in enumerate(layers)]


def spectral():
    models = [network(0), network(1)]
    for model in models:
        parametrizations.spectral_norm(model[10])
    return models


def hooked():
    models = [network(0), network(1)]
    models[1][2].register_forward_hook(lambda module, inputs, output: output * 2)
    return models


def own_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("models", "options", "reason"),
    [
        (None, {"hooks": [Hook()]}, "hooks act on one network at a time"),
        (None, {"optimizer": own_optimizer}, "an optimizer of one's own may mix"),
        (None, {"amp": "float16"}, "the networks would share the loss scale"),
        (hooked, {}, "model[1] has forward or backward hooks"),
        (spectral, {}, "torch.vmap fails: "),
        (
            lambda: [network(0), nn.Sequential(*network(1), nn.ReLU())],
            {},
            "model[1] is built otherwise than model[0]",
        ),
        (
            lambda: with_last(Noisy(), Noisy()),
            {},
            "torch.vmap fails: vmap: called",
        ),
        (lambda: with_last(Branching(), Branching()), {}, "torch.vmap fails: "),
        (lambda: with_last(Gain(1), Gain(1.05)), {}, "model[1] has another score"),
        (
            lambda: [network(n, mode="dense").float() for n in range(2)],
            {"amp": "bfloat16"},
            "torch.vmap fails: Input type",
        ),
        (
            lambda: [nn.Sequential(nn.Flatten(), nn.Linear(72, 3)) for _ in range(2)],
            {"amp": "bfloat16"},
            "the scores are in torch.float32, expected torch.bfloat16",
        ),
        (
            lambda: with_last(Counting(), Counting()),
            {},
            "model[0] has another buffer 11.calls",
        ),
    ],
)
def test_networks_that_one_graph_cannot_train_are_refused_and_train_apart(
    models, options, reason
):
    models = [network(0), network(1)] if models is None else models()
    before = copy.deepcopy([model.state_dict() for model in models])
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        train(models, vectorise=True, epochs=1, **options)
    assert "Set vectorise=None to train one after the other." in str(error.value)
    for model, old in zip(models, before, strict=True):
        assert_close(model.state_dict(), old, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    assert {run.status for run in train(models, epochs=1, **options)} == {"finished"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_networks_train_in_one_graph_on_cuda(cuda_graph):
    together, apart = (
        [network(seed, 0.3).cuda() for seed in range(3)] for _ in range(2)
    )
    options = {"lr": (0.05, 0.02, 0.02), "augment": Augment(crop=1), "epochs": 4}
    runs = train(together, cuda_graph=cuda_graph, **options)
    expected = train(apart, vectorise=False, **options)
    assert runs[0].recipe["members_reason"] == "the default on cuda"
    assert_same(together, apart, runs, expected)
    # The draws of chance are the same on every device.
    on_cpu = train([network(seed, 0.3) for seed in range(3)], **options)
    for run, other in zip(runs, on_cpu, strict=True):
        assert run.history[-1]["train_loss"] == pytest.approx(
            other.history[-1]["train_loss"], rel=1e-4
        )


@pytest.mark.parametrize(
    ("models", "options", "error", "text"),
    [
        (
            2,
            {"seeds": None},
            ValueError,
            "seeds is None, expected one seed for each of",
        ),
        (2, {"seeds": 2}, ValueError, "seeds is 2, expected one seed for each of"),
        (2, {"seeds": range(3)}, ValueError, "seeds is 3 long, expected one seed for"),
        (2, {"seeds": (0, -1)}, ValueError, "seeds[1] is -1, expected at least 0"),
        (2, {"lr": (0.1,)}, ValueError, "lr is 1 long, expected a number, or one for"),
        (2, {"lr": (0.1, 0.0)}, ValueError, "lr is 0.0, expected a number above 0"),
        (
            2,
            {"vectorise": 1},
            TypeError,
            "vectorise is 1, expected None, True or False",
        ),
        (0, {}, ValueError, "model is an empty list, expected at least one module"),
        ([network(0), 5], {}, TypeError, "model[1] is a int, expected a torch.nn.Mod"),
        ([network(0)] * 2, {}, ValueError, "model[1] is in the list twice, expected"),
        (
            [network(0), network(1).float()],
            {},
            ValueError,
            "model[1] is on cpu in torch.float32, expected cpu and torch.float64 as",
        ),
        (network(0), {"seeds": [1]}, TypeError, "model is a single module, expected a"),
    ],
)
def test_networks_and_what_belongs_to_them_must_fit(models, options, error, text):
    if isinstance(models, int):
        models = [network(n) for n in range(models)]
    with pytest.raises(error, match=re.escape(text)):
        fit(models, pixels(), **{"seeds": range(2), "progress": False, **options})


def test_progress_bar_counts_all_networks(capsys):
    train([network(0), network(1)], progress=True)
    text = capsys.readouterr().err.split("\r")[-1]
    assert "network 2/2, epoch 3/3" in text
    assert "132/132" in text
    train([network(0), network(1)], progress=True, vectorise=True, lr=(0.05, 1e300))
    text = capsys.readouterr().err.split("\r")[-1]
    assert "1 of 2 diverged in epoch" in text
