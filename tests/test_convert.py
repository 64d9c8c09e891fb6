"""Conversion of layers and models: exact or refused, the source never touched."""

import copy
import functools
import math
import warnings

import pytest
import torch
from shared import seeded
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from cpnb import CPConv1d, CPConv2d, CPConv3d, CPLinear
from cpnb.convert import canonicalize, cp_layers, from_layer, to_dense
from cpnb.decompose import power_method
from cpnb.methods import normalize
from cpnb.truncation import truncate

KINDS = {
    1: (nn.Conv1d, CPConv1d, (9,)),
    2: (nn.Conv2d, CPConv2d, (8, 9)),
    3: (nn.Conv3d, CPConv3d, (6, 5, 7)),
}


class Block(nn.Module):
    """A residual block: nested names, a norm layer and a functional ReLU."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

    def forward(self, images):
        return self.head(images + self.norm(self.conv(images)).relu())


def snapshot(model):
    return copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]


def assert_untouched(model, before):
    state, kinds = before
    assert [type(m) for m in model.modules()] == kinds
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), state[name].nan_to_num())


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"groups": 2, "padding": 1, "padding_mode": "circular", "bias": False},
    ],
    ids=["plain", "stride", "dilation", "groups"],
)
def test_from_layer_keeps_the_function_of_the_stock_layer(ndim, options):
    stock_kind, kind, size = KINDS[ndim]
    kernel = 2 if ndim < 3 else (2, 1, 2)
    stock = stock_kind(2, 4, kernel, dtype=torch.float64, **options)
    rank = 2 * math.prod(stock.weight.shape[1:])  # enough to be exact
    images = torch.randn(3, 2, *size, dtype=torch.float64, generator=seeded())
    layer = from_layer(stock, rank=rank, init="als", generator=seeded())
    assert type(layer) is kind
    assert layer.lam.dtype == torch.float64
    assert_close(layer(images), stock(images), rtol=0, atol=1e-4)
    dense = to_dense(layer)
    assert_close(dense(images), layer(images))
    assert repr(dense) == repr(stock)


def test_from_layer_copies_and_never_shares():
    stock = nn.Conv2d(3, 4, 3).eval()
    stock.weight.requires_grad_(False)
    before = snapshot(stock)
    layer = from_layer(stock, rank=2)
    assert not layer.training
    assert not layer.lam.requires_grad
    assert layer.bias.requires_grad
    with torch.no_grad():
        layer.bias.add_(1)
        layer.lam.add_(1)
    assert_untouched(stock, before)
    dense = to_dense(layer)
    assert type(dense) is nn.Conv2d
    assert not dense.training
    assert dense.bias.data_ptr() != layer.bias.data_ptr()
    assert not dense.weight.requires_grad
    with torch.no_grad():  # a caller's choice, which must not freeze the result
        assert to_dense(CPLinear(3, 2)).weight.requires_grad


def test_canonicalize_converts_every_layer_and_leaves_the_source():
    model = Block().eval()
    before = snapshot(model)
    # 36 is the rank that makes any 4x4x3x3 kernel exact, 5 that of the 5x64 matrix.
    ranks = {"conv": 36, "head.1": 5}
    new = canonicalize(model, rank=ranks, init="als", generator=seeded())
    assert_untouched(model, before)
    assert {n: layer.rank for n, layer in cp_layers(new).items()} == ranks
    images = torch.randn(2, 4, 4, 4)
    assert_close(new(images), model(images), rtol=0, atol=1e-3)
    assert type(new.norm) is nn.BatchNorm2d
    assert new.norm is not model.norm
    assert not new.training
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in new.parameters())


def test_to_dense_gives_stock_layers_and_the_same_function():
    cp = canonicalize(Block().double(), rank=3)
    before = snapshot(cp)
    dense = to_dense(cp)
    assert_untouched(cp, before)
    modules = {type(m).__module__.split(".")[0] for m in dense.modules()}
    assert modules == {"torch", __name__}
    images = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    for mode in (True, False):
        assert_close(dense.train(mode)(images), cp.train(mode)(images))


@pytest.mark.parametrize(
    "skip",
    [("head.1",), "head.1", lambda name, layer: isinstance(layer, nn.Linear)],
    ids=["names", "name", "predicate"],
)
def test_canonicalize_leaves_skipped_layers_alone(skip):
    model = Block()
    new = canonicalize(model, skip=skip)
    assert list(cp_layers(new)) == ["conv"]
    assert torch.equal(new.head[1].weight, model.head[1].weight)


def test_canonicalize_keeps_cp_layers_and_takes_a_bare_layer():
    once = canonicalize(Block(), rank=3, skip="head.1")
    twice = canonicalize(once, rank=2)
    assert [layer.rank for layer in cp_layers(twice).values()] == [3, 2]
    twice = canonicalize(once, rank={"head.1": lambda kernel: kernel.ndim})
    assert [layer.rank for layer in cp_layers(twice).values()] == [3, 2]
    assert isinstance(canonicalize(nn.Linear(4, 3)), CPLinear)
    assert isinstance(to_dense(CPLinear(4, 3)), nn.Linear)


def test_conversion_tells_what_it_loses_and_keeps_the_norm():
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(30, 20))
    with pytest.warns(UserWarning, match=r"keeps (\d+)% .* of '0'.*fit_rank") as told:
        small = canonicalize(net, rank={"0": 4, "1": 20}, generator=seeded())
    assert len(told) == 1
    for new, old in zip(small, net, strict=True):
        assert_close(new.weight.norm(), old.weight.norm())
    error = power_method(net[0].weight.detach(), 4, generator=seeded()).relative_error
    conv, linear = (layer.weight.square().sum() for layer in net)
    assert f"keeps {1 - error**2 * conv / (conv + linear):.0%}" in str(told[0].message)
    with warnings.catch_warnings(action="error"):
        canonicalize(net, rank={"0": 60, "1": 20}, generator=seeded())  # little is lost
        canonicalize(net, rank=2, init="unified")  # nothing was to be kept
    nn.init.normal_(net[1].weight, std=5)  # ‖W‖⁴ leaves float16's range
    with pytest.warns(UserWarning, match="keeps"):
        from_layer(net[1].half(), rank=4)


def test_ranks_above_what_is_useful_are_refused_and_in_a_network_clipped():
    with pytest.raises(ValueError, match=r"rank is 19 for a kernel .* at most 18"):
        CPConv2d(1, 32, 3, rank=19)
    assert CPConv2d(1, 32, 3, rank=11).rank == 11  # as in the paper's LeNet
    net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 2))
    with pytest.warns(UserWarning, match=r"rank is 16, .* \{'1': 2\}"):
        assert [layer.rank for layer in canonicalize(net, rank=16)] == [16, 2]


class Fancy(nn.Linear):
    """A subclass, which may do anything."""


BILINEAR = nn.Sequential(nn.Bilinear(3, 3, 3))
WEIGHT_NORM = parametrizations.weight_norm(nn.Linear(4, 3))
WITH_NAN = nn.Sequential(nn.Linear(4, 3))
WITH_NAN[0].weight.data[0, 0] = math.nan


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (BILINEAR, {}, "layer '0' is a Bilinear: expected exactly one of Conv1d"),
        (BILINEAR, {}, r"To leave it alone, pass skip=\('0',\)"),
        (Fancy(3, 2), {}, "layer '' is a Fancy: .* and no subclass"),
        (WEIGHT_NORM, {}, "it is parametrized; call cpnb.methods.remove_normalizer"),
        (WITH_NAN, {}, r"1 NaN or infinite entries out of 12, [^$]* about layer '0'"),
        (nn.ReLU(), {}, "ReLU with no convolution or linear layer"),
        (Block(), {"skip": "convv"}, r"skip names \['convv'\], expected some of"),
        (Block(), {"rank": 0}, "rank is 0"),
        (Block(), {"rank": {"conv": 3}}, r"rank lacks \['head.1'\] and has unknown"),
        (Block(), {"init": "he"}, "init is 'he'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_canonicalize_refuses_with_a_clear_error_and_leaves_the_source(
    model, options, text
):
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match=text):
        canonicalize(model, **options)
    assert_untouched(model, before)


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.LazyLinear(3), CPLinear(3, 2)])
def test_from_layer_refuses_other_layers(layer):
    with pytest.raises(TypeError, match=f"layer is a {type(layer).__name__}: expected"):
        from_layer(layer, rank=2)


def patch(layer):
    old = layer.forward
    layer.forward = lambda inputs: 2 * old(inputs)


def hook(*_):
    return None


GAIN = nn.Parameter(torch.ones(3))
OWN = "it has attributes of its own, "
HOOKS = "it has hooks, which would be lost"
STATE = {
    "forward": (patch, OWN + "forward"),
    "gain": (lambda one: one.register_parameter("gain", GAIN), OWN + "gain"),
    "mask": (lambda one: one.register_buffer("mask", torch.ones(3)), OWN + "mask"),
    "act": (lambda one: one.add_module("act", nn.ReLU()), OWN + "act"),
    "tag": (lambda one: setattr(one, "tag", 3), OWN + "tag"),
    "forward hook": (lambda one: one.register_forward_hook(hook), HOOKS),
    "forward pre-hook": (lambda one: one.register_forward_pre_hook(hook), HOOKS),
    "backward hook": (lambda one: one.register_full_backward_hook(hook), HOOKS),
    "backward pre-hook": (lambda o: o.register_full_backward_pre_hook(hook), HOOKS),
    "parameter hook": (lambda one: [*one.parameters()][-2].register_hook(hook), HOOKS),
}
CALLS = {
    "from_layer": (nn.Linear(4, 3), lambda layer: from_layer(layer, rank=2)),
    "of conv": (nn.Conv2d(4, 3, 3), lambda layer: from_layer(layer, rank=2)),
    "canonicalize": (nn.Linear(4, 3), lambda one: canonicalize(nn.Sequential(one))),
    "to_dense": (CPLinear(4, 3), lambda one: to_dense(nn.Sequential(one))),
    "truncate": (CPConv2d(4, 3, 3), lambda one: truncate(nn.Sequential(one), rank=1)),
}


@pytest.mark.parametrize("state", STATE)
@pytest.mark.parametrize("call", CALLS)
def test_conversions_refuse_a_layer_with_state_that_would_be_lost(call, state):
    layer, convert = CALLS[call]
    convert(layer)
    layer = copy.deepcopy(layer)
    plant, text = STATE[state]
    plant(layer)
    with pytest.raises(TypeError, match=text):
        convert(layer)


# By object, by memory, and as an autoencoder ties them: the encoder's weight, turned.
TIES = {
    "object": lambda weight: weight,
    "storage": lambda weight: nn.Parameter(weight.data),
    "transposed": lambda weight: nn.Parameter(weight.data.T),
}


@pytest.mark.parametrize("tie", TIES)
def test_canonicalize_refuses_tied_weights(tie):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = TIES[tie](model[0].weight)
    text = "layer '0' shares a parameter: 0.weight and 1.weight are.*Pass the layers"
    with pytest.raises(ValueError, match=text):
        canonicalize(model)


def test_conversions_keep_a_layer_that_is_used_twice_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    new = canonicalize(model)
    dense, cut = to_dense(new), truncate(new, rank=1)
    assert all(each[0] is each[2] for each in (new, dense, cut))
    assert list(cp_layers(new)) == ["0", "3"] and not cp_layers(dense)
    for name in ("0", "2"):  # either of its names
        assert list(cp_layers(canonicalize(model, skip=name))) == ["3"]


@pytest.mark.parametrize("tie", ["object", "storage"])
@pytest.mark.parametrize("name", ["lam", "bias", "factors"])
@pytest.mark.parametrize("call", ["to_dense", "truncate"])
def test_conversions_of_cp_layers_refuse_tied_parameters(call, name, tie):
    model = nn.Sequential(CPLinear(4, 4, rank=3), CPLinear(4, 4, rank=3))
    if name == "factors":
        model[1].factors[0] = TIES[tie](model[0].factors[0])
    else:
        setattr(model[1], name, TIES[tie](getattr(model[0], name)))
    with pytest.raises(ValueError, match=f"0.{name}.* and 1.{name}.* are the same"):
        CONVERSIONS[call][1](model)


WAYS = {
    "closure": lambda fc: lambda inputs: fc(inputs),
    "default": lambda fc: lambda inputs, layer=fc: layer(inputs),
    "keyword": lambda fc: lambda inputs, *, layer=fc: layer(inputs),
    "bound method": lambda fc: lambda inputs, call=fc.forward: call(inputs),
    "partial": lambda fc: functools.partial(lambda inputs: fc(inputs)),
    "nested": lambda fc: WAYS["closure"](WAYS["closure"](fc)),
    "list": lambda fc: [WAYS["closure"](fc)],
    "dict": lambda fc: {"run": WAYS["closure"](fc)},
    "list in a closure": lambda fc: WAYS["closure"]([fc]),
    "partial in a closure": lambda fc: WAYS["closure"](functools.partial(fc)),
}
CONVERSIONS = {
    "canonicalize": (nn.Linear, lambda model: canonicalize(model, init="power")),
    "to_dense": (CPLinear, to_dense),
    "truncate": (CPLinear, lambda model: truncate(model, rank=1)),
}


class Keeps(nn.Module):
    """Calls its layer by way of an attribute, as minGPT does."""

    def __init__(self, kind, way):
        super().__init__()
        self.fc = kind(4, 3)
        self.run = way(self.fc)
        self.scale = lambda hidden, by=2.0: by * hidden  # holds no module

    def forward(self, inputs):
        return self.scale(self.run(inputs))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CONVERSIONS)
def test_conversions_refuse_a_function_that_holds_a_module(call, way):
    kind, convert = CONVERSIONS[call]
    model = nn.Sequential()
    model.add_module("block", Keeps(kind, WAYS[way]))
    with pytest.raises(
        TypeError, match=r"attribute 'run' of module 'block' is .*holds"
    ):
        convert(model)


def test_conversions_refuse_a_hook_that_holds_a_module():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda module, args, out: out + model[0](args[0]))
    with pytest.raises(TypeError, match=r"'_forward_hooks' of module '' .* holds a"):
        canonicalize(model)


@pytest.mark.parametrize("call", CONVERSIONS)
def test_conversions_copy_an_attribute_that_calls_a_layer(call):
    kind, convert = CONVERSIONS[call]
    for way in (lambda fc: fc.__call__, lambda fc: functools.partial(fc)):
        model = Keeps(kind, way)
        model._compiled_call_impl = WAYS["closure"](model.fc)  # as compile() leaves it
        model.fc._is_hf_initialized = True  # no more than a flag
        new = convert(model)
        assert type(new.fc) is not kind or call == "truncate"
        with torch.no_grad():
            new.fc.bias.add_(100)
        assert new(torch.randn(5, 4)).min() > 150


@pytest.mark.parametrize(
    "call", [canonicalize, functools.partial(normalize, name="none")]
)
def test_conversions_say_how_to_remove_what_torch_cannot_copy(call):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    with pytest.raises(TypeError, match=r"'weight' of module '0' .*utils.prune.remove"):
        call(net, skip=("0",))
