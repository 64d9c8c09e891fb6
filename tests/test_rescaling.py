"""Rescaling leaves the function as it is, and puts the norms where it says."""

import copy
import math
import pickle
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
from cpnb._rescaling.plan import LIMIT
from cpnb.lowrank_base import LowRankLayer
from cpnb.rescaling import MODES, Rescaling, rescale_

NETWORKS = {
    "LeNet": (cpnb.LeNet, (1, 28, 28)),
    "AlexNet": (cpnb.AlexNet, (3, 32, 32)),
    "VGG": (cpnb.VGG, (3, 32, 32)),
    "ResNet-20": (cpnb.ResNet, (3, 32, 32)),
}
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}


def ill_scaled(model, seed=0, spread=0.7):
    """Give units uneven norms and norms statistics of their own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like):
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._NormBase | nn.GroupNorm):
                for parameter in layer.parameters():
                    parameter.copy_(draw(parameter))
                if getattr(layer, "running_var", None) is not None:
                    layer.running_mean.copy_(draw(layer.running_mean))
                    layer.running_var.copy_(draw(layer.running_var).exp())
            elif isinstance(layer, cpnb.CPLayer):
                rows = layer.factors[0]
                rows.mul_((spread * draw(rows[:, 0])).exp()[:, None])
            elif isinstance(layer, LowRankLayer):
                for rows in (layer.left, layer.right):
                    rows.mul_((spread * draw(rows[:, 0])).exp()[:, None])
            elif isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
                rows = layer.weight.flatten(1)
                rows.mul_((spread * draw(rows[:, 0])).exp()[:, None])
    return model


@torch.no_grad()
def outputs(model, images, training):
    """Scores, with the same dropout each time."""
    torch.manual_seed(0)
    return model.train(training)(images)


def change(before, after, images):
    """Largest relative change of the output, in training and in evaluation."""
    return max(
        cpnb.relative_error(
            outputs(before, images, training), outputs(after, images, training)
        ).item()
        for training in (True, False)
    )


def rescaled(model, **options):
    """A rescaled copy with its report."""
    copied = copy.deepcopy(model)
    return copied, rescale_(copied, **options)


def images_for(shape, n=3, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)


def mlp(*sizes, activation=nn.ReLU):
    layers = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, dtype=torch.float64), activation()]
    return nn.Sequential(*layers[:-1])


# --- the function stays ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", EXACT, ids=["float64", "float32"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, form) for name in NETWORKS for form in ("dense", "cp")),
        *((name, "low rank") for name in ("LeNet", "ResNet-20")),
    ],
)
def test_rescale_leaves_the_output_in_training_and_evaluation(name, form, mode, dtype):
    network, shape = NETWORKS[name]
    model = network(generator=torch.Generator().manual_seed(0))
    if form == "cp":
        model = cpnb.canonicalize(
            model, rank=6, generator=torch.Generator().manual_seed(1)
        )
    if form == "low rank":
        model = cpnb.factorize(model, rank=6, init="kaiming")
    model = ill_scaled(model).to(dtype)
    after, report = rescaled(model, mode=mode)
    assert change(model, after, images_for(shape, 2, dtype)) <= EXACT[dtype]
    largest = max(scale.log().abs().max() for scale in report.scales.values())
    assert largest > 0.5, "something has moved"
    last = list(report.scales)[-1]
    assert (report.scales[last] == 1).all(), "the output keeps its scale"


class Branches(nn.Module):
    """Residual sum, concatenation, depthwise and grouped convolutions, views."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect")
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(12, 6, 1, groups=3)
        self.slope = nn.PReLU(6)
        self.side = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(5, 10)
        self.head = nn.Conv2d(10, 8, 3)
        self.fc1 = nn.Linear(8 * 9, 7)
        self.fc2 = nn.Linear(7, 3)

    def forward(self, images):
        stream = F.leaky_relu(self.stem(images))
        branch = self.depthwise(stream).relu()
        stream = stream + 0.5 * self.slope(self.grouped(branch))
        side = F.interpolate(F.relu(self.side(stream)), scale_factor=2.0)
        both = torch.cat([stream, side], dim=1)
        hidden = self.head(F.pad(F.relu(self.norm(both)), (1, 1, 1, 1)))
        hidden = F.avg_pool2d(F.max_pool2d(F.relu(hidden), 2), 2)
        hidden = hidden.view(hidden.size(0), -1)
        return F.log_softmax(self.fc2(F.relu(self.fc1(hidden))), dim=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["dense", "cp", "low rank"])
