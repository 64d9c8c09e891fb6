"""Truncation: keys against what they are said to be, refits and cuts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import seeded
from torch import nn
from torch.testing import assert_close

from cpnb import CPConv1d, CPConv2d, CPLinear, canonicalize
from cpnb.convert import cp_layers
from cpnb.cp import cp_to_kernel, khatri_rao, relative_error
from cpnb.truncation import (
    KEYS,
    _Look,
    _output_grams,
    kept_rank,
    ranked_layers,
    select_components,
    truncate,
    wanted_ranks,
)


def component_order(layer, key, model=None, **options):
    """The order of a layer's components, alone or in a network."""
    network = layer if model is None else model
    name = next(n for n, each in cp_layers(network).items() if each is layer)
    return ranked_layers(network, [name], key=key, **options)[name].order


DATA_KEYS = [name for name, key in KEYS.items() if key.needs_data]


def make_layer(seed=0, **options):
    generator = seeded(seed)
    layer = CPConv2d(3, 5, 3, rank=6, generator=generator, **options).double()
    with torch.no_grad():
        layer.lam.copy_(torch.randn(6, generator=generator, dtype=torch.float64))
        layer.scale.fill_(-1.5)
        layer.factors[0].mul_(torch.linspace(0.1, 3, 6))
    return layer


def kernel_of(layer, index):
    lam, units = layer.components()
    index = torch.as_tensor(index)
    kernel = cp_to_kernel(lam[index], [u[:, index] for u in units])
    return kernel.view(layer.kernel_shape).detach()


def small_net():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    ranks = {"0": 5, "3": 8}
    return canonicalize(model, rank=ranks, init="unified", generator=seeded())


def ranks_of(model):
    return [layer.rank for layer in cp_layers(model).values()]


