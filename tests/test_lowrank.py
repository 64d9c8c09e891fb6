"""Low-rank layers: exact at full rank, geometry kept, the same kernel everywhere."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import cpnb
from cpnb import LowRankConv2d, LowRankLinear

GEOMETRIES = [
    {},
    {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": "valid", "stride": 2},
    {"padding": "same", "padding_mode": "circular"},
    {"padding": (2, 1), "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "circular", "stride": (1, 2)},
    {"padding": 1, "padding_mode": "replicate", "groups": 2},
    {"groups": 4, "bias": False},
]
both_forms = pytest.mark.parametrize("middle", [False, True], ids=["UV", "UMV"])


def conv(*args, **options):
    return nn.Conv2d(*args, dtype=torch.float64, **options)


def shaken(layer):
    """The layer with an M that is not the identity."""
    with torch.no_grad():
        if layer.middle is not None:
            layer.middle.add_(0.3 * torch.randn_like(layer.middle))
    return layer


def looped_kernel(layer):
    """Σ_rs U[(o,h),r] · M[r,s] · V[(i,w),s], written out; for one group."""
    out, channels, height, width = layer.kernel_shape
    left = layer.left.view(out, height, layer.rank)
    right = layer.right.view(channels, width, layer.rank)
    middle = torch.eye(layer.rank) if layer.middle is None else layer.middle
    kernel = torch.zeros(layer.kernel_shape, dtype=torch.float64)
    sizes = (range(n) for n in (*layer.kernel_shape, layer.rank, layer.rank))
    for o, i, h, w, r, s in itertools.product(*sizes):
        kernel[o, i, h, w] += left[o, h, r] * middle[r, s] * right[i, w, s]
    return kernel


@both_forms
def test_weight_is_the_kernel_of_the_loops(middle):
    layer = LowRankConv2d(
        *(3, 4, (2, 3)), rank=3, middle=middle, init="kaiming", dtype=torch.float64
    )
    with torch.no_grad():
        expected = looped_kernel(shaken(layer))
        assert_close(layer.weight, expected)


@both_forms
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_conv_at_full_rank_computes_the_function_of_its_source(options, middle):
    """The kernel is any trained one, not a random start: nothing may be mixed up."""
    source = conv(4, 8, (3, 2), **options)
    full = min(8 * 3, 4 * 2) // source.groups
    layer = LowRankConv2d.from_layer(source, rank=full, middle=middle)
    images = torch.randn(2, 4, 11, 12, dtype=torch.float64)
    assert_close(layer(images), source(images))
    assert_close(layer.weight, source.weight)
    assert_close(layer(images[0]), source(images[0]))


@both_forms
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_conv_below_full_rank_convolves_with_its_weight(options, middle):
    layer = LowRankConv2d(
        *(4, 8, (3, 2)), **options, rank=2, middle=middle, dtype=torch.float64
    )
    dense = cpnb.to_dense(shaken(layer))
    assert type(dense) is nn.Conv2d
    assert_close(dense.weight, layer.weight)
    images = torch.randn(2, 4, 11, 12, dtype=torch.float64)
    assert_close(layer(images), dense(images))


def test_conv_keeps_the_function_of_a_trained_kernel_of_low_rank():
    source = conv(6, 5, 3)
    kernel = torch.einsum(
        "ohr,iwr->oihw", *(torch.randn(n, 3, 2, dtype=torch.float64) for n in (5, 6))
    )
    with torch.no_grad():
        source.weight.copy_(kernel)
    assert_close(LowRankConv2d.from_layer(source, rank=2).weight, source.weight)


def test_conv_keeps_the_layout_of_its_input():
    layer = LowRankConv2d(4, 8, 3, rank=3)
    images = torch.randn(2, 4, 6, 6)
    assert layer(images).is_contiguous()
    innermost = images.contiguous(memory_format=torch.channels_last)
    output = layer(innermost)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_close(output, layer(images), rtol=1e-5, atol=1e-5)


@both_forms
def test_linear_runs_through_its_factors(middle):
    source = nn.Linear(7, 5, dtype=torch.float64)
    rows = torch.randn(2, 3, 7, dtype=torch.float64)
    exact = LowRankLinear.from_layer(source, rank=5, middle=middle)
    assert_close(exact(rows), source(rows))
    small = shaken(LowRankLinear.from_layer(source, rank=2, middle=middle))
    assert_close(cpnb.to_dense(small)(rows), small(rows))
    assert small(rows[0, 0]).shape == (5,)


def test_spectral_start_is_the_closest_kernel_of_its_rank():
    source = conv(4, 6, 3)
    layer = LowRankConv2d.from_layer(source, rank=5)
    matrix = source.weight.detach().transpose(1, 2).reshape(18, 12)
    tail = torch.linalg.svdvals(matrix)[5:].square().sum().sqrt()
    assert_close((source.weight - layer.weight).norm().detach(), tail)


@both_forms
def test_from_layer_copies_flags_and_bias_and_leaves_the_source_alone(middle):
    source = nn.Conv2d(3, 4, 3).half().eval()
    source.weight.requires_grad_(False)
    before = copy.deepcopy(source.state_dict())
    layer = LowRankConv2d.from_layer(source, rank=4, middle=middle)
    assert not layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    dense = layer.to_dense()
    assert not dense.weight.requires_grad
    assert dense.bias.requires_grad
    assert not dense.training
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    for name, value in source.state_dict().items():
        assert torch.equal(value, before[name])


def test_from_layer_may_keep_only_the_shape():
    source = nn.Conv2d(3, 4, 3)
    layers = [
        LowRankConv2d.from_layer(
            source, rank=4, init="kaiming", generator=torch.Generator().manual_seed(0)
        )
        for _ in range(2)
    ]
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(layers[0].bias, source.bias)
    assert (layers[0].weight - source.weight).norm() > source.weight.norm()


@both_forms
def test_gradient_reaches_every_parameter(middle):
    layer = LowRankConv2d(3, 4, 3, rank=2, middle=middle)
    layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


@both_forms
def test_layers_pass_gradcheck(middle):
    layer = LowRankConv2d(
        *(2, 4, (2, 3), 1, 1), groups=2, rank=2, middle=middle, dtype=torch.float64
    )
    images = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(*parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, images)

    assert torch.autograd.gradcheck(output, values)


@pytest.mark.parametrize(
    ("make", "full"),
    [
        (lambda rank: LowRankConv2d(2, 8, (3, 5), rank=rank), 10),
        (lambda rank: LowRankConv2d(4, 8, 3, groups=2, rank=rank), 6),
        (lambda rank: LowRankLinear(3, 8, rank=rank), 3),
        (lambda rank: LowRankLinear.from_layer(nn.Linear(3, 8), rank=rank), 3),
    ],
)
def test_rank_is_clipped_to_the_bound_with_a_warning(make, full):
    with pytest.warns(UserWarning, match=f"the rank becomes {full}") as caught:
        assert make(full + 4).rank == full
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(full).rank == full


@both_forms
def test_rank_same_has_as_many_parameters_as_the_dense_layer(middle):
    layer = LowRankConv2d(16, 32, 3, bias=False, rank="same", middle=middle)
    held = sum(p.numel() for p in layer.parameters())
    each = 32 * 3 + 16 * 3 + (2 * layer.rank if middle else 0)
    assert 0 <= held - 32 * 16 * 9 < each
    assert layer.rank == layer.break_even_rank


def test_state_dict_round_trip_and_names():
    layer = LowRankConv2d(3, 4, 3, rank=2, middle=True)
    assert list(layer.state_dict()) == ["left", "middle", "right", "bias"]
    twin = LowRankConv2d(3, 4, 3, rank=2, middle=True)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)


def test_checkpoint_round_trip_and_refusal_of_another_rank(tmp_path):
    path = tmp_path / "net.safetensors"
    net, twin, other = (
        cpnb.factorize(cpnb.DigitsNet(), rank=rank) for rank in (4, 4, 5)
    )
    cpnb.save_model(net, path)
    assert torch.equal(cpnb.load_weights(twin, path).fc1.weight, net.fc1.weight)
    with pytest.raises(ValueError, match=r"conv2.left: expected \(96, 5\), got"):
        cpnb.load_weights(other, path)


def broken():
    source = nn.Conv2d(2, 2, 3)
    with torch.no_grad():
        source.weight[0, 0, 0, 0] = float("nan")
    return source


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: LowRankConv2d(2, 4, 3, rank=0), ValueError, "rank is 0"),
        (lambda: LowRankConv2d(2, 4, 3, rank=1.5), ValueError, "rank is 1.5"),
        (lambda: LowRankConv2d(2, 4, 3, rank=True), TypeError, "rank is True"),
        (lambda: LowRankConv2d(2, 4, 3, init="he"), ValueError, "init is 'he'"),
        (lambda: LowRankConv2d(0, 4, 3), ValueError, "in_channels=0"),
        (lambda: LowRankLinear(4, 0), ValueError, "out_features=0"),
        (lambda: LowRankConv2d(3, 4, 3, groups=2), ValueError, "divisible by groups"),
        (lambda: LowRankLinear(4, 4, dtype=torch.int64), TypeError, "dtype is"),
        (
            lambda: LowRankConv2d.from_layer(nn.Linear(2, 4), rank=1),
            TypeError,
            "layer is a Linear: expected a Conv2d for LowRankConv2d",
        ),
        (
            lambda: LowRankConv2d.from_layer(nn.ConvTranspose2d(2, 4, 3), rank=1),
            TypeError,
            "layer is a ConvTranspose2d",
        ),
        (
            lambda: LowRankLinear.from_layer(
                parametrizations.weight_norm(nn.Linear(2, 4)), rank=1
            ),
            TypeError,
            "it is parametrized",
        ),
        (
            lambda: LowRankConv2d.from_layer(broken(), rank=1),
            ValueError,
            "layer.weight has 1 NaN or infinite entries",
        ),
        (
            lambda: LowRankConv2d.from_layer(nn.Conv2d(2, 4, 3), rank=1, init="no"),
            ValueError,
            "init is 'no'",
        ),
        (
            lambda: LowRankLinear(4, 4, rank=cpnb.ParameterRatio(0.5)),
            TypeError,
            "spends a budget over whole layers",
        ),
    ],
)
def test_layers_refuse_bad_arguments_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call()