def test_rescale_follows_branches_groups_and_views(form, mode):
    model = Branches()
    if form == "cp":
        model = cpnb.canonicalize(model, rank=4)
    if form == "low rank":
        model = cpnb.factorize(model, rank="same", middle=True, skip=())
    model = ill_scaled(model.double())
    after, report = rescaled(model, mode=mode)
    images = images_for((2, 12, 12))
    assert change(model, after, images) <= 1e-12
    moved = {
        n for n, scale in report.scales.items() if (scale.log().abs() > 0.01).any()
    }
    assert moved == {"stem", "depthwise", "grouped", "norm", "head", "fc1"} - (
        # what meets group norm keeps its scale: the stream, and with it the side
        {"stem", "grouped"}
    )


class Prepared(nn.Module):
    """Normalises its input, and adds it to a later value."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.conv2, self.fc = nn.Conv2d(6, 4, 3), nn.Linear(4, 2)

    def forward(self, images):
        pooled = F.avg_pool2d(self.norm(images * 2 - 1), 2)
        stream = self.conv1(F.relu(pooled)) + images[:, :, ::2, ::2]
        hidden = self.conv2(torch.cat([stream, pooled], 1)).relu()
        return self.fc(hidden.mean((2, 3))).softmax(1)


@pytest.mark.parametrize("mode", MODES)
def test_rescale_leaves_what_is_added_to_the_input_at_its_scale(mode):
    model = ill_scaled(Prepared().double())
    after, report = rescaled(model, mode=mode)
    assert change(model, after, images_for((3, 8, 8))) <= 1e-12
    moved = {n: bool((scale != 1).any()) for n, scale in report.scales.items()}
    assert moved == {"norm": True, "conv1": False, "conv2": True, "fc": False}


@pytest.mark.parametrize("form", ["dense", "cp"])
@pytest.mark.parametrize("ndim", [1, 3])
def test_rescale_works_in_one_and_three_dimensions(ndim, form):
    conv, norm, pool = (
        getattr(nn, f"{kind}{ndim}d") for kind in ("Conv", "BatchNorm", "MaxPool")
    )
    model = nn.Sequential(
        *(conv(2, 4, 3, padding=1), norm(4), nn.ReLU(), pool(2)),
        *(conv(4, 1, 2), nn.LeakyReLU(), conv(1, 6, 2, dilation=2), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(), nn.Linear(6 * 2**ndim, 3)),
    )
    if form == "cp":
        model = cpnb.canonicalize(model, rank=3)
    model = ill_scaled(model.double())
    for mode in MODES:
        after, _ = rescaled(model, mode=mode)
        assert change(model, after, images_for((2, *[10] * ndim))) <= 1e-12


@st.composite
def networks(draw):
    """A small random network for images (3, 8, 8), in part in CP form."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    layers, channels = [], 3
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        out = groups * draw(st.integers(1, 3))
        layers.append(
            nn.Conv2d(
                *(channels, out, draw(st.sampled_from([1, 3]))),
                padding=1,
                groups=groups,
                bias=draw(st.booleans()),
            )
        )
        norms = [nn.Identity(), nn.BatchNorm2d(out), nn.BatchNorm2d(out, affine=False)]
        layers.append(draw(st.sampled_from([*norms, nn.InstanceNorm2d(out)])))
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU()])))
        layers.append(draw(st.sampled_from([nn.MaxPool2d(2, 1), nn.Dropout2d()])))
        channels = out
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    layers += [
        nn.Linear(4 * channels, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 2),
    ]
    model = ill_scaled(nn.Sequential(*layers).double(), draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        names = [name for name, _ in model.named_children()]
        kept = [name for name in names[:-1] if draw(st.booleans())]
        model = cpnb.canonicalize(
            model, rank=2, skip=lambda name, layer: name in kept
        ).double()
    return model


@settings(max_examples=25)
@given(networks(), st.sampled_from(MODES), st.floats(0.01, 100))
def test_rescale_leaves_the_output_of_any_network(model, mode, c):
    after, _ = rescaled(model, mode=mode, c=c)
    assert change(model, after, images_for((3, 8, 8), n=4)) <= 1e-11


def test_check_of_the_output_fails_for_a_sweep_that_forgets_the_bias():
    model = ill_scaled(mlp(5, 8, 3))
    naive = copy.deepcopy(model)
    scales = 1 / naive[0].weight.detach().norm(dim=1)
    naive[0].weight.data.mul_(scales[:, None])
    naive[2].weight.data.div_(scales)
    images = images_for((5,), n=20)
    assert change(model, naive, images) > 0.1
    naive[0].bias.data.mul_(scales)
    assert change(model, naive, images) < 1e-14


def test_check_of_the_output_fails_for_a_sweep_across_batch_norm():
    model = ill_scaled(cpnb.VGG().double())
    naive = copy.deepcopy(model)
    first, second = naive.features[0].weight.data, naive.features[3].weight.data
    scales = 1 / first.flatten(1).norm(dim=1)
    first.mul_(scales[:, None, None, None])
    second.div_(scales[:, None, None])
    assert change(model, naive, images_for((3, 32, 32))) > 0.1


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
def test_sweep_of_a_chain_is_that_of_the_formulas(mode, c):
    model = ill_scaled(mlp(4, 6, 5, 3))
    weights = [layer.weight.detach() for layer in model[::2]]
    expected = loop_sweep(weights, mode, c)
    after, report = rescaled(model, mode=mode, c=c)
    for n, name in enumerate(report.scales):
        assert_close(after[int(name)].weight.detach(), expected[n])
        assert_close(report.before[name], weights[n].norm(dim=1))
        assert_close(report.after[name], expected[n].norm(dim=1))


def test_unit_mode_gives_convolutions_rows_of_norm_c_and_the_last_layer_the_rest():
    model = ill_scaled(cpnb.LeNet().double())
    report = rescale_(model, c=0.5)
    for name in ("conv1", "conv2", "fc1"):
        norms = model.get_submodule(name).weight.detach().flatten(1).norm(dim=1)
        assert_close(norms, torch.full_like(norms, 0.5))
    assert report.after["fc2"].min() > report.before["fc2"].min()


def test_balanced_sweeps_lower_the_sum_of_squares_until_rows_equal_columns():
    model = ill_scaled(cpnb.DigitsNet().double())

    def total():
        return sum(p.square().sum().item() for p in model.parameters() if p.ndim > 1)

    sums = [total()]
    for _ in range(60):
        rescale_(model, mode="balanced")
        sums.append(total())
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(sums))
    rows = model.fc1.weight.detach().norm(dim=1)
    columns = model.fc2.weight.detach().norm(dim=0)
    assert_close(rows, columns, rtol=1e-4, atol=0)
    rows = model.conv2.weight.detach().flatten(1).norm(dim=1)
    columns = model.fc1.weight.detach().unflatten(1, (32, 16)).norm(dim=(0, 2))
    assert_close(rows, columns, rtol=1e-4, atol=0)


