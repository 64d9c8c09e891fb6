"""Training goes on after a rescaling as the optimizer state says it must."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

import cpnb
from cpnb.rescaling import MODES, rescale_

STEPS = 10


class Residual(nn.Module):
    """Convolutions with and without batch norm around a residual sum."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 3, 3)
        self.fc = nn.Linear(12, 3)

    def forward(self, images):
        hidden = self.conv1(images).relu()
        hidden = (hidden + self.norm(self.conv2(hidden))).relu()
        return self.fc(self.conv3(hidden).relu().flatten(1))


def batches(count):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        images = torch.randn(6, 2, 6, 6, generator=generator, dtype=torch.float64)
        yield images, torch.randint(3, (6,), generator=generator)


def train(model, optimizer, data):
    for images, labels in data:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.01, "eps": 1e-3}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "eps": 1e-3}),
    "centered": (torch.optim.RMSprop, {"centered": True, "eps": 1e-3}),
}


def reference_step(kind, group, state, theta, gradient, t):
    """One step in the old coordinates θ of what the optimizer does to tθ."""
    lr, decay = group["lr"], group["weight_decay"]
    if kind is torch.optim.AdamW:
        theta = theta * (1 - lr * decay)
    else:  # the penalty is on tθ
        gradient = gradient + decay * t**2 * theta
    if kind is torch.optim.SGD:
        momentum = group["momentum"]
        state["momentum_buffer"] = momentum * state["momentum_buffer"] + gradient
        step = state["momentum_buffer"]
        if group["nesterov"]:
            step = gradient + momentum * step
        return theta - lr * step / t**2
    if kind is torch.optim.RMSprop:
        alpha = group["alpha"]
        state["square_avg"] = alpha * state["square_avg"] + (1 - alpha) * gradient**2
        variance = state["square_avg"]
        if group["centered"]:
            state["grad_avg"] = alpha * state["grad_avg"] + (1 - alpha) * gradient
            variance = variance - state["grad_avg"] ** 2
        step = gradient / (variance.sqrt() + group["eps"] * t)
        if group["momentum"]:
            step = group["momentum"] * state["momentum_buffer"] + step
            state["momentum_buffer"] = step
        return theta - lr * step / t
    first, second = group["betas"]
    state["step"] = float(state["step"]) + 1
    state["exp_avg"] = first * state["exp_avg"] + (1 - first) * gradient
    state["exp_avg_sq"] = second * state["exp_avg_sq"] + (1 - second) * gradient**2
    variance = state["exp_avg_sq"]
    if group["amsgrad"]:
        variance = torch.maximum(state["max_exp_avg_sq"], variance)
        state["max_exp_avg_sq"] = variance
    mean = state["exp_avg"] / (1 - first ** state["step"])
    root = (variance / (1 - second ** state["step"])).sqrt()
    return theta - lr * mean / (root + group["eps"] * t) / t


