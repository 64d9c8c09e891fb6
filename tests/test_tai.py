"""The two-convolution split: exact at full rank, optimal below, geometry kept."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from cpnb.rules import FitRank
from cpnb.tai import tai, tai_decompose, tai_kernel


def conv(*args, **options):
    return nn.Conv2d(*args, dtype=torch.float64, **options)


def looped_kernel(vertical, horizontal):
    """Σ_r V[r,i,h] · H[o,r,w], written out."""
    out, rank, _, width = horizontal.weight.shape
    _, channels, height, _ = vertical.weight.shape
    kernel = torch.zeros(out, channels, height, width, dtype=torch.float64)
    sizes = (range(n) for n in (out, channels, height, width, rank))
    for o, i, h, w, r in itertools.product(*sizes):
        kernel[o, i, h, w] += (
            vertical.weight[r, i, h, 0] * horizontal.weight[o, r, 0, w]
        )
    return kernel


def looped_unfolding(kernel):
    """The matrix with entry W[o,i,h,w] in row (i,h) and column (o,w)."""
    out, channels, height, width = kernel.shape
    matrix = torch.zeros(channels * height, out * width, dtype=torch.float64)
    for o, i, h, w in itertools.product(*map(range, kernel.shape)):
        matrix[i * height + h, o * width + w] = kernel[o, i, h, w]
    return matrix


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_tai_error_is_the_tail_of_the_singular_values(rank):
    source = conv(4, 5, (2, 3))
    with torch.no_grad():
        kernel = looped_kernel(*tai_decompose(source, rank))
        values = torch.linalg.svdvals(looped_unfolding(source.weight))
        tail = values[rank:].square().sum().sqrt()
        assert_close((source.weight - kernel).norm(), tail, rtol=1e-10, atol=1e-12)


def test_tai_kernel_is_that_of_the_loops_for_each_group():
    source = conv(4, 6, (3, 2), groups=2)
    pair = tai_decompose(source, 3)
    kernel = tai_kernel(pair)
    assert kernel.shape == source.weight.shape
    for g in range(2):
        half = copy.deepcopy(pair).requires_grad_(False)
        vertical, horizontal = half
        vertical.weight = nn.Parameter(vertical.weight[3 * g : 3 * g + 3], False)
        horizontal.weight = nn.Parameter(horizontal.weight[3 * g : 3 * g + 3], False)
        expected = looped_kernel(vertical, horizontal)
        assert_close(kernel[3 * g : 3 * g + 3].detach(), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": "valid", "stride": 2},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"padding": (1, 2), "padding_mode": "circular", "stride": (1, 2)},
        {"padding": 1, "padding_mode": "replicate", "groups": 2},
        {"groups": 4, "bias": False},
    ],
    ids=str,
)
def test_tai_at_full_rank_computes_the_same_function(options):
    source = conv(4, 8, (3, 2), **options)
    groups = source.groups
    full = min(4 // groups * 3, 8 // groups * 2)
    pair = tai_decompose(source, full)
    images = torch.randn(2, 4, 11, 12, dtype=torch.float64)
    assert_close(pair(images), source(images))
    shapes = [tuple(layer.kernel_size) for layer in pair]
    assert shapes == [(3, 1), (1, 2)]


def test_tai_below_full_rank_convolves_with_its_kernel():
    source = conv(4, 8, 3, stride=(1, 2), padding=(0, 1), dilation=(2, 1))
    pair = tai_decompose(source, 5)
    dense = copy.deepcopy(source)
    with torch.no_grad():
        dense.weight.copy_(tai_kernel(pair))
    images = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert_close(pair(images), dense(images))


def test_tai_keeps_bias_flags_and_source_and_shares_nothing():
    source = nn.Conv2d(3, 4, 3).half().eval()
    source.weight.requires_grad_(False)
    before = copy.deepcopy(source.state_dict())
    vertical, horizontal = pair = tai_decompose(source, 4)
    assert not pair.training
    assert vertical.bias is None
    assert torch.equal(horizontal.bias, source.bias)
    assert horizontal.bias.requires_grad
    assert not vertical.weight.requires_grad
    assert not horizontal.weight.requires_grad
    assert {p.dtype for p in pair.parameters()} == {torch.float16}
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.zero_()
    for name, value in source.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("rank", "groups", "expected"),
    [
        (7, 1, 7),
        # 24·48/(24 + 48) = 16 channels hold as many weights as the dense kernel.
        ("same", 1, 16),
        (1.0, 1, 16),
        (0.25, 1, 4),
        (1e-6, 1, 1),
        # One group is 12 x 24: break-even 8.
        (0.5, 2, 4),
    ],
    ids=str,
)
def test_tai_rank_is_an_int_or_a_fraction_of_break_even(rank, groups, expected):
    source = nn.Conv2d(8, 16, 3, groups=groups)
    vertical, horizontal = tai_decompose(source, rank)
    assert vertical.out_channels == horizontal.in_channels == groups * expected
    held = vertical.weight.numel() + horizontal.weight.numel()
    assert held == expected * (8 * 3 + 16 * 3)


def test_tai_fraction_never_asks_for_dead_channels():
    source = nn.Conv2d(1, 9, 1)  # break-even ⌈9/10⌉ = 1 = full rank
    assert tai_decompose(source, "same")[0].out_channels == 1
    square = nn.Conv2d(2, 2, 1)  # break-even 1, full rank 2
    assert tai_decompose(square, 2)[0].out_channels == 2


def test_tai_takes_a_rule_on_the_singular_values():
    source = conv(6, 6, 3)
    for error in (0.9, 0.5, 0.1):
        pair = tai_decompose(source, FitRank(error))
        rank = pair[0].out_channels
        values = torch.linalg.svdvals(looped_unfolding(source.weight.detach()))
        tails = [values[k:].norm() / values.norm() for k in range(len(values))]
        assert tails[rank] <= error < tails[rank - 1]


def test_tai_splits_every_convolution_of_a_model_but_the_skipped():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2)
    )
    split = tai(model, 0.5, skip="0")
    assert isinstance(split[0], nn.Conv2d)
    assert split[0] is not model[0]
    assert isinstance(split[2], nn.Sequential)
    assert isinstance(model[2], nn.Conv2d)
    exact = tai(model.double(), 9, skip=lambda name, layer: name == "2")
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert_close(exact(images), model(images))
    assert isinstance(tai(nn.Conv2d(2, 2, 3), 1), nn.Sequential)


def not_finite():
    source = nn.Conv2d(2, 2, 3)
    with torch.no_grad():
        source.weight[0, 0, 0, 0] = float("nan")
    return source


def tied():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: tai_decompose(nn.Conv2d(2, 4, 3), 7),
            ValueError,
            r"rank is 7, expected at most the full rank 6 of the \(6, 12\) unfolding",
        ),
        (lambda: tai_decompose(nn.Conv2d(2, 4, 3), 0), ValueError, "rank is 0"),
        (lambda: tai_decompose(nn.Conv2d(2, 4, 3), 1.5), ValueError, "rank is 1.5"),
        (lambda: tai_decompose(nn.Conv2d(2, 4, 3), "all"), ValueError, "'all'"),
        (lambda: tai_decompose(nn.Conv2d(2, 4, 3), None), TypeError, "rank is None"),
        (
            lambda: tai_decompose(nn.Linear(2, 4), 1),
            TypeError,
            "conv is a Linear: expected a Conv2d",
        ),
        (
            lambda: tai_decompose(parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), 1),
            TypeError,
            "it is parametrized",
        ),
        (
            lambda: tai_decompose(not_finite(), 1),
            ValueError,
            "conv.weight has 1 NaN or infinite entries",
        ),
        (lambda: tai(nn.Linear(2, 4), 1), ValueError, "no Conv2d to split"),
        (lambda: tai(nn.Conv2d(2, 4, 3), 1, skip="1"), ValueError, "skip names"),
        (lambda: tai(tied(), 1), ValueError, "shares a parameter"),
    ],
)
def test_tai_refuses_bad_input_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call()