def test_units_of_one_residual_stream_share_their_scale():
    model = ill_scaled(cpnb.ResNet(8).double())
    for mode in MODES:
        _, report = rescaled(model, mode=mode)
        scales = report.scales
        assert (scales["bn1"].log().abs() > 0.01).any()
        assert torch.equal(scales["bn1"], scales["stage1.0.bn2"])
        # The shortcut takes the channels along and appends channels of zeros.
        assert torch.equal(scales["bn1"], scales["stage2.0.bn2"][:16])
        assert not torch.equal(scales["stage2.0.bn2"], scales["stage2.0.bn1"])
        assert torch.equal(scales["stage2.0.bn2"], scales["stage3.0.bn2"][:32])


def test_unit_mode_gives_the_rows_of_a_stream_the_root_mean_square_c():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(4, 5)
            self.last = nn.Linear(5, 2)

        def forward(self, features):
            return self.last(F.relu(self.first(features) + self.second(features)))

    model = ill_scaled(Stream())
    report = rescale_(model, c=3.0)
    assert torch.equal(report.scales["first"], report.scales["second"])
    mean = (report.after["first"] ** 2 + report.after["second"] ** 2) / 2
    assert_close(mean.sqrt(), torch.full((5,), 3.0))


@pytest.mark.parametrize("mode", MODES)
def test_zero_rows_and_columns_stay_put(mode):
    model = ill_scaled(mlp(4, 6, 3))
    model[0].weight.data[2] = 0
    model[2].weight.data[:, 4] = 0
    before = copy.deepcopy(model)
    report = rescale_(model, mode=mode)
    assert report.scales["0"][2] == 1
    assert torch.equal(model[0].weight[2], before[0].weight[2])
    assert torch.equal(model[0].bias[2], before[0].bias[2])
    assert (report.scales["0"][4] == 1) == (mode == "balanced")
    assert change(before, model, images_for((4,))) < 1e-14


