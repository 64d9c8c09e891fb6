"""Rescaling leaves the function as it is, and puts the norms where it says."""

import copy
import math
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import cpnb
from cpnb.layers import FactoredLayer
from cpnb.methods.scaling import Rescaling, rescale_
from networks import ResNet

MODES = ("unit", "balanced")
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
FORMS = {
    "dense": lambda net: net,
    "cp": partial(cpnb.canonicalize, rank=3, init="unified"),
    "low rank": partial(cpnb.factorize, rank=3, skip=(), init="kaiming"),
}


class Branches(nn.Module):
    """Residual sum, depthwise and grouped convolutions, a view, a norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect")
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(12, 6, 1, groups=3)
        self.slope = nn.PReLU(6)
        self.side = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Conv2d(4, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8 * 4, 7), nn.Linear(7, 3)

    def forward(self, images):
        stream = F.leaky_relu(self.stem(images))
        branch = self.depthwise(stream).relu()
        stream = stream + 0.5 * self.slope(self.grouped(branch))
        hidden = self.head(F.relu(self.norm(self.side(stream))))
        hidden = F.avg_pool2d(F.relu(hidden), 2)
        hidden = hidden.view(hidden.size(0), -1)
        return F.log_softmax(self.fc2(F.relu(self.fc1(hidden))), dim=1)


# Network, shape of its images, and layers that keep their scale: the output, and those
# that a norm follows.
NETWORKS = {
    "LeNet": (cpnb.LeNet, (1, 28, 28), "fc2"),
    "ResNet-8": (lambda: ResNet(8), (3, 32, 32), r"(.*\.)?conv\d|fc"),
    "sums, groups and views": (Branches, (2, 12, 12), "side|fc2"),
}


@torch.no_grad()
def ill_scaled(model, seed=0, spread=0.7):
    """Give units uneven norms and norms statistics of their own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like):
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            for parameter in layer.parameters():
                parameter.copy_(draw(parameter))
            if getattr(layer, "running_var", None) is not None:
                layer.running_mean.copy_(draw(layer.running_mean))
                layer.running_var.copy_(draw(layer.running_var).exp())
        elif isinstance(layer, FactoredLayer | nn.Linear | nn.modules.conv._ConvNd):
            for rows in layer.parameters():
                if rows.ndim > 1:
                    spreads = (spread * draw(rows.flatten(1)[:, 0])).exp()
                    rows.mul_(spreads.view(-1, *[1] * (rows.ndim - 1)))
    return model


@torch.no_grad()
def outputs(model, images, training):
    """Scores, with the same dropout each time."""
    torch.manual_seed(0)
    return copy.deepcopy(model).train(training)(images)


def change(before, after, images):
    """Largest relative change of the output, in training and in evaluation."""
    pairs = (
        [outputs(model, images, training) for model in (before, after)]
        for training in (True, False)
    )
    return max(cpnb.relative_error(*pair).item() for pair in pairs)


def images_for(shape, n=3, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)


def mlp(*sizes):
    layers = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def scales_of(table):
    """Scales of the rows by layer."""
    groups = table.groupby("layer", sort=False).scale
    return {name: torch.tensor(values.to_numpy()) for name, values in groups}


# --- the function stays ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", EXACT, ids=["float64", "float32"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_rescale_keeps_the_output_in_training_and_evaluation(name, form, mode, dtype):
    network, shape, kept = NETWORKS[name]
    model = ill_scaled(FORMS[form](network())).to(dtype)
    images = images_for(shape, 2, dtype)
    after = copy.deepcopy(model)
    scales = scales_of(rescale_(after, images, mode=mode))
    assert change(model, after, images) <= EXACT[dtype]
    assert max(scale.log().abs().max() for scale in scales.values()) > 0.5
    same = {layer for layer, scale in scales.items() if (scale == 1).all()}
    assert same == {layer for layer in scales if re.fullmatch(kept, layer)}


