"""Truncations evaluated together against the truncated network run on its own."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpnb
from cpnb._sweep.graph import NetworkGraph, Profile
from cpnb._sweep.memory import MIB, peak_of
from cpnb._sweep.meter import RankMeter
from cpnb._sweep.points import GLOBAL
from cpnb._sweep.route import fan_route
from cpnb._sweep.sizes import fitting_sizes
from cpnb._sweep.sweeper import Sweeper
from cpnb.layers import CPConv1d, CPConv2d, CPConv3d, CPLinear


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


def conv(*args, kind=CPConv2d, rank=6, **options):
    return kind(*args, rank=rank, **options)


def smooth(**options):
    """A convolution with something of no special kind after it."""
    return Net(lambda net, x: F.silu(net.layer(x)), layer=conv(4, 6, 3, **options))


def pooled(pool, relu=F.relu, kind=CPConv2d):
    return Net(lambda net, x: pool(relu(net.layer(x))), layer=conv(4, 6, 3, kind=kind))


def pool_module():
    def function(net, x):
        return net.pool(net.relu(net.layer(x)))

    layer = conv(4, 6, 3)
    return Net(function, layer=layer, relu=nn.ReLU(inplace=True), pool=nn.MaxPool2d(2))


def views(net, x):
    """What channels_last layouts refuse."""
    hidden = net.layer(x)
    return hidden.view(hidden.size(0), -1).relu()


def pool_and_its_input():
    def function(net, x):
        hidden = net.layer(x)
        return torch.cat([F.max_pool2d(hidden, 2), hidden[..., :3, :3]], 1)

    return Net(function, layer=conv(4, 6, 3))


def residual():
    def function(net, x):
        hidden = net.first(x).relu()
        return hidden + net.norm(net.layer(hidden)) * net.gain + x[:, :1]

    norm = nn.BatchNorm2d(6)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    first, layer = conv(4, 6, 3, padding=1), conv(6, 6, 3, padding=1)
    net = Net(function, first=first, layer=layer, norm=norm)
    net.gain = nn.Parameter(torch.randn(6, 1, 1))
    return net


def mlp():
    def function(net, x):
        return net.last(net.layer(net.first(x.flatten(1)).relu()).tanh())

    linear = [CPLinear(*sizes, rank=5) for sizes in ((256, 9), (9, 8), (8, 7))]
    return Net(function, **dict(zip(("first", "layer", "last"), linear, strict=True)))


def token_mixer():
    """A linear layer on the last of three axes."""
    layer = CPLinear(64, 6, rank=5, bias=False)
    return Net(lambda net, x: net.layer(x.flatten(2)).relu(), layer=layer)


def keywords(net, x):
    """Layers and a pooling that get their input by name."""
    hidden = net.first(input=x).relu()
    hidden = torch.max_pool2d(input=net.layer(input=hidden), kernel_size=2)
    return net.last(input=hidden.flatten(1))


def with_keywords():
    first, layer = conv(4, 6, 3), conv(6, 5, 3)
    return Net(keywords, first=first, layer=layer, last=CPLinear(20, 7, rank=5))


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
    "pool with a remainder": lambda: pooled(lambda x: F.max_pool2d(x, 4)),
    "pool over a rectangle": lambda: pooled(lambda x: torch.max_pool2d(x, (1, 3))),
    "pool that overlaps": lambda: pooled(lambda x: F.max_pool2d(x, 3, stride=1)),
    "pool with padding": lambda: pooled(lambda x: F.max_pool2d(x, 2, padding=1)),
    "pool rounded up": lambda: pooled(lambda x: F.max_pool2d(x, 4, ceil_mode=True)),
    "pool after gelu": lambda: pooled(lambda x: F.max_pool2d(x, 2), relu=F.gelu),
    "pool module": pool_module,
    "pool by keyword": lambda: pooled(
        lambda x: torch.max_pool2d(input=x, kernel_size=2)
    ),
    "all by keyword": with_keywords,
    "linear by keyword": lambda: Net(
        lambda net, x: net.layer(input=x.flatten(1)), layer=CPLinear(256, 6, rank=5)
    ),
    "view": lambda: Net(views, layer=conv(4, 6, 3)),
    "pool and its input": pool_and_its_input,
    "residual and batch norm": residual,
    "linear": mlp,
    "linear on three axes": token_mixer,
    "1-D": lambda: Net(
        lambda net, x: F.max_pool1d(net.layer(x.flatten(2)).relu(), 3),
        layer=conv(4, 6, 3, kind=CPConv1d),
    ),
    "3-D": lambda: Net(
        lambda net, x: F.max_pool3d(net.layer(x[:, None]).relu(), 2),
        layer=conv(1, 6, 3, kind=CPConv3d, padding=1),
    ),
}
WITH_POOL = {
    *("pool with a remainder", "pool over a rectangle", "pool module"),
    *("one channel in", "1-D", "3-D", "pool by keyword", "all by keyword"),
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
    """Every point of a sweep is what cutting and running the network gives."""
    names = [layer.name for layer in sweep.layers]
    assert len(sweep) > 4
    for key, accuracy, loss in sweep.points():
        ranks = dict(zip(names, key, strict=True))
        cut = cpnb.truncate(net, rank=ranks, **options)
        expected = cpnb.evaluate(cut, data)
        assert accuracy == expected["accuracy"]
        assert loss == pytest.approx(expected["loss"], rel=1e-9)
        for name in names:
            whole = net.get_submodule(name).weight
            error = cpnb.relative_error(whole, cut.get_submodule(name).weight).item()
            found = sweep.point(ranks).relative_error[name]
            assert found == pytest.approx(error, abs=1e-7)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_rank_sweep_together_equals_naive_evaluation(name, images, refit):
    net = made(NETS[name], images)
    data = labelled(net, images)
    options = {"key": "greedy", "refit": refit}
    sweep = cpnb.rank_sweep(net, data, ["layer"], progress=False, **options)
    assert sweep.methods == {"layer": "together"}
    assert_equals_naive(net, data, sweep, **options)


@pytest.mark.parametrize("name", NETS)
def test_rank_sweep_keeps_pooling_within_the_layer_only_where_it_is_exact(name, images):
    net = made(NETS[name], images)
    with torch.no_grad():
        graph = NetworkGraph(net)
        route = fan_route(graph, Profile(graph, images), cpnb.cp_layers(net), "layer")
    assert (route.pooled is not None) == (name in WITH_POOL)


def test_rank_sweep_takes_layers_that_get_their_input_by_keyword(images):
    net = made(with_keywords, images)
    data = labelled(net, images)
    sweep = cpnb.rank_sweep(net, data, progress=False)
    assert [sweep.methods[name] for name in cpnb.cp_layers(net)] == ["together"] * 3
    assert_equals_naive(net, data, sweep)
    sweep.measure_times(net, data, repeats=1)
    assert sweep.point().ms > 0


@pytest.mark.parametrize("name", ["linear", "residual and batch norm"])
def test_rank_sweep_of_all_layers_equals_naive_evaluation(name, images):
    net = made(NETS[name], images)
    data = labelled(net, images)
    keeps = [0.01, *(n / 12 for n in range(1, 13))]
    for options in ({}, {"refit": True}):
        sweep = cpnb.rank_sweep(
            net, data, ranks={GLOBAL: keeps}, progress=False, **options
        )
        assert_equals_naive(net, data, sweep, **options)
        assert sweep.methods[GLOBAL].startswith("together" if name == "linear" else "o")


def test_rank_sweep_of_all_layers_computes_a_layer_anew_only_when_its_rank_changes(
    images,
):
    calls = []

    def function(net, x):
        hidden = F.max_pool2d(net.layer(net.seen(net.first(x))).relu(), 2).flatten(1)
        return net.last(net.middle(hidden))

    def build():
        return Net(
            function,
            first=conv(4, 5, 3, rank=3),
            seen=nn.Identity(),
            layer=conv(5, 6, 3, rank=40),
            middle=CPLinear(24, 8, rank=20),
            last=CPLinear(8, 7, rank=6),
        )

    net = made(build, images)
    net.seen.register_forward_hook(lambda *_: calls.append(1))
    data = labelled(net, images)
    sweep = cpnb.rank_sweep(net, data, [GLOBAL], progress=False)
    shared = len(calls)
    assert sweep.methods[GLOBAL] == "together"
    assert_equals_naive(net, data, sweep)
    assert shared < 30  # of 100 percents; a handful of them to look at the network


def used_twice(net, x):
    return net.layer(net.layer(x).relu())


def counts_images(net, x):
    return net.layer(x).reshape(x.shape[0], -1)


def mixes_images(net, x):
    hidden = net.layer(x)
    return hidden - hidden.mean(0)


def changes_what_is_shared(net, x):
    hidden = x + 1
    return hidden.add_(net.layer(hidden).mean((1, 2, 3), keepdim=True))


def changes_what_is_shared_twice(net, x):
    hidden = x + 1
    return hidden.add_(net.layer(net.layer(hidden)).mean((1, 2, 3), keepdim=True))


def ties_weights(net, x):
    return net.layer(x).flatten(1) * net.layer.lam.sum()


def chooses(net, x):
    return net.layer(x) if x.sum() > 0 else net.layer(-x)


def ignores(net, x):
    net.layer(x)
    return x


def unused(net, x):
    return x


@pytest.mark.parametrize(
    ("function", "method"),
    [
        (used_twice, "one by one after what they share: layer 'layer' is used 2 times"),
        (counts_images, "one by one after.*depends on the number of images"),
        (mixes_images, "one by one after.*ranks evaluated together have other scores"),
        (changes_what_is_shared, "together"),
        (changes_what_is_shared_twice, "one by one: ranks evaluated together have"),
        (ties_weights, "one by one: ranks evaluated together have other scores"),
        (chooses, "one by one: torch.fx cannot trace it .TraceError: symbolically"),
        (ignores, "one by one after.*the scores do not depend on layer 'layer'"),
        (unused, "one by one after.*layer 'layer' is used 0 times"),
    ],
)
def test_rank_sweep_says_where_it_goes_one_by_one(function, method, images):
    layer = conv(4, 4, 3, padding=1)
    net = made(lambda: Net(function, layer=layer), images)
    data = labelled(net, images)
    sweep = cpnb.rank_sweep(net, data, ["layer"], progress=False)
    rows = sweep.to_rows()
    assert {row["method"] for row in rows} == {sweep.methods["layer"]}
    assert re.match(method, sweep.methods["layer"])
    assert_equals_naive(net, data, sweep)


@pytest.mark.parametrize("masked", [-1e9, -torch.inf])
def test_rank_sweep_sees_other_scores_beside_a_masked_class(masked, images):
    for function, method in (
        (mixes_images, "one by one after.*ranks evaluated together have other scores"),
        (lambda net, x: net.layer(x), "together"),
    ):
        net = made(lambda f=function: Net(f, layer=conv(4, 4, 3, padding=1)), images)
        with torch.no_grad():
            net.out.bias[4] = masked
        data = labelled(net, images)
        sweep = cpnb.rank_sweep(net, data, ["layer"], progress=False)
        assert re.match(method, sweep.methods["layer"])
        assert_equals_naive(net, data, sweep)


def test_rank_sweep_heeds_hooks_of_layers_and_of_the_network(images):
    net = made(NETS["1x1"], images)
    net.register_forward_hook(lambda net, args, scores: scores.flip(1))
    data = labelled(net, images)
    sweep = cpnb.rank_sweep(net, data, ["layer"], progress=False)
    assert sweep.methods == {"layer": "together"}
    assert_equals_naive(net, data, sweep)
    net.layer.register_forward_hook(lambda layer, args, output: output.square())
    sweep = cpnb.rank_sweep(net, data, ["layer"], progress=False)
    assert "layer 'layer' has hooks" in sweep.methods["layer"]
    assert_equals_naive(net, data, sweep)


def test_rank_sweep_goes_one_by_one_in_low_precision(images):
    net = made(NETS["1x1"], images).bfloat16()
    data = labelled(net, images.bfloat16())
    sweep = cpnb.rank_sweep(net, data, ["layer"], progress=False)
    assert "sums of components in torch.bfloat16" in sweep.methods["layer"]
    for (rank,), accuracy, _ in sweep.points():
        assert accuracy == cpnb.accuracy(cpnb.truncate(net, rank=rank), data)


def test_rank_sweep_does_not_keep_a_loss_that_is_not_finite(images):
    net = made(
        lambda: Net(lambda net, x: net.layer(x) * 1e200, layer=conv(4, 3, 1)), images
    )
    with torch.no_grad():
        net.out.weight.mul_(1e200)
    data = labelled(net, images)
    sweep = cpnb.rank_sweep(net, data, ["layer"], progress=False)
    assert sweep.point().loss is None
    assert sweep.point().accuracy == cpnb.accuracy(net, data)


@pytest.mark.parametrize("name", ["residual and batch norm", "pool module", "linear"])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_rank_sweep_does_not_depend_on_batch_size_and_memory(name, batch_size, images):
    net = made(NETS[name], images)
    data = labelled(net, images)
    options = {"progress": False, "batch_size": batch_size}
    large = cpnb.rank_sweep(net, data, **options)
    small = cpnb.rank_sweep(net, data, memory=0.1, **options)
    for found, expected in zip(small.points(), large.points(), strict=True):
        assert found[:2] == expected[:2]
        assert found[2] == pytest.approx(expected[2], rel=1e-9)


@pytest.mark.parametrize("method", ["together", "shared", "naive"])
def test_rank_sweep_keeps_to_the_memory_it_is_given(method):
    """Tensors made on the way; ten times the images would take ten times as much."""
    function = {
        "together": lambda net, x: F.max_pool2d(net.layer(net.first(x)).relu(), 2),
        "shared": lambda net, x: net.layer(net.layer(net.first(x))).relu(),
        "naive": lambda net, x: net.layer(net.first(x)) if x.sum() < 1e9 else x,
    }[method]
    first, layer = conv(1, 8, 3, padding=1), conv(8, 8, 3, padding=1, rank=20)
    images = torch.randn(300, 1, 12, 12)
    net = Net(function, first=first, layer=layer)
    net(images[:1])
    data = images, net(images).argmax(1)

    def needed(memory):
        options = {"memory": memory, "progress": False}
        run = functools.partial(cpnb.rank_sweep, net, data, ["layer"], [1, 7, 13])
        return peak_of(functools.partial(run, **options)) / MIB

    assert needed(2) < 2 < needed(1024) / 2
    with pytest.raises(ValueError, match=r"memory is 0.01 MiB, expected at least 0"):
        cpnb.rank_sweep(net, data, memory=0.01)
    with pytest.raises(ValueError, match="memory is -1, expected a finite number"):
        cpnb.rank_sweep(net, data, memory=-1)


@pytest.fixture
def wide(images):
    """A network whose linear layer takes two bands, and images it mostly gets right."""

    def build():
        layers = {"first": nn.Linear(256, 64), "layer": CPLinear(64, 8, rank=80)}
        return Net(lambda net, x: net.layer(net.first(x.flatten(1))).relu(), **layers)

    net = made(build, images)
    return net, labelled(net, images)


def test_rank_sweep_keeps_what_is_done_of_a_linear_layer_when_interrupted(wide):
    def press(layer, inputs, scores):
        """Press Ctrl-C before the last rows of a run."""
        nonlocal rows
        rows += len(scores)
        if rows == last:
            raise KeyboardInterrupt

    net, data = wide
    rows, last = 0, None
    net.out.register_forward_hook(press)
    assert cpnb.rank_sweep(net, data, ["layer"], progress=False).status == "finished"
    rows, last = 0, rows
    stopped = cpnb.rank_sweep(net, data, ["layer"], progress=False)
    assert stopped.status == "interrupted"
    assert stopped.methods == {"layer": "together"}
    assert [rank for rank, _ in stopped.curve("layer")] == list(range(1, 65))
    rows = last + 1
    assert_equals_naive(net, data, stopped)


@pytest.mark.parametrize(
    ("memory", "copies", "kept"), [(1024, 1, True), (0.2, 1, True), (0.2, 20, False)]
)
def test_rank_sweep_computes_what_all_bands_share_once_where_it_fits(
    wide, memory, copies, kept
):
    def counted(ranks):
        calls.clear()
        options = {"memory": memory, "progress": False}
        sweep = cpnb.rank_sweep(net, data, ["layer"], ranks, **options)
        assert sweep.methods == {"layer": "together"}
        return len(calls), sweep

    net, (images, labels) = wide
    data = images.repeat(copies, 1, 1, 1), labels.repeat(copies)
    calls = []
    net.first.register_forward_hook(lambda *_: calls.append(1))
    (once, _), (twice, sweep) = counted([1, 2, 63]), counted(None)
    assert (once == twice) == kept
    assert_equals_naive(net, data, sweep)


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + 1
        del first
        third = second.view(10, 100) * 2  # the view takes nothing
        del second
        return third.sum()

    assert peak_of(run) == 8000
    given = torch.zeros(1000)
    assert peak_of(lambda: given.add_(1)) == 0


def test_sweep_counts_the_flops_of_dense_layers_and_chains():
    net = cpnb.canonicalize(cpnb.DigitsNet(), rank=9, skip="fc2")
    data = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    sweep = cpnb.rank_sweep(net, data, ["conv2"], [4], progress=False)
    cut = cpnb.truncate(net, rank={"conv2": 4})
    report = cpnb.truncation_report(net, cut, data)
    point = sweep.point({"conv2": 4})
    assert point.flops == report.chain_flops
    assert point.dense_flops == report.dense_flops
    row = sweep.to_rows()[0]
    assert row["network_flops"] == report.chain_flops
    positions, rank = 64, 4
    assert row["flops"] == 2 * positions * rank * (16 + 9 + 32)
    assert row["dense_flops"] == 2 * positions * 16 * 9 * 32


def test_rank_sweep_measures_a_network_that_changes_its_input(images):
    def changes(net, x):
        return net.layer(x.sub_(0.3).mul_(2))

    net = made(lambda: Net(changes, layer=conv(4, 4, 3, padding=1)), images)
    copied = images.clone()
    data = copied, labelled(net, images.clone())[1]
    for key, refit in (("lam", False), ("activation", False), ("lam", "data")):
        options = {"key": key, "refit": refit, "progress": False}
        sweep = cpnb.rank_sweep(net, data, **options)
        assert sweep.methods["layer"] == "together"
        for rank in (1, 3):
            cut = cpnb.truncate(net, rank=rank, key=key, refit=refit, data=data)
            accuracy = cpnb.accuracy(cut, data)
            assert dict(sweep.curve("layer"))[rank].accuracy == accuracy
    assert torch.equal(copied, images)


def test_rank_sweep_goes_one_by_one_where_memory_holds_a_single_image(images):
    net = made(NETS["1x1"], images)
    data = labelled(net, images)
    sweep = cpnb.rank_sweep(net, data, ["layer"], memory=0.012, progress=False)
    assert sweep.methods["layer"] == "one by one: the memory holds 1 of 4 images"
    assert_equals_naive(net, data, sweep)


@pytest.mark.parametrize("wrong", [lambda scores: scores.sum(), lambda s: s[:, 0]])
def test_rank_sweep_refuses_scores_of_another_shape_as_evaluate_does(images, wrong):
    net = made(NETS["1x1"], images)
    data = labelled(net, images)
    net.register_forward_hook(lambda net, args, scores: wrong(scores))
    with pytest.raises(ValueError, match=r"model returned scores of shape .*one row"):
        cpnb.rank_sweep(net, data, progress=False)


def test_sizes_do_not_count_what_a_network_makes_at_its_first_use(images):
    def late(net, x):
        return net.late(net.layer(x).flatten(1)).relu()

    def build():
        layers = {
            "layer": conv(4, 6, 3, padding=1),
            "late": CPLinear(384, 900, rank=300),
        }
        return Net(late, **layers)

    net = made(build, images)
    memory = 24 * MIB  # of which the kernel of the last layer takes a part
    sweeper = Sweeper(RankMeter(net, labelled(net, images)), memory)
    points = [{"layer": rank, "late": 300} for rank in (1, 3, 6)]
    evaluation, first = sweeper._evaluation("layer", points)
    layers = [net.layer, net.late]
    again = fitting_sizes(evaluation, points, images[:8], layers, memory, 1000)
    assert first == again