def test_scales_are_clamped():
    model = mlp(4, 3, 2)
    model[0].weight.data[0] *= 1e-9
    model[0].weight.data[1] *= 1e9
    report = rescale_(model)
    assert report.scales["0"][:2].tolist() == [LIMIT, 1 / LIMIT]


# --- batch norm -----------------------------------------------------------------------


def normed():
    """Three layers, two of them before a batch norm."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU()]
    layers += [nn.Flatten(), nn.Linear(6 * 9, 4)]
    return ill_scaled(nn.Sequential(*layers).double())


def test_scales_pass_through_batch_norm_in_its_weight_and_bias():
    model = normed()
    after, report = rescaled(model, mode="balanced")
    scale = report.scales["1"]
    for name in ("weight", "bias"):
        old, new = (getattr(net[1], name) for net in (model, after))
        assert_close(new, old * scale)
    assert torch.equal(model[0].weight, after[0].weight)
    assert_close(after[4].weight, model[4].weight / scale[:, None, None])
    assert_close(report.before["1"], model[1].weight.detach().abs())


@pytest.mark.parametrize("mode", MODES)
def test_rows_before_batch_norm_get_norm_c_on_request(mode):
    model = normed()
    after, report = rescaled(model, mode=mode, c=2.0, before_norm=True)
    if mode == "unit":
        for name in ("0", "4"):
            assert_close(report.after[name], torch.full_like(report.after[name], 2.0))
    images = images_for((3, 12, 12), n=20)
    evaluated = [outputs(net, images, training=False) for net in (model, after)]
    assert cpnb.relative_error(*evaluated) <= 1e-12
    trained = [outputs(net, images, training=True) for net in (model, after)]
    assert 1e-12 < cpnb.relative_error(*trained) < 1e-2
    assert 0 < report.train_error < 1e-2


def test_error_of_rows_before_batch_norm_is_the_reported_one():
    model = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)
    )
    model = model.double()
    images = images_for((4,), n=500)
    for _ in range(200):
        model[:2](images)  # the running variance becomes that of the batch
    after, report = rescaled(model, c=0.01, before_norm=True)
    scale = report.scales["1"]
    old = (model[:2](images) - model[1].bias) * scale
    new = after[:2](images) - after[1].bias
    errors = ((new - old).norm(dim=0) / old.norm(dim=0)).max().item()
    assert errors == pytest.approx(report.train_error, rel=0.2)


def test_both_symmetries_of_batch_norm_are_exact_without_eps():
    model = normed()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-300  # torch takes no 0 in training
    after, report = rescaled(model, before_norm=True)
    assert change(model, after, images_for((3, 12, 12), n=20)) <= 1e-12
    assert report.train_error < 1e-200


def test_running_statistics_follow_the_rows_before_batch_norm():
    model = normed()
    old, eps = model[1], model[1].eps
    after, report = rescaled(model, before_norm=True)
    scale = report.scales["0"]
    new = after[1]
    assert_close(new.running_mean, old.running_mean * scale)
    assert_close(new.running_var + eps, (old.running_var + eps) * scale**2)


# --- CP layers ------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_cp_layer_keeps_its_rank_and_column_norms_and_moves_lam(signed):
    model = nn.Sequential(
        cpnb.CPConv2d(3, 5, 3, rank=4, signed=signed), nn.ReLU(), cpnb.CPConv2d(5, 2, 3)
    ).double()
    model[0].lam.data[1] *= -1
    model[0].factors[0].data[:, 2] = 0  # a dead component
    before = copy.deepcopy(model)
    scale = rescale_(model).scales["0"]
    assert_close(
        model[0].weight,
        before[0].weight * scale[:, None, None, None],
        rtol=1e-12,
        atol=0,
    )
    assert_close(model[2].weight, before[2].weight / scale[:, None, None])
    for old, new in zip(before[0].factors, model[0].factors, strict=True):
        assert_close(new.norm(dim=0), old.norm(dim=0))
    assert model[0].rank == 4
    assert not torch.allclose(model[0].lam, before[0].lam)


@pytest.mark.parametrize(
    "make",
    [
        partial(cpnb.canonicalize, rank=5),
        partial(cpnb.factorize, rank=3, skip=()),
        partial(cpnb.factorize, rank=3, middle=True, skip=()),
    ],
    ids=["cp", "low rank", "low rank with M"],
)
def test_factorized_layers_and_their_dense_twins_get_the_same_scales(make):
    model = make(cpnb.DigitsNet()).double()
    dense = cpnb.to_dense(model)
    for mode in MODES:
        scales = [rescaled(net, mode=mode)[1].scales for net in (model, dense)]
        for name in scales[0]:
            assert_close(scales[0][name], scales[1][name])


def test_kernel_kept_for_evaluation_follows():
    model = cpnb.canonicalize(cpnb.DigitsNet(), rank=3).double().eval()
    images = images_for((1, 8, 8))
    with torch.no_grad():
        before = model(images)
        rescale_(model)
        assert cpnb.relative_error(before, model(images)) < 1e-13


# --- what is refused ------------------------------------------------------------------


class Through(nn.Module):
    """Two layers with a function of the hidden value between them."""

    def __init__(self, between, size=4):
        super().__init__()
        self.between = between
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(size, 2, 1)

    def forward(self, images):
        return self.last(self.between(self.first(images)))


REFUSED_OPERATIONS = {
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(1),
    "tanh": lambda x: x.tanh(),
    "silu": F.silu,
    "add": lambda x: x + 1,
    "mul": lambda x: x * x,
    "pad": lambda x: F.pad(x, (1, 1), value=2.0),
    "view": lambda x: x.view(-1, 4, 9, 4),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "mean": lambda x: x.mean(1, keepdim=True),
    "truediv": lambda x: 1 / x,
    "getitem": lambda x: x[::2],
    "max_pool2d": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
}


@pytest.mark.parametrize("name", REFUSED_OPERATIONS)
def test_operation_that_no_scale_passes_is_refused_by_name(name):
    model = Through(REFUSED_OPERATIONS[name])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"operation '{name}.*expected ReLU"):
        rescale_(model)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "between",
    [nn.GELU(), nn.Sigmoid(), nn.ReLU6(), nn.Softmax(1), nn.AlphaDropout()],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_that_no_scale_passes_is_refused_by_name(between):
    kind = type(between).__name__
    with pytest.raises(ValueError, match=rf"layer 'between' \({kind}\) stands between"):
        rescale_(Through(between))


def test_operation_within_a_module_is_refused_with_the_name_of_the_module():
    class Swish(nn.Module):
        def forward(self, hidden):
            return hidden * hidden.sigmoid()

    with pytest.raises(ValueError, match=r"operation 'sigmoid' in 'between'"):
        rescale_(Through(Swish()))


def weight_normed():
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))


def hooked(layer):
    layer.register_forward_hook(lambda layer, inputs, output: output + 1)
    return layer


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (
            weight_normed,
            r"'between' \(ParametrizedConv2d\) is normalised.*cpnb.remove_normalizer",
        ),
        (
            lambda: cpnb.normalize(cpnb.CPConv2d(4, 4, 1, rank=2), "conditioned"),
            r"\(ConditionedCPConv2d\) is normalised.*cpnb.remove_normalizer",
        ),
        (lambda: hooked(nn.Conv2d(4, 4, 1)), r"\(Conv2d\) has forward hooks.*remove"),
        (lambda: hooked(nn.ReLU()), r"'between' \(ReLU\) has forward hooks"),
        (
            lambda: nn.ConvTranspose2d(4, 4, 1),
            r"\(ConvTranspose2d\) cannot be rescaled",
        ),
        (
            lambda: nn.LayerNorm(30),
            r"\(LayerNorm\) cannot be rescaled, expected one of",
        ),
        (lambda: nn.Linear(30, 30), r"\(Linear\) reads 4 axes, expected 2"),
        (lambda: nn.BatchNorm3d(4), r"\(BatchNorm3d\) reads 4 axes, expected 5"),
    ],
)
def test_layer_that_cannot_be_scaled_is_refused_with_the_reason(between, message):
    with pytest.raises(ValueError, match=message):
        rescale_(Through(between()))


def test_layer_called_twice_is_refused():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), shared, nn.ReLU(), shared)
    with pytest.raises(ValueError, match=r"layer '2' \(Linear\) is called twice"):
        rescale_(model)


def test_shared_weights_are_refused():
    model = mlp(4, 4, 4)
    model[2].weight = model[0].weight
    with pytest.raises(
        ValueError, match=r"0\.weight and 2\.weight are the same tensor"
    ):
        rescale_(model)


def test_weight_read_past_its_layer_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)

        def forward(self, features):
            hidden = self.decoder(F.relu(self.encoder(features)))
            return F.linear(hidden, self.encoder.weight)

    with pytest.raises(
        ValueError, match=r"'encoder\.weight' reads what layer 'encoder'"
    ):
        rescale_(Tied())


def test_model_that_decides_by_its_data_is_refused():
    def between(hidden):
        return hidden if hidden.sum() > 0 else -hidden

    with pytest.raises(ValueError, match=r"Through that torch.fx cannot trace"):
        rescale_(Through(between))


def test_model_with_another_path_in_evaluation_is_refused_and_keeps_its_flags():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, features):
            hidden = self.first(features).relu()
            return self.last(hidden if self.training else self.first(hidden))

    model = Two()
    with pytest.raises(ValueError, match="called twice"):
        rescale_(model)
    Two.forward = lambda self, features: self.last(
        self.first(features) if self.training else features
    )
    with pytest.raises(ValueError, match="one way in training and in another"):
        rescale_(model)
    assert model.training
    assert model.first.training


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), "a ReLU with no layer to rescale"),
        (nn.Linear(3, 2), "a Linear, a single layer, whose inputs and outputs keep"),
        (weight_normed(), "a ParametrizedConv2d, a single layer"),
    ],
)
def test_model_without_layers_to_rescale_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        rescale_(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"c": -1.0}, ValueError, "c is -1.0, expected a finite number above 0"),
        ({"c": 0}, ValueError, "c is 0, expected"),
        ({"c": math.nan}, ValueError, "c is nan, expected"),
        ({"c": math.inf}, ValueError, "c is inf, expected"),
        ({"c": "1"}, TypeError, "c is '1', expected a number"),
        ({"mode": "equal"}, ValueError, "mode is 'equal', expected one of"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        rescale_(mlp(3, 3, 2), **options)
    with pytest.raises(error, match=message):
        Rescaling(**options)


def test_nan_is_refused_and_nothing_changes():
    model = mlp(3, 4, 2)
    model[2].bias.data[1] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"2\.bias has NaN or infinite entries"):
        rescale_(model)
    assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_no_module_is_refused():
    with pytest.raises(
        TypeError, match=r"model is a int, expected a torch\.nn\.Module"
    ):
        rescale_(3)


# --- report and hook ------------------------------------------------------------------


def test_report_prints_a_row_per_layer():
    report = rescale_(ill_scaled(mlp(4, 6, 3)))
    head, first, last = repr(report).splitlines()
    assert head.split("  ")[0] == "layer"
    assert first.endswith(
        f"{report.scales['0'].min():.3g} to {report.scales['0'].max():.3g}"
    )
    assert last.endswith("1 to 1")
    assert report._repr_html_().count("<tr>") == 3


def test_hook_rescales_every_so_many_steps_of_a_training():
    images = images_for((4,), n=40, dtype=torch.float32)
    data = (images, (images[:, 0] > 0).long())
    spreads = {}
    for every in (1, 5, 1000):
        torch.manual_seed(0)
        model = ill_scaled(mlp(4, 6, 2)).float()
        hook = Rescaling(every=every)
        run = cpnb.fit(
            *(model, data),
            epochs=2,
            batch_size=8,
            lr=0.01,
            hooks=[hook],
            progress=False,
        )
        assert run.recipe["hooks"] == [f"Rescaling(mode='unit', c=1.0, every={every})"]
        spreads[every] = model[0].weight.detach().norm(dim=1).std().item()
    assert spreads[1] < 1e-6  # the last of ten steps is one
    assert spreads[5] < 1e-6
    assert spreads[1000] > 0.1


class UnitRows(cpnb.Hook):
    """Notes after each step and epoch whether the first layer's rows have norm 1."""

    def start(self, model, optimizer):
        self.seen = []

    def after_step(self, model, optimizer, step):
        norms = model[0].weight.detach().norm(dim=1)
        self.seen.append(torch.allclose(norms, torch.ones_like(norms), atol=1e-5))

    def after_epoch(self, model, optimizer):
        self.after_step(model, optimizer, 0)