@st.composite
def networks(draw):
    """A small random network for images (3, 8, 8), in part in CP form."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    layers, channels = [], 3
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        out = groups * draw(st.integers(1, 3))
        size, bias = draw(st.sampled_from([1, 3])), draw(st.booleans())
        layers.append(
            nn.Conv2d(channels, out, size, padding=1, groups=groups, bias=bias)
        )
        norms = [nn.Identity(), nn.BatchNorm2d(out), nn.BatchNorm2d(out, affine=False)]
        layers.append(draw(st.sampled_from([*norms, nn.InstanceNorm2d(out)])))
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU()])))
        layers.append(draw(st.sampled_from([nn.MaxPool2d(2, 1), nn.Dropout2d()])))
        channels = out
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5)]
    layers += [nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)]
    model = ill_scaled(nn.Sequential(*layers).double(), draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        names = [name for name, _ in model.named_children()]
        kept = [name for name in names[:-1] if draw(st.booleans())]
        model = cpnb.canonicalize(model, rank=2, skip=lambda name, layer: name in kept)
    return model.double()


@settings(max_examples=20)
@given(networks(), st.sampled_from(MODES), st.floats(0.01, 100))
def test_rescale_keeps_the_output_of_any_network(model, mode, c):
    images, after = images_for((3, 8, 8), n=4), copy.deepcopy(model)
    rescale_(after, images, mode=mode, c=c)
    assert change(model, after, images) <= 1e-11


# --- the norms go where they should ---------------------------------------------------


def loop_sweep(weights, mode, c):
    """The two rules by the letter, unit by unit, for a chain of matrices."""
    weights = [weight.clone() for weight in weights]
    for first, second in pairwise(weights):
        for j in range(len(first)):
            row = math.sqrt(sum(w.item() ** 2 for w in first[j]))
            column = math.sqrt(sum(w.item() ** 2 for w in second[:, j]))
            d = c / row if mode == "unit" else math.sqrt(column / (c * row))
            first[j] *= d
            second[:, j] /= d
    return weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("c", [1.0, 1.7])
def test_rescale_of_a_chain_is_that_of_the_formulas(mode, c):
    model = ill_scaled(mlp(4, 6, 5, 3))
    weights = [layer.weight.detach().clone() for layer in model[::2]]
    expected = loop_sweep(weights, mode, c)
    table = rescale_(model, images_for((4,)), mode=mode, c=c)
    for n, (name, rows) in enumerate(table.groupby("layer")):
        assert_close(model[int(name)].weight.detach(), expected[n])
        before, after = rows.norm_before.to_numpy(), rows.norm_after.to_numpy()
        assert_close(torch.tensor(before), weights[n].norm(dim=1))
        assert_close(torch.tensor(after), expected[n].norm(dim=1))


def test_balanced_sweeps_lower_the_sum_of_squares_until_rows_equal_columns():
    model = ill_scaled(cpnb.DigitsNet().double())
    images = images_for((1, 8, 8))

    def total():
        return sum(p.square().sum().item() for p in model.parameters() if p.ndim > 1)

    sums = [total()]
    for _ in range(60):
        rescale_(model, images, mode="balanced")
        sums.append(total())
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(sums))
    rows = model.fc1.weight.detach().norm(dim=1)
    columns = model.fc2.weight.detach().norm(dim=0)
    assert_close(rows, columns, rtol=1e-4, atol=0)
    rows = model.conv2.weight.detach().flatten(1).norm(dim=1)
    columns = model.fc1.weight.detach().unflatten(1, (32, 16)).norm(dim=(0, 2))
    assert_close(rows, columns, rtol=1e-4, atol=0)


def test_rescale_gives_the_units_of_a_residual_stream_one_scale():
    model = ill_scaled(ResNet(8).double())
    for mode in MODES:
        table = rescale_(copy.deepcopy(model), images_for((3, 32, 32)), mode=mode)
        scales = scales_of(table)
        assert (scales["bn1"].log().abs() > 0.01).any()
        assert torch.equal(scales["bn1"], scales["stage1.0.bn2"])
        # The shortcut takes the channels along and appends channels of zeros.
        assert torch.equal(scales["bn1"], scales["stage2.0.bn2"][:16])
        assert not torch.equal(scales["stage2.0.bn2"], scales["stage2.0.bn1"])
        assert torch.equal(scales["stage2.0.bn2"], scales["stage3.0.bn2"][:32])


@pytest.mark.parametrize("mode", MODES)
def test_rescale_leaves_zero_rows_and_columns_where_they_are(mode):
    model = ill_scaled(mlp(4, 6, 3))
    model[0].weight.data[2] = 0
    model[2].weight.data[:, 4] = 0
    before = copy.deepcopy(model)
    scales = scales_of(rescale_(model, images_for((4,)), mode=mode))
    assert scales["0"][2] == 1
    assert torch.equal(model[0].bias[2], before[0].bias[2])
    assert (scales["0"][4] == 1) == (mode == "balanced")
    assert change(before, model, images_for((4,))) < 1e-14


def test_rescale_passes_scales_through_batch_norm_in_its_weight_and_bias():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 9, 4)]
    model = ill_scaled(nn.Sequential(*layers).double())
    after = copy.deepcopy(model)
    table = rescale_(after, images_for((3, 12, 12)), mode="balanced")
    scale = scales_of(table)["1"]
    for name in ("weight", "bias"):
        old, new = (getattr(net[1], name) for net in (model, after))
        assert_close(new, old * scale)
    assert torch.equal(model[0].weight, after[0].weight)
    before = table.query("layer == '1'").norm_before.to_numpy()
    assert_close(torch.tensor(before), model[1].weight.detach().abs())


@pytest.mark.parametrize("signed", [True, False])
def test_rescale_keeps_rank_and_column_norms_of_a_cp_layer_and_moves_lam(signed):
    first = cpnb.CPConv2d(3, 5, 3, rank=4, signed=signed)
    model = nn.Sequential(first, nn.ReLU(), cpnb.CPConv2d(5, 2, 3)).double()
    first.lam.data[1] *= -1
    first.factors[0].data[:, 2] = 0  # a dead component
    before = copy.deepcopy(model)
    scale = scales_of(rescale_(model, images_for((3, 8, 8))))["0"]
    expected = before[0].weight * scale[:, None, None, None]
    assert_close(first.weight, expected, rtol=1e-12, atol=0)
    assert_close(model[2].weight, before[2].weight / scale[:, None, None])
    for old, new in zip(before[0].factors, first.factors, strict=True):
        assert_close(new.norm(dim=0), old.norm(dim=0))
    assert not torch.allclose(first.lam, before[0].lam)


# --- what is refused ------------------------------------------------------------------


class Through(nn.Module):
    """Two layers with a function of the hidden value between them."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, images):
        return self.last(self.between(self.first(images)))