def ill_scaled_start(model, name):
    """Three steps of training from uneven rows; the optimizer has its state."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_((0.5 * torch.randn(parameter.shape)).exp())
    kind, options = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), lr=0.01, **options)
    train(model, optimizer, batches(3))
    return optimizer


def saved(model, optimizer):
    """Parameters, buffers and optimizer state by name, as they are now."""
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    state = {
        name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()
    }
    return parameters, buffers, state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "low_rank"),
    [
        *((name, False) for name in OPTIMIZERS),
        # Without a large eps Adam would magnify the rounding of a gradient that is
        # zero, as that of the bias before the batch norm.
        *((name, True) for name in ("sgd", "nesterov", "adam", "rmsprop", "centered")),
    ],
)
def test_steps_after_a_rescaling_are_preconditioned_steps_before_it(
    name, mode, low_rank
):
    model = Residual().double()
    if low_rank:
        model = cpnb.factorize(model, rank=0.5, middle=True, skip=())
    optimizer = ill_scaled_start(model, name)
    original = copy.deepcopy(model)
    theta, buffers, state = saved(model, optimizer)
    rescale_(model, mode=mode, optimizer=optimizer)
    t = {n: p.detach() / theta[n] for n, p in model.named_parameters()}
    assert max(abs(ratio.log()).max() for ratio in t.values()) > 0.3
    data = list(batches(STEPS))
    train(model, optimizer, data)

    kind, group = OPTIMIZERS[name][0], optimizer.param_groups[0]
    for images, labels in data:
        leaves = {n: value.requires_grad_() for n, value in theta.items()}
        scores = functional_call(original, (leaves, buffers), (images,))
        loss = F.cross_entropy(scores, labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        theta = {
            n: reference_step(kind, group, state[n], leaves[n], gradient, t[n]).detach()
            for n, gradient in zip(leaves, gradients, strict=True)
        }
    for n, parameter in model.named_parameters():
        assert_close(parameter.detach(), t[n] * theta[n], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_steps_differ_if_the_state_is_left_behind(name):
    model = Residual().double()
    optimizer = ill_scaled_start(model, name)
    images = next(batches(1))[0]
    scores = []
    for follows in (True, False):
        net = copy.deepcopy(model)
        descent = OPTIMIZERS[name][0](net.parameters(), lr=0.01, **OPTIMIZERS[name][1])
        descent.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        rescale_(net, optimizer=descent if follows else None)
        train(net, descent, batches(STEPS))
        scores.append(net(images))
    assert cpnb.relative_error(*scores) > 1e-3


# --- CP layers: the change is no longer elementwise -----------------------------------


def cp_model():
    """A chain with every kind of CP layer: grouped, depthwise, one channel, linear."""
    options = {"dtype": torch.float64}
    return nn.Sequential(
        *(cpnb.CPConv2d(2, 4, 3, rank=3, **options), nn.ReLU()),
        *(cpnb.CPConv2d(4, 6, 1, groups=2, rank=4, **options), nn.LeakyReLU()),
        *(cpnb.CPConv2d(6, 12, 3, groups=6, rank=3, **options), nn.LeakyReLU()),
        *(cpnb.CPConv2d(12, 1, 1, rank=2, **options), nn.LeakyReLU(), nn.Flatten()),
        *(cpnb.CPLinear(4, 5, rank=3, **options), nn.ReLU()),
        cpnb.CPLinear(5, 3, rank=2, **options),
    )


def before_rescaling(changed, d):
    """The parameters of old as a function of the changed ones, for `cp_model`."""
    old = dict(changed)

    def undo(layer, factor, rows):
        name = f"{layer}.factors.{factor}"
        f = changed[name]
        turned = f / rows[:, None]
        growth = f.norm(dim=0) / turned.norm(dim=0)
        old[name] = turned * growth
        old[f"{layer}.lam"] = old[f"{layer}.lam"] / growth

    for layer, rows in d.items():
        old[f"{layer}.bias"] = changed[f"{layer}.bias"] / rows
    undo(0, 0, d["0"])
    undo(2, 0, d["2"])
    undo(2, 1, 1 / d["0"][:2])  # of both groups
    undo(4, 0, d["4"] / d["2"].repeat_interleave(2))  # depthwise: rows only
    undo(6, 0, 1 / d["4"])  # one output: its row is the scale
    old["6.scale"] = changed["6.scale"] / d["6"][0]
    undo(9, 0, d["9"])
    undo(9, 1, 1 / d["6"].expand(4))
    undo(11, 1, 1 / d["9"])
    return old


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "rmsprop"])
def test_steps_of_cp_layers_are_those_of_the_old_network_in_new_coordinates(name, mode):
    model = cp_model()
    optimizer = ill_scaled_start(model, name)
    optimizer.param_groups[0]["weight_decay"] = 0
    original = copy.deepcopy(model)
    theta, _, state = saved(model, optimizer)
    d = rescale_(model, mode=mode, optimizer=optimizer).scales
    assert torch.equal(d["0"][:2], d["0"][2:])  # groups share the factor of inputs
    changed = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert_close(before_rescaling(changed, d), theta)

    # What the state has to be: first moments as gradients in the new coordinates.
    leaves = {n: value.requires_grad_() for n, value in changed.items()}
    old = before_rescaling(leaves, d)
    first = {"sgd": "momentum_buffer", "nesterov": "momentum_buffer", "adam": "exp_avg"}
    for entry in state["0.lam"]:
        if entry == first.get(name):
            against = [state[n][entry] for n in old]
            turned = torch.autograd.grad(
                list(old.values()), list(leaves.values()), against
            )
            for n, value in zip(leaves, turned, strict=True):
                state[n][entry] = value
        elif entry.endswith("_avg") or entry.endswith("_sq"):
            for n, value in theta.items():
                ratio = torch.where(value == 0, 1, changed[n].detach() / value)
                state[n][entry] = state[n][entry] / ratio**2
    for n, parameter in model.named_parameters():
        for entry, value in state[n].items():
            assert_close(optimizer.state[parameter][entry], value)

    data = list(batches(STEPS))
    train(model, optimizer, data)
    kind, group = OPTIMIZERS[name][0], optimizer.param_groups[0]
    for images, labels in data:
        leaves = {n: value.detach().requires_grad_() for n, value in changed.items()}
        scores = functional_call(original, before_rescaling(leaves, d), (images,))
        loss = F.cross_entropy(scores, labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        changed = {
            n: reference_step(kind, group, state[n], leaves[n].detach(), gradient, 1)
            for n, gradient in zip(leaves, gradients, strict=True)
        }
    for n, parameter in model.named_parameters():
        assert_close(parameter.detach(), changed[n], rtol=1e-9, atol=1e-12)


def test_gradients_at_hand_become_those_of_the_rescaled_network():
    images, labels = next(batches(1))
    for model in (cp_model(), Residual().double()):
        grown = [(0.5 * torch.randn(p.shape)).exp() for p in model.parameters()]
        with torch.no_grad():
            for parameter, factor in zip(model.parameters(), grown, strict=True):
                parameter.mul_(factor)
        F.cross_entropy(model(images), labels).backward()
        rescale_(model)
        carried = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        for parameter, gradient in zip(model.parameters(), carried, strict=True):
            assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)


# --- what is refused ------------------------------------------------------------------


def test_unknown_optimizer_is_refused_and_nothing_changes():
    model = Residual().double()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adagrad(model.parameters())
    with pytest.raises(
        TypeError, match="optimizer is a Adagrad, expected one of SGD, A"
    ):
        rescale_(model, optimizer=optimizer)
    with pytest.raises(TypeError, match="optimizer is a str"):
        rescale_(model, optimizer="sgd")
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.SGD(Residual().parameters(), 0.1)
    with pytest.raises(ValueError, match="optimizer trains no parameter of model"):
        rescale_(Residual(), optimizer=optimizer)
