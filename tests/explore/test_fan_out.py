"""Truncations measured together against the truncated network run on its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpnb
from cpnb.explore import fan_out
from cpnb.explore.sweep import rank_sweep
from networks import ResNet


class Net(nn.Module):
    """Modules by name, and a function of them and the images; last a linear layer."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.out = nn.LazyLinear(5)
        self._function = function

    def forward(self, images):
        return self.out(self._function(self, images).flatten(1))


def conv(*args, kind=cpnb.CPConv2d, rank=6, **options):
    return kind(*args, rank=rank, **options)


def smooth(**options):
    return Net(lambda net, x: F.silu(net.layer(x)), layer=conv(4, 6, 3, **options))


def chain():
    """Two convolutions with batch norm between, then two linear layers."""

    def function(net, x):
        hidden = F.max_pool2d(net.layer(net.norm(net.first(x)).relu()), 2)
        return net.last(net.middle(hidden.flatten(1)).relu())

    norm = nn.BatchNorm2d(5)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    return Net(
        function,
        first=conv(4, 5, 3, rank=3),
        norm=norm,
        layer=conv(5, 6, 3, rank=9),
        middle=cpnb.CPLinear(24, 8, rank=10),
        last=cpnb.CPLinear(8, 7, rank=6),
    )


NETS = {
    "stride and dilation": lambda: smooth(stride=(2, 1), dilation=(1, 2)),
    "groups": lambda: smooth(groups=2, bias=False),
    "circular padding": lambda: smooth(padding=(2, 1), padding_mode="circular"),
    "same padding": lambda: smooth(padding="same", padding_mode="reflect"),
    "absolute λ": lambda: smooth(signed=False),
    "depthwise": lambda: Net(
        lambda net, x: net.layer(x), layer=conv(4, 8, 3, groups=4)
    ),
    "1x1": lambda: Net(lambda net, x: net.layer(x), layer=conv(4, 6, 1)),
    "one channel in": lambda: Net(
        lambda net, x: F.max_pool2d(net.layer(x[:, :1]), 2), layer=conv(1, 6, 3)
    ),
    "one channel out": lambda: Net(lambda net, x: net.layer(x), layer=conv(4, 1, 3)),
    "in place": lambda: Net(
        lambda net, x: F.max_pool2d(net.layer(x).relu_(), 2), layer=conv(4, 6, 3)
    ),
    "view": lambda: Net(  # what channels_last layouts refuse
        lambda net, x: net.layer(x).view(-1, 216).relu(), layer=conv(4, 6, 3)
    ),
    "by keyword": lambda: Net(
        lambda net, x: net.layer(input=x.flatten(1)),
        layer=cpnb.CPLinear(256, 6, rank=5),
    ),
    "linear on three axes": lambda: Net(
        lambda net, x: net.layer(x.flatten(2)).relu(),
        layer=cpnb.CPLinear(64, 6, rank=5, bias=False),
    ),
    "used twice": lambda: Net(
        lambda net, x: net.layer(net.layer(x).relu()), layer=conv(4, 4, 3)
    ),
    "1-D": lambda: Net(
        lambda net, x: F.max_pool1d(net.layer(x.flatten(2)).relu(), 3),
        layer=conv(4, 6, 3, kind=cpnb.CPConv1d),
    ),
    "3-D": lambda: Net(
        lambda net, x: F.max_pool3d(net.layer(x[:, None]).relu(), 2),
        layer=conv(1, 6, 3, kind=cpnb.CPConv3d, padding=1),
    ),
    "chain": chain,
    "mlp": lambda: Net(
        lambda net, x: net.last(net.layer(net.first(x.flatten(1)).relu()).tanh()),
        first=cpnb.CPLinear(256, 9, rank=5),
        layer=cpnb.CPLinear(9, 8, rank=5),
        last=cpnb.CPLinear(8, 7, rank=5),
    ),
    "linear then convolution": lambda: Net(
        lambda net, x: net.layer(net.mix(x)),
        mix=cpnb.CPLinear(8, 8, rank=6),
        layer=conv(4, 6, 3),
    ),
}


@pytest.fixture
def images():
    return torch.randn(11, 4, 8, 8, dtype=torch.float64)


def made(build, images):
    """The network in float64, its λ of unequal size and sign."""
    net = build().double().eval()
    with torch.no_grad():
        net(images)
        for layer in cpnb.cp_layers(net).values():
            layer.lam.mul_(torch.linspace(-2, 0.5, layer.rank))
            layer.scale.fill_(1.5)
    return net


def labelled(net, images):
    """Images with labels that the network itself gives to most of them."""
    with torch.no_grad():
        labels = net(images).argmax(1)
    labels[::4] = 0
    return images, labels