def test_hook_rescales_once_an_epoch_whatever_the_number_of_steps():
    images = images_for((4,), n=9, dtype=torch.float32)
    watch = UnitRows()
    cpnb.fit(
        *(mlp(4, 6, 2).float(), (images, (images[:, 0] > 0).long())),
        epochs=2,
        batch_size=4,  # the ninth image joins the second batch
        lr=0.01,
        hooks=[Rescaling(every="epoch"), watch],
        progress=False,
    )
    assert watch.seen == [False, False, True] * 2


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("form", ["dense", "cp"])
def test_normalized_by_scaling_a_model_trains_with_every_optimizer(form, optimizer):
    model = cpnb.DigitsNet(num_classes=2)
    if form == "cp":
        model = cpnb.canonicalize(model, rank=4)
    images = images_for((1, 8, 8), n=40, dtype=torch.float32)
    scaled = cpnb.normalize(model, "scaling", c=1.5)
    assert change(model, scaled, images) <= 1e-5
    data = (images, (images.mean((1, 2, 3)) > 0).long())
    cpnb.fit(
        *(scaled, data),
        epochs=2,
        optimizer=optimizer,
        lr=1e-3,
        progress=False,
    )
    for name in ("conv1", "conv2", "fc1"):
        norms = scaled.get_submodule(name).weight.detach().flatten(1).norm(dim=1)
        assert_close(norms, torch.full_like(norms, 1.5))
    assert change(model, scaled, images) > 1e-3


