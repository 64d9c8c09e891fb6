"""Whole-model conversion: exact or refused, the source never touched."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import cpnb


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
    return copy.deepcopy(model.state_dict())


def assert_untouched(model, before, kinds):
    assert [type(m) for m in model.modules()] == kinds
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_canonicalize_converts_every_layer_and_leaves_the_source():
    model = Block().eval()
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    # 36 is the rank that makes any 4x4x3x3 kernel exact, 5 that of the 5x64 matrix.
    ranks = {"conv": 36, "head.1": 5}
    new = cpnb.canonicalize(
        model, rank=ranks, init="als", generator=torch.Generator().manual_seed(0)
    )
    assert_untouched(model, before, kinds)
    assert {n: layer.rank for n, layer in cpnb.cp_layers(new).items()} == ranks
    images = torch.randn(2, 4, 4, 4)
    assert_close(new(images), model(images), rtol=0, atol=1e-3)
    assert type(new.norm) is nn.BatchNorm2d
    assert new.norm is not model.norm
    assert not new.training


def test_to_dense_gives_stock_layers_and_the_same_function():
    cp = cpnb.canonicalize(Block().double(), rank=3)
    before, kinds = snapshot(cp), [type(m) for m in cp.modules()]
    dense = cpnb.to_dense(cp)
    assert_untouched(cp, before, kinds)
    assert all(
        type(m).__module__.startswith(("torch", __name__)) for m in dense.modules()
    )
    images = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    for mode in (True, False):
        assert_close(dense.train(mode)(images), cp.train(mode)(images))


def test_to_dense_keeps_a_shared_layer_shared():
    layer = cpnb.CPLinear(4, 4, rank=2)
    dense = cpnb.to_dense(nn.Sequential(layer, nn.ReLU(), layer))
    assert dense[0] is dense[2]
    assert type(dense[0]) is nn.Linear


def test_canonicalize_trains_from_random_starts_by_default():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    new = cpnb.canonicalize(model)
    for layer in cpnb.cp_layers(new).values():
        assert layer.rank == layer.break_even_rank
        fan_in = layer.weight[0].numel()
        assert layer.weight.var().item() == pytest.approx(2 / fan_in, rel=0.1)


@pytest.mark.parametrize(
    "skip",
    [("head.1",), "head.1", lambda name, layer: isinstance(layer, nn.Linear)],
    ids=["names", "name", "predicate"],
)
def test_canonicalize_leaves_skipped_layers_alone(skip):
    model = Block()
    new = cpnb.canonicalize(model, skip=skip)
    assert list(cpnb.cp_layers(new)) == ["conv"]
    assert torch.equal(new.head[1].weight, model.head[1].weight)
    assert new.head[1] is not model.head[1]


def test_canonicalize_keeps_cp_layers_and_takes_a_bare_layer():
    once = cpnb.canonicalize(Block(), rank=3, skip="head.1")
    twice = cpnb.canonicalize(once, rank=2)
    ranks = [layer.rank for layer in cpnb.cp_layers(twice).values()]
    assert ranks == [3, 2]
    assert isinstance(cpnb.canonicalize(nn.Linear(4, 3)), cpnb.CPLinear)
    assert isinstance(cpnb.to_dense(cpnb.CPLinear(4, 3)), nn.Linear)


def test_canonicalize_repeats_with_a_generator():
    twins = [
        cpnb.canonicalize(Block(), generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    for name in ("conv", "head.1"):
        one, other = (twin.get_submodule(name).weight for twin in twins)
        assert torch.equal(one, other)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def with_nan():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    return nn.Sequential(layer)


def with_hook():
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda *args: None)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (tied(), {}, ValueError, "layer '0' shares a parameter: 0.weight and 1.weight"),
        (
            nn.Sequential(nn.ConvTranspose2d(3, 3, 3)),
            {},
            TypeError,
            r"layer '0' is a ConvTranspose2d: expected exactly one of Conv1d.*"
            r"pass skip=\('0',\)",
        ),
        (
            nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
            {},
            TypeError,
            "it is parametrized; call cpnb.remove_normalizer first",
        ),
        (with_hook(), {}, TypeError, "it has hooks, which would be lost"),
        (
            with_nan(),
            {"init": "power"},
            ValueError,
            "layer.weight has 1 NaN or infinite entries out of 12",
        ),
        (nn.ReLU(), {}, ValueError, "ReLU with no convolution or linear layer"),
        (Block(), {"skip": "convv"}, ValueError, r"skip names \['convv'\], expected"),
        (Block(), {"skip": 3}, TypeError, "skip is 3, expected layer names or a pred"),
        (Block(), {"rank": 0}, ValueError, "rank is 0"),
        (
            Block(),
            {"rank": {"conv": 3}},
            ValueError,
            r"rank lacks \['head.1'\] and has unknown \[\]",
        ),
        (Block(), {"init": "he"}, ValueError, "init is 'he'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_canonicalize_refuses_with_a_clear_error_and_leaves_the_source(
    model, options, error, text
):
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(error, match=text):
        cpnb.canonicalize(model, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())
    assert [type(m) for m in model.modules()] == kinds


def test_tied_weights_can_be_skipped():
    new = cpnb.canonicalize(nn.Sequential(tied(), nn.Linear(4, 2)), skip=("0.0", "0.1"))
    assert new[0][0].weight is new[0][1].weight


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.ReLU(), "layer is a ReLU: expected exactly one of"),
        (nn.LazyLinear(3), "layer is a LazyLinear"),
        (nn.ConvTranspose2d(3, 3, 3), "layer is a ConvTranspose2d"),
    ],
)
def test_from_layer_refuses_other_layers(layer, text):
    with pytest.raises(TypeError, match=text):
        cpnb.from_layer(layer, rank=2)


def hooked(kind):
    layer = nn.Linear(4, 3)
    if kind == "backward pre":
        layer.register_full_backward_pre_hook(lambda *args: None)
    elif kind == "forward pre":
        layer.register_forward_pre_hook(lambda *args: None)
    else:
        layer.weight.register_hook(lambda gradient: gradient)
    return layer


@pytest.mark.parametrize("kind", ["backward pre", "forward pre", "parameter"])
def test_from_layer_refuses_every_kind_of_hook(kind):
    with pytest.raises(TypeError, match="it has hooks, which would be lost"):
        cpnb.from_layer(hooked(kind), rank=2)


def test_to_dense_refuses_a_layer_with_hooks():
    layer = cpnb.CPLinear(4, 3)
    layer.register_forward_hook(lambda layer, inputs, output: 2 * output)
    with pytest.raises(TypeError, match="layer is a CPLinear: it has hooks"):
        cpnb.to_dense(nn.Sequential(layer))


def test_skip_takes_every_name_of_a_shared_layer():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Pass the layers in skip"):
        cpnb.canonicalize(model)
    new = cpnb.canonicalize(model, skip=("0", "2"))
    assert new[0] is new[2]
    assert list(cpnb.cp_layers(new)) == ["3"]


def test_from_layer_of_a_class_refuses_a_layer_of_another_kind():
    with pytest.raises(TypeError, match="expected a Conv2d for CPConv2d"):
        cpnb.CPConv2d.from_layer(nn.Conv1d(2, 3, 3), rank=2)


@pytest.mark.parametrize(
    "convert",
    [
        lambda layer: cpnb.canonicalize(layer, rank=4),
        lambda layer: cpnb.factorize(layer, rank=2, skip=()),
    ],
    ids=["canonicalize", "factorize"],
)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
def test_converted_layers_name_their_input_as_torch_does(kind, convert):
    dense, x = (
        (nn.Conv2d(3, 5, 3), torch.randn(2, 3, 6, 6))
        if kind is nn.Conv2d
        else (nn.Linear(6, 5), torch.randn(2, 6))
    )
    converted = convert(dense)
    assert type(converted) is not kind
    assert_close(converted(input=x), converted(x), rtol=0, atol=0)
    assert converted(input=x).shape == dense(input=x).shape
