"""Frobenius decay: the gradient of the dense penalty, and no other decay beside it."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb import FrobeniusDecay, frobenius_decay

FLOAT64 = {"dtype": torch.float64}


def conditioned(layer, **options):
    return cpnb.normalize(layer, "conditioned", gain="learnable", **options)


LAYERS = {
    "linear UV": lambda: cpnb.LowRankLinear(7, 5, rank=3, **FLOAT64),
    "linear UMV": lambda: cpnb.LowRankLinear(7, 5, rank=3, middle=True, **FLOAT64),
    "conv UV": lambda: cpnb.LowRankConv2d(4, 6, (3, 2), rank=3, **FLOAT64),
    "conv UMV": lambda: cpnb.LowRankConv2d(
        *(4, 6, (3, 2)), rank=3, middle=True, groups=2, init="kaiming", **FLOAT64
    ),
    "CP linear": lambda: cpnb.CPLinear(7, 5, rank=3, **FLOAT64),
    "CP conv": lambda: cpnb.CPConv2d(4, 6, (3, 2), groups=2, rank=5, **FLOAT64),
    "CP conv 1d": lambda: cpnb.CPConv1d(4, 6, 3, rank=5, **FLOAT64),
    "CP conv 3d": lambda: cpnb.CPConv3d(2, 3, (3, 1, 2), rank=4, **FLOAT64),
    "CP unsigned": lambda: cpnb.CPConv2d(4, 6, 3, rank=5, signed=False, **FLOAT64),
    "CP vector": lambda: cpnb.CPLinear(7, 1, rank=3, **FLOAT64),
    "CP number": lambda: cpnb.CPLinear(1, 1, rank=3, **FLOAT64),
    "CP conditioned": lambda: conditioned(cpnb.CPConv2d(4, 6, 3, rank=5, **FLOAT64)),
    "CP conditioned, unsigned": lambda: conditioned(
        cpnb.CPLinear(7, 5, rank=3, signed=False, **FLOAT64)
    ),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def shaken(make):
    """A layer off every special point: σ ≠ 1, λ of both signs, columns not unit."""
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.7).add_(0.4 * torch.randn_like(parameter))
    return layer


def dense_gradients(layer, mu):
    """Gradient of (μ/2)‖W‖² through the multiplied-out kernel; None for the bias."""
    penalty = mu / 2 * layer.weight.square().sum()
    named = list(layer.named_parameters())
    found = torch.autograd.grad(penalty, [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True)}


@every_layer
def test_penalty_and_its_gradient_are_those_of_the_dense_kernel(make):
    layer = shaken(make)
    penalty = frobenius_decay(layer, 0.3)
    assert_close(penalty, 0.15 * layer.weight.square().sum())
    penalty.backward()
    for name, expected in dense_gradients(layer, 0.3).items():
        assert_close(layer.get_parameter(name).grad, expected)


@every_layer
def test_hook_adds_the_gradient_of_the_dense_penalty(make):
    layer = shaken(make)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: p.grad.clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    hook = FrobeniusDecay(0.3)
    hook.start(layer, optimizer)
    hook.before_step(layer, optimizer, 0)
    for name, expected in dense_gradients(layer, 0.3).items():
        added = layer.get_parameter(name).grad - before[name]
        assert_close(added, torch.zeros_like(added) if expected is None else expected)


@every_layer
def test_penalty_passes_gradcheck(make):
    layer = shaken(make)
    names, values = zip(*layer.named_parameters(), strict=True)

    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self):
            return frobenius_decay(self.layer, 0.3)

    def penalty(*parameters):
        named = {f"layer.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Penalty(), named, ())

    assert torch.autograd.gradcheck(penalty, values)


def test_zero_column_of_a_cp_layer_gets_a_zero_gradient():
    layer = cpnb.CPLinear(4, 3, rank=2, **FLOAT64)
    with torch.no_grad():
        layer.factors[0][:, 1] = 0
    (layer(torch.ones(1, 4, **FLOAT64)).sum() * 0).backward()
    FrobeniusDecay(1.0).before_step(
        layer, torch.optim.SGD(layer.parameters(), lr=0.1), 0
    )
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all()
    assert layer.factors[0].grad[:, 1].eq(0).all()


def net():
    generator = torch.Generator().manual_seed(0)
    dense = cpnb.DigitsNet(generator=generator).double()
    return cpnb.factorize(dense, rank=4, generator=generator)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("mu", [None, 0.05])
def test_hook_trains_as_the_loss_term_with_decay_on_the_rest_alone(optimizer, mu):
    """The optimizer decays everything; the hook takes the factors out of that."""
    images = torch.randn(40, 1, 8, 8, **FLOAT64)
    labels = torch.arange(40) % 10
    kinds = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "rmsprop": torch.optim.RMSprop,
    }
    hooked, summed = net(), net()
    decayed, hook = (
        kinds[optimizer](hooked.parameters(), lr=0.01, weight_decay=0.1),
        (FrobeniusDecay(mu)),
    )
    factors = {
        f"{name}.{part}" for name in ("conv2", "fc1") for part in ("left", "right")
    }
    named = dict(summed.named_parameters())
    assert factors < set(named)
    plain = kinds[optimizer](
        [
            {"params": [named[name] for name in factors], "weight_decay": 0.0},
            {"params": [p for name, p in named.items() if name not in factors]},
        ],
        lr=0.01,
        weight_decay=0.1,
    )
    hook.start(hooked, decayed)
    for step in range(5):
        loss = nn.functional.cross_entropy(hooked(images), labels)
        decayed.zero_grad()
        loss.backward()
        hook.before_step(hooked, decayed, step)
        decayed.step()
        loss = nn.functional.cross_entropy(summed(images), labels)
        plain.zero_grad()
        (loss + frobenius_decay(summed, 0.1 if mu is None else mu)).backward()
        plain.step()
    for name, parameter in hooked.named_parameters():
        assert_close(parameter, named[name], rtol=1e-6, atol=1e-8)


def test_hook_takes_over_the_decay_of_param_groups():
    model = net()
    groups = cpnb.param_groups(model, 0.2, factors=False)
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hook = FrobeniusDecay()
    hook.start(model, optimizer)
    hook.before_step(model, optimizer, 0)
    expected = dense_gradients(model.fc1, 0.2)
    assert_close(model.fc1.left.grad, expected["left"])
    assert_close(model.fc1.right.grad, expected["right"])


def test_hook_spares_the_scale_of_cp_layers_on_request():
    layer = shaken(LAYERS["CP conv"])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.2)
    found = []
    for hook in (FrobeniusDecay(), FrobeniusDecay(scale=False)):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        hook.before_step(layer, optimizer, 0)
        found.append({name: p.grad for name, p in layer.named_parameters()})
    # What is left is the own decay that was taken off, in advance.
    assert_close(found[1].pop("scale"), -0.2 * layer.scale.detach())
    assert found[0].pop("scale").abs() > 0
    assert_close(found[0], found[1])


def test_hook_lets_sigma_vanish_before_a_batch_norm_unless_spared():
    net = nn.Sequential(
        *(cpnb.CPConv2d(1, 16, 3, rank=8), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    scales = []
    for spared in (False, True):
        model = copy.deepcopy(net)
        cpnb.fit(
            *(model, cpnb.load_data("digits")),
            epochs=1,
            optimizer="sgd",
            lr=0.1,
            weight_decay=1e-3,
            schedule=None,
            hooks=[FrobeniusDecay(scale=not spared)],
            progress=False,
        )
        scales.append(model[0].scale.item())
    assert scales[0] < 0.8
    assert scales[1] == pytest.approx(1, abs=1e-3)


def test_hook_in_fit_shrinks_kernels_and_spares_frozen_parameters():
    data = cpnb.load_data("digits")
    sizes = []
    for hooks in ([], [FrobeniusDecay(0.1)]):
        model = net().float()
        model.conv2.left.requires_grad_(False)
        before = model.conv2.left.clone()
        cpnb.fit(model, data, epochs=1, hooks=hooks, progress=False)
        assert torch.equal(model.conv2.left, before)
        sizes.append(frobenius_decay(model, 1.0).item())
    assert sizes[1] < 0.5 * sizes[0]


def test_hook_leaves_dense_layers_alone():
    model = net()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    FrobeniusDecay().before_step(model, optimizer, 0)
    moved = {name for name, p in model.named_parameters() if p.grad.any()}
    assert moved == {f"{a}.{b}" for a in ("conv2", "fc1") for b in ("left", "right")}


def test_hook_says_its_strength():
    assert repr(FrobeniusDecay(1e-4)) == "FrobeniusDecay(mu=0.0001)"
    assert repr(FrobeniusDecay(scale=False)) == "FrobeniusDecay(mu=None, scale=False)"


def start(hook, model, optimizer=torch.optim.SGD, **options):
    hook.start(model, optimizer(model.parameters(), lr=0.1, **options))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: frobenius_decay(net(), -1.0), ValueError, "mu is -1.0"),
        (lambda: frobenius_decay(net(), float("nan")), ValueError, "mu is nan"),
        (lambda: frobenius_decay(net(), "1"), TypeError, "mu is '1'"),
        (lambda: FrobeniusDecay(True), TypeError, "mu is True"),
        (
            lambda: frobenius_decay(cpnb.DigitsNet(), 0.1),
            ValueError,
            "without low-rank",
        ),
        (lambda: start(FrobeniusDecay(0.1), cpnb.DigitsNet()), ValueError, "without"),
        (
            lambda: start(FrobeniusDecay(), net()),
            ValueError,
            r"has the weight decays \[\], expected exactly one",
        ),
        (
            lambda: start(FrobeniusDecay(0.1), net(), torch.optim.AdamW),
            ValueError,
            "AdamW, which decays the factors apart from their gradients",
        ),
    ],
)
def test_frobenius_decay_refuses_bad_input_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_hook_takes_an_optimizer_with_decoupled_decay_that_spares_the_factors():
    model = net()
    groups = cpnb.param_groups(model, 0.1, factors=False)
    FrobeniusDecay(0.1).start(model, torch.optim.AdamW(groups, lr=0.1))