def brute_force_greedy(layer):
    """Remove, one at a time, the component whose loss leaves the nearest kernel."""
    whole = layer.weight.detach()

    def distance(components):
        return (whole - kernel_of(layer, components)).norm()

    left = list(range(layer.rank))
    removed = []
    while len(left) > 1:
        worst = min(left, key=lambda r: distance([s for s in left if s != r]))
        left.remove(worst)
        removed.append(worst)
    return [left[0], *removed[::-1]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("signed", [True, False])
def test_greedy_order_equals_brute_force_on_kernels(seed, signed):
    layer = make_layer(seed=seed, signed=signed)
    assert component_order(layer, "greedy").tolist() == brute_force_greedy(layer)


def test_random_order_is_the_same_every_time_and_another_with_a_generator():
    net = small_net()
    state = torch.get_rng_state()
    first = component_order(net[3], "random")
    assert torch.equal(first, component_order(net[3], "random", model=net))
    assert torch.equal(first, ranked_layers(net, ["0", "3"], key="random")["3"].order)
    assert torch.equal(state, torch.get_rng_state())
    generator = seeded(1)
    drawn = [component_order(net[3], "random", generator=generator) for _ in range(20)]
    assert len({tuple(order.tolist()) for order in drawn}) > 15


class Net(nn.Module):
    """Two convolutions, one of them grouped and used twice, and a linear layer."""

    def __init__(self, signed=True):
        super().__init__()
        options = {"padding": 1, "signed": signed}
        self.first = CPConv2d(2, 4, 3, rank=5, **options)
        options |= {"groups": 2, "padding_mode": "circular"}
        self.layer = CPConv2d(4, 4, 3, rank=6, **options)
        self.norm = nn.BatchNorm2d(4)
        self.fc = CPLinear(64, 3, rank=4, signed=signed)

    def forward(self, images):
        hidden = self.first(images).tanh_()  # in place
        hidden = self.layer(input=self.norm(self.layer(hidden)).tanh())
        return self.fc(hidden.flatten(1))


def made(**options):
    model = Net(**options).double().eval()
    with torch.no_grad():
        for layer in cp_layers(model).values():
            layer.lam.mul_(torch.randn(layer.rank, dtype=torch.float64))
            layer.scale.fill_(-1.5)
    return model


@pytest.fixture
def net():
    return made()


@pytest.fixture
def data():
    scale = torch.tensor([2.0, 0.2], dtype=torch.float64)[:, None, None]
    images = scale * torch.randn(70, 2, 4, 4, dtype=torch.float64)
    return images.cumsum(3), torch.arange(70) % 3


def look(model, data, layers=None):
    return _Look(model, layers or cp_layers(model), data, None, False)


def scores(model, data, key):
    """The numbers that a key orders by, for each CP layer."""
    return KEYS[key].scores(look(model, data))


def scaled_scores(model, name, component, by, images):
    """Scores of the network with one component of one layer multiplied."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(name).lam[component] *= by
        return other(images)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", ["first", "layer", "fc"])
def test_gradient_equals_finite_differences(data, name, signed):
    net = made(signed=signed)
    images, labels = data
    step = 1e-5
    gradient = scores(net, data, "gradient")[name]
    for component in range(len(gradient)):
        lower = scaled_scores(net, name, component, 1 - step, images)
        upper = scaled_scores(net, name, component, 1 + step, images)
        change = F.cross_entropy(upper, labels) - F.cross_entropy(lower, labels)
        expected = change.abs() / (2 * step)
        assert_close(gradient[component], expected, rtol=1e-5, atol=1e-9)


LAYERS = {
    "conv": (lambda: CPConv2d(3, 5, 3, stride=2, rank=4), (3, 7, 7)),
    "grouped": (lambda: CPConv1d(4, 6, 3, groups=2, padding="same", rank=4), (4, 9)),
    "linear": (lambda: CPLinear(6, 5, rank=4), (6,)),
    "linear on four axes": (lambda: CPLinear(6, 5, rank=4), (3, 2, 6)),
    "one channel": (lambda: CPConv2d(1, 5, (1, 2), rank=4), (1, 3, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_activation_and_output_gram_are_mean_squares_of_what_is_added(kind):
    build, shape = LAYERS[kind]
    layer = build().double()
    inputs = torch.randn(60, *shape, dtype=torch.float64)
    with torch.no_grad():
        layer.lam.copy_(torch.tensor([2.0, -1, 0.5, 3]))
        layer.scale.fill_(0.7)
        bias = layer(torch.zeros_like(inputs))
        alone = [select_components(layer, [r])(inputs) - bias for r in range(4)]
    alone = torch.stack(alone).flatten(1)
    products = alone @ alone.T / len(inputs)
    model = nn.Sequential(layer, nn.Flatten())
    data = inputs, torch.zeros(60, dtype=torch.long)
    lam = layer.lam.detach() * layer.sigma.detach()
    gram = _output_grams(look(model, data))["0"]
    assert_close(lam[:, None] * gram * lam, products)
    assert_close(scores(model, data, "activation")["0"], products.diagonal())


@pytest.mark.parametrize("key", KEYS)
def test_truncate_keeps_the_first_of_the_order_on_every_key(net, data, key):
    order = component_order(net.layer, key, model=net, data=data)
    assert sorted(order.tolist()) == list(range(6))
    if key == "nested":
        assert order.tolist() == list(range(6))
    if key == "lam":  # not the largest signed λ, which the released code keeps
        assert torch.equal(order, net.layer.lam.abs().argsort(descending=True))
        assert net.layer.lam.min() < 0
    if key in DATA_KEYS:
        numbers = scores(net, data, key)["layer"]
        assert torch.equal(order, numbers.argsort(descending=True))
        assert len(numbers.unique()) == 6
    for rank in range(1, 7):
        cut = truncate(net, rank={"layer": rank}, key=key, data=data)
        assert_close(cut.layer.weight, kernel_of(net.layer, order[:rank]))
        assert ranks_of(cut) == [5, rank, 4]


@pytest.mark.parametrize("key", DATA_KEYS)
def test_keys_take_1000_evenly_spaced_training_images_of_a_data_set(net, key):
    """So that each class is seen where they are sorted; standardized, if it can be."""

    class Split(tuple):
        def standardized(self):
            return (self[0] - 3) / 2

    class Splits:
        images = torch.randn(1999, 2, 4, 4).double() * 2 + 3
        train = Split((images, torch.arange(1999) * 3 // 1999))
        test = Split((torch.full((1, 2, 4, 4), torch.nan), torch.zeros(1).long()))

    places = [n * 1999 // 1000 for n in range(1000)]
    pair = (Splits.images[places] - 3) / 2, Splits.train[1][places]
    assert pair[1].bincount().min() > 330
    options = {"key": key, "model": net}
    order = component_order(net.layer, **options, data=Splits)
    assert torch.equal(order, component_order(net.layer, **options, data=pair))


def test_looking_at_images_leaves_the_network_as_it_was(net, data):
    net.train().requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():  # a caller's choice that the gradient must not depend on
        for key in DATA_KEYS:
            truncate(net, keep=0.5, key=key, refit="data", data=data)
    assert net.training and net.norm.training
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_pre_hooks for module in net.modules())


SEEDS = st.integers(0, 10**6)
RANKS = st.integers(1, 6)


@settings(max_examples=40)
@given(SEEDS, RANKS, st.sampled_from(["lam", "greedy"]), st.booleans())
def test_refit_solves_least_squares_and_never_raises_the_error(seed, rank, key, signed):
    layer = make_layer(seed=seed, signed=signed)
    weight = layer.weight.detach()
    plain = truncate(layer, rank=rank, key=key)
    refit = truncate(layer, rank=rank, key=key, refit=True)
    index = component_order(layer, key)[:rank].sort().values
    columns = khatri_rao([unit[:, index] for unit in layer.components()[1]]).detach()
    solution = torch.linalg.lstsq(columns, weight.reshape(-1, 1)).solution
    best = (columns @ solution).view_as(weight)
    assert_close(refit.weight.detach(), best, rtol=1e-6, atol=1e-8)
    error = relative_error(weight, refit.weight.detach())
    assert error <= relative_error(weight, plain.weight.detach()) + 1e-12
    ranked = ranked_layers(layer, [""], key=key, refit="weight")[""]
    assert ranked.error(rank) == pytest.approx(error.item(), abs=1e-9)
    assert ranked.norm == pytest.approx(weight.norm().item())


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("signed", [True, False])
def test_refit_on_data_is_least_squares_on_the_outputs(data, rank, signed):
    """Against a solver that is handed the outputs of every component."""
    net = made(signed=signed)
    inputs = data[0]
    outputs = net.first(inputs).detach()
    options = {"key": "greedy", "refit": "data", "data": data}
    cut = truncate(net, rank={"first": rank}, **options)
    error = (cut.first(inputs) - outputs).norm().item()
    index = component_order(net.first, "greedy")[:rank].sort().values
    bias = net.first.bias.detach()[:, None, None]
    columns = [select_components(net.first, [r])(inputs) - bias for r in index]
    matrix = torch.stack([column.flatten() for column in columns], 1).detach()
    target = (outputs - bias).reshape(-1, 1)
    best = matrix @ torch.linalg.lstsq(matrix, target).solution
    expected = (best - target).norm().item()
    assert error == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(rank=st.integers(1, 300), percent=st.integers(1, 100))
def test_kept_rank_is_the_floor_in_exact_arithmetic(rank, percent):
    assert kept_rank(rank, percent / 100) == max(1, rank * percent // 100)


def test_truncate_of_a_model_takes_ranks_said_in_every_way_and_copies():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    assert ranks_of(truncate(model, rank=6)) == [5, 6]
    assert ranks_of(truncate(model, rank={"3": 2})) == [5, 2]
    assert ranks_of(truncate(model, keep=0.5)) == [2, 4]
    assert wanted_ranks(model, keep=0.5) == {"0": 2, "3": 4}
    assert wanted_ranks(model, rank=0.5) == {"0": 2, "3": 5}
    assert wanted_ranks(model, rank={"0": lambda kernel: kernel.shape[-1]}) == {"0": 3}
    cut = truncate(model, rank=1)
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.add_(1)
    assert ranks_of(model) == [5, 8]
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_truncate_keeps_what_a_layer_is():
    layer = make_layer(signed=False, forward_mode="chain").eval()
    layer.lam.requires_grad_(False)
    cut = truncate(layer, rank=3)
    assert (cut.signed, cut.forward_mode, cut.training) == (False, "chain", False)
    assert (cut.lam.requires_grad, cut.factors[0].requires_grad) == (False, True)
    assert cut.weight.dtype == torch.float64
    assert_close(cut.bias, layer.bias)


def test_truncate_cuts_a_layer_without_factors():
    number = CPLinear(1, 1, rank=2)
    for refit in (False, True):
        cut = truncate(number, rank=1, refit=refit)
        error = (cut.weight - number.weight).abs().item()
        least = (number.lam * number.sigma).abs().min().item()
        assert error == pytest.approx(0 if refit else least, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "rank is None and keep is None, expected exactly one"),
        ({"rank": 2, "keep": 0.5}, "rank is 2 and keep is 0.5, expected exactly one"),
        ({"rank": 0}, "rank is 0, expected"),
        ({"rank": {"3": 9}}, "rank is 9 for layer '3', expected at most the 8"),
        ({"rank": {"3": 1.5}}, "rank is 1.5"),
        ({"rank": {"1": 2}}, r"rank names \['1'\], expected some of \['0', '3'\]"),
        ({"keep": 0.0}, r"keep is 0.0, expected a fraction in \(0, 1\]"),
        ({"keep": float("nan")}, "keep is nan"),
        ({"keep": 1, "key": "size"}, r"key is 'size', expected one of \('lam', '"),
        ({"keep": 1, "refit": "kernel"}, "refit is 'kernel', expected one of"),
    ],
)
def test_truncation_refuses_bad_values_with_a_clear_error(options, text):
    with pytest.raises(ValueError, match=text):
        truncate(small_net(), **options)


@pytest.mark.parametrize("options", [{"key": "gradient"}, {"refit": "data"}])
def test_truncation_asks_for_data_where_it_looks_at_images(options):
    text = "data is None, expected images for key .*" + next(iter(options.values()))
    with pytest.raises(TypeError, match=text):
        truncate(small_net(), keep=0.5, **options)


@pytest.mark.parametrize("data", [torch.randn(2, 4), [(torch.randn(4), 1)] * 2])
def test_truncation_refuses_data_that_is_no_pair_of_tensors(data):
    with pytest.raises(TypeError, match=r"expected a data set, .* pair \(images, lab"):
        truncate(small_net(), keep=0.5, key="activation", data=data)


def test_truncation_refuses_a_layer_or_model_that_it_cannot_cut():
    diverged, bound = make_layer(), make_layer()
    with torch.no_grad():
        diverged.lam[0] = float("nan")
    nn.utils.parametrize.register_parametrization(bound, "lam", nn.Tanh())
    remove = "parametrized; call cpnb.methods.remove_normalizer first, .* keep_cp=True"
    cases = [
        (make_layer(), 7, ValueError, "rank is 7 for layer '', expected at most the 6"),
        (diverged, 2, ValueError, "NaN or infinite parameters, .* training diverged"),
        (bound, 2, TypeError, remove),
        (nn.Linear(3, 2), 1, ValueError, "without CP layers. Call cpnb.canonicalize"),
    ]
    for model, rank, error, text in cases:
        with pytest.raises(error, match=text):
            truncate(model, rank=rank)


@pytest.mark.parametrize("refit", ["weight", "data"])
def test_refit_never_raises_its_error_when_components_are_dependent(refit):
    layer = CPLinear(6, 5, rank=8)
    with torch.no_grad():
        for factor in layer.factors:  # four components, twice, all but equal
            factor[:, 4:] = factor[:, :4] + 1e-7 * torch.randn_like(factor[:, 4:])
        layer.lam.copy_(torch.tensor([1.0, -1, 1e3, 1, -1, 1, -1e3, 1]))
    inputs = torch.randn(4, 6)  # fewer than features
    data = inputs, torch.zeros(4, dtype=torch.long)

    def error(cut):
        if refit == "weight":
            return (layer.weight - cut.weight).norm().item()
        return (layer(inputs) - cut(inputs)).norm().item()

    for rank in range(1, 9):
        options = {"rank": rank, "key": "greedy", "data": data}
        plain = error(truncate(layer, **options))
        fitted = error(truncate(layer, refit=refit, **options))
        assert fitted <= plain * (1 + 1e-4) + 1e-3  # float32, λ of a thousand