def test_hook_leaves_a_diverged_model_to_the_training():
    model = mlp(3, 4, 2)
    hook, optimizer = Rescaling(), torch.optim.SGD(model.parameters(), 0.1)
    hook.start(model, optimizer)
    model[0].weight.data[1] = torch.nan
    hook.after_step(model, optimizer, 0)
    assert model[0].weight[0].isfinite().all()


def test_hook_refuses_at_the_start_and_copies_with_its_model():
    model = Through(torch.sigmoid)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="operation 'sigmoid'"):
        Rescaling().start(model, optimizer)
    with pytest.raises(ValueError, match="every is 0, expected at least 1"):
        Rescaling(every=0)
    with pytest.raises(ValueError, match="every is 'week', expected 'epoch' or steps"):
        Rescaling(every="week")
    hook = Rescaling("balanced", 2.0, every=3, before_norm=True)
    text = "Rescaling(mode='balanced', c=2.0, every=3, before_norm=True)"
    assert repr(pickle.loads(pickle.dumps(hook))) == repr(hook) == text
    assert repr(Rescaling(every="epoch")).endswith("c=1.0, every='epoch')")
    net = mlp(3, 4, 2)
    hook.start(net, torch.optim.SGD(net.parameters(), 0.1))
    hook.stop(net)
    assert repr(copy.deepcopy(hook)) == text