REFUSED = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu6": nn.ReLU6(),
    "softmax": nn.Softmax(1),
    "plus one": lambda x: x + 1,
    "square": lambda x: x * x,
    "constant padding": lambda x: F.pad(x, (1, 1), value=2.0),
    "channels in turn": lambda x: x.flip(1),
}


@pytest.mark.parametrize("between", REFUSED.values(), ids=REFUSED)
def test_rescale_refuses_what_no_scale_passes_and_names_the_layer(between):
    model = Through(between)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="when the outputs of first"):
        rescale_(model, images_for((3, 8, 8)))
    assert_close(model.state_dict(), before, rtol=0, atol=0)


# Its scores are zero whatever comes before: no evidence of a symmetry.
ZERO_HEAD = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4))
nn.init.zeros_(ZERO_HEAD[2].weight)
CALLED_TWICE = nn.Sequential(nn.Linear(4, 4), *[nn.ReLU(), nn.Linear(4, 4)] * 2)
TIED = mlp(4, 4, 4, 4)
TIED[2].weight = TIED[0].weight
CP = nn.Sequential(cpnb.CPLinear(4, 4), cpnb.CPLinear(4, 4))
# The small units of σ hid from the check that the scores change.
LOW = mlp(4, 128, 128, 3)
LOW[1] = nn.GELU()
LOW = cpnb.canonicalize(LOW, rank=2, init="unified")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ZERO_HEAD, "when the outputs of 0 are"),
        (CALLED_TWICE, "layers that are called once"),
        (TIED, "with weights of their own"),
        (cpnb.normalize(mlp(4, 4, 4), "weight"), "'0' is normalised.*remove_norm"),
        (cpnb.normalize(CP, "conditioned"), "'0' is normalised"),
        (LOW, "when the outputs of 0 are"),
    ],
)
def test_rescale_refuses_models_without_the_symmetry(model, message):
    with pytest.raises(ValueError, match=message):
        rescale_(model, images_for((4,)))