def assert_equals_naive(net, data, sweep, **options):
    """Every row of a sweep is what cutting and running the network gives."""
    assert len(sweep.table) > 4
    for _, row in sweep.table.iterrows():
        ranks = {name: int(row[f"rank_{name}"]) for name in sweep.layers}
        cut = cpnb.truncate(net, rank=ranks, **options)
        assert row["accuracy"] == cpnb.accuracy(cut, data), ranks
        if (name := row["axis"]) != "*":
            whole, kept = (x.get_submodule(name).weight for x in (net, cut))
            error = cpnb.relative_error(whole, kept).item()
            assert row["relative_error"] == pytest.approx(error, abs=1e-7)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_ranks_of_a_layer_together_equal_naive_evaluation(name, images, refit):
    net = made(NETS[name], images)
    data = labelled(net, images)
    options = {"key": "greedy", "refit": refit, "progress": False}
    sweep = rank_sweep(net, data, ranks={"layer": None}, **options)
    assert sweep.methods == {"layer": "together"}
    assert_equals_naive(net, data, sweep, key="greedy", refit=refit)


@pytest.mark.parametrize("name", ["chain", "mlp", "linear then convolution"])
@pytest.mark.parametrize("sizes", [(2**19, 2**23, 100), (1, 1, 100), (2**11, 2**14, 4)])
def test_all_layers_together_equal_naive_evaluation_in_blocks_of_any_size(
    name, sizes, images, monkeypatch
):
    for constant, size in zip(("ONE_RANK", "GROUP", "BATCH"), sizes, strict=True):
        monkeypatch.setattr(fan_out, constant, size)
    monkeypatch.setattr(fan_out, "BAND", 3)
    net = made(NETS[name], images)
    data = labelled(net, images)
    ranks = dict.fromkeys(cpnb.cp_layers(net)) | {"*": [n / 12 for n in range(1, 13)]}
    for refit in (False, True):
        sweep = rank_sweep(net, data, ranks=ranks, refit=refit, progress=False)
        assert set(sweep.methods.values()) == {"together"}
        assert_equals_naive(net, data, sweep, refit=refit)


def test_all_layers_together_run_the_first_ones_once_for_each_of_their_ranks(images):
    net = made(chain, images)
    calls = []
    net.norm.register_forward_hook(lambda *_: calls.append(1))
    sweep = rank_sweep(net, labelled(net, images), ranks={"*": None}, progress=False)
    assert sweep.methods == {"*": "together"}
    # Once for each of 3 ranks; before that for FLOPs and to see whether scores agree.
    assert len(calls) <= 12 < sweep.table["parameters"].nunique()


OTHER_SCORES = "ranks that go together have other scores"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda net, x: x + net.layer(x), "RuntimeError, The size of tensor"),
        (lambda net, x: net.layer(x).softmax(0), OTHER_SCORES),
        (lambda net, x: net.layer(x).reshape(len(x), -1), "RuntimeError, mat1"),
        (lambda net, x: (net.layer(x), x)[1], OTHER_SCORES),
    ],
    ids=["adds the input", "mixes images", "counts images", "ignores the layer"],
)
def test_networks_that_cannot_go_together_are_measured_one_by_one_and_say_so(
    function, reason, images
):
    net = made(lambda: Net(function, layer=conv(4, 4, 3, padding=1)), images)
    data = labelled(net, images)
    sweep = rank_sweep(net, data, ranks={"layer": None}, progress=False)
    assert sweep.methods["layer"].startswith(f"one by one: {reason}")
    assert f"layer: one by one: {reason}" in repr(sweep)
    assert_equals_naive(net, data, sweep)


def test_all_layers_are_tried_at_several_ranks_of_a_layer_that_cannot_go_together():
    """Used on two inputs: most neighbours cut the convolution to the same rank."""

    def function(net, x):
        return net.last(net.mix((net.layer(x) - net.layer(x.mT)).flatten(1)))

    parts = {"layer": cpnb.CPConv2d(1, 8, 3, rank=4), "mix": cpnb.CPLinear(288, 40)}
    images = torch.randn(11, 1, 8, 8, dtype=torch.float64)
    net = made(lambda: Net(function, **parts, last=cpnb.CPLinear(40, 7)), images)
    data = labelled(net, images)
    sweep = rank_sweep(net, data, ranks={"*": None}, progress=False)
    assert sweep.methods["*"].startswith("one by one")
    assert_equals_naive(net, data, sweep)


def test_resnet_goes_together_before_and_behind_its_sums_only(images):
    net = ResNet(8, num_classes=4)
    net = cpnb.canonicalize(net, rank=3, init="gaussian").double().eval()
    data = labelled(net, torch.randn(9, 3, 8, 8, dtype=torch.float64))
    ranks = dict.fromkeys(["conv1", "stage2.0.conv2", "fc"])
    sweep = rank_sweep(net, data, ranks=ranks, progress=False)
    together = {axis for axis, how in sweep.methods.items() if how == "together"}
    assert together == {"conv1", "fc"}
    assert_equals_naive(net, data, sweep)


def test_low_precision_is_measured_one_by_one(images):
    net = made(NETS["1x1"], images).bfloat16()
    data = labelled(net, images.bfloat16())
    sweep = rank_sweep(net, data, ranks={"layer": None}, progress=False)
    assert sweep.methods["layer"].startswith("one by one")
    for row in sweep.table.to_dict("records"):
        cut = cpnb.truncate(net, rank=row["rank"])
        assert row["accuracy"] == cpnb.accuracy(cut, data)