# --- in training ----------------------------------------------------------------------


def test_rescaling_sweeps_after_every_so_many_steps():
    images = images_for((4,), n=40, dtype=torch.float32)
    data = (images, (images[:, 0] > 0).long())
    spreads = {}
    for every in (1, 5, 1000, "epoch"):
        torch.manual_seed(0)
        model = ill_scaled(mlp(4, 6, 2)).float()
        hooks = [Rescaling(images, every=every)]
        settings = {"epochs": 2, "batch_size": 8, "lr": 0.01, "progress": False}
        cpnb.fit(model, data, hooks=hooks, **settings)
        spreads[every] = model[0].weight.detach().norm(dim=1).std().item()
    often = [spreads[every] for every in (1, 5, "epoch")]  # the last step is one
    assert max(often) < 1e-6 and spreads[1000] > 0.1


def cp_chain():
    """A chain with every kind of CP layer: grouped, depthwise, one channel, linear."""
    conv, relu = cpnb.CPConv2d, nn.LeakyReLU
    return nn.Sequential(
        *(conv(2, 4, 3, rank=3), relu(), conv(4, 6, 1, groups=2, rank=4), relu()),
        *(conv(6, 12, 3, groups=6, rank=3), relu(), conv(12, 1, 1, rank=2), relu()),
        *(nn.Flatten(), cpnb.CPLinear(64, 3, rank=3)),
    )


def stepped(make, optimizer, **options):
    """An ill scaled model after one step of rate zero, its optimizer and images."""
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_((0.5 * torch.randn(parameter.shape)).exp())
    optimizer = optimizer(model.parameters(), lr=0.0, **options)
    images = images_for((2, 12, 12), n=6)
    F.cross_entropy(model(images), torch.arange(6) % 3).backward()
    optimizer.step()
    return model, optimizer, images


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make",
    [Branches, cp_chain, lambda: FORMS["low rank"](Branches(), rank=2)],
    ids=["dense", "cp", "low rank"],
)
def test_rescale_turns_momentum_into_that_of_the_rescaled_network(make, mode):
    """A buffer of one gradient must become the gradient at the new weights."""
    model, optimizer, images = stepped(make, torch.optim.SGD, momentum=0.9)
    before = copy.deepcopy(model)
    rescale_(model, images, mode=mode, optimizer=optimizer)
    assert change(before, model, images) < 1e-12
    model.zero_grad()
    F.cross_entropy(model(images), torch.arange(6) % 3).backward()
    for parameter in model.parameters():
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert_close(parameter.grad, buffer, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "options", "powers"),
    [
        ("SGD", {"momentum": 0.9}, {"momentum_buffer": 1}),
        ("Adam", {}, {"exp_avg": 1, "exp_avg_sq": 2}),
        ("AdamW", {"amsgrad": True}, {"exp_avg": 1, "max_exp_avg_sq": 2}),
        (
            *("RMSprop", {"centered": True, "momentum": 0.5}),
            {"grad_avg": 1, "square_avg": 2, "momentum_buffer": 0},
        ),
    ],
)
def test_rescale_divides_the_state_by_powers_of_the_scale(kind, options, powers):
    model, optimizer, images = stepped(Branches, getattr(torch.optim, kind), **options)
    before = {p: p.detach().clone() for p in model.parameters()}
    state = copy.deepcopy([optimizer.state[p] for p in before])
    table = rescale_(model, images, mode="balanced", optimizer=optimizer)
    for (parameter, old), entries in zip(before.items(), state, strict=True):
        t = parameter.detach() / old
        if parameter is model.norm.bias:  # zero, which tells nothing
            t = scales_of(table)["norm"]
        for entry, power in powers.items():
            expected = entries[entry] / t**power
            assert_close(optimizer.state[parameter][entry], expected)
