"""Data-aware fits: the weighted error is the error of the layer's outputs."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cpnb


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def correlated_images(count=40, channels=6, seed=0):
    """Images whose channels share two latent maps, as trained features do."""
    latent = torch.randn(count, 2, 9, 9, generator=seeded(seed), dtype=torch.float64)
    mix = torch.randn(channels, 2, generator=seeded(seed + 1), dtype=torch.float64)
    noise = torch.randn(
        count, channels, 9, 9, generator=seeded(seed + 2), dtype=torch.float64
    )
    return torch.einsum("cl,nlhw->nchw", mix, latent) + 0.1 * noise


def make_conv(**options):
    conv = nn.Conv2d(6, 8, 3, dtype=torch.float64, bias=False, **options)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=seeded(5)))
    return conv


def output_error(conv, result, images):
    kernel = cpnb.cp_to_kernel(result.lam, result.factors).view_as(conv.weight)
    approximate = make_conv(
        stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        padding_mode=conv.padding_mode,
    )  # fmt: skip
    with torch.no_grad():
        approximate.weight.copy_(kernel)
        expected = conv(images)
        return ((approximate(images) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_weighted_error_is_the_relative_error_of_the_outputs(options):
    conv, images = make_conv(**options), correlated_images()
    covariance = cpnb.input_covariance(conv, images)
    result = cpnb.data_aware_als(
        conv.weight, 4, covariance, ridge=0.0, generator=seeded()
    )
    expected = output_error(conv, result, images)
    assert result.info.weighted_error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rank", [2, 5, 10])
def test_data_aware_fit_beats_the_plain_one_on_outputs_only(rank):
    conv, images = make_conv(), correlated_images()
    covariance = cpnb.input_covariance(conv, images)
    plain = cpnb.als(conv.weight, rank, generator=seeded())
    aware = cpnb.data_aware_als(conv.weight, rank, covariance, generator=seeded())
    assert output_error(conv, aware, images) < 0.9 * output_error(conv, plain, images)
    assert aware.relative_error > plain.relative_error
    fresh = correlated_images(seed=0, count=200)[40:]
    assert output_error(conv, aware, fresh) < output_error(conv, plain, fresh)


def test_more_sweeps_never_raise_the_weighted_error():
    conv, images = make_conv(), correlated_images()
    covariance = cpnb.input_covariance(conv, images)
    errors = [
        cpnb.data_aware_als(
            conv.weight, 4, covariance, sweeps=n, tol=0.0, generator=seeded()
        ).info.weighted_error
        for n in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_uncorrelated_inputs_make_it_plain_least_squares():
    kernel = make_conv().weight.detach()
    identity = torch.eye(54, dtype=torch.float64)
    aware = cpnb.data_aware_als(kernel, 5, identity, generator=seeded())
    plain = cpnb.als(kernel, 5, sweeps=200, generator=seeded())
    assert aware.info.weighted_error == pytest.approx(aware.relative_error, rel=1e-6)
    assert aware.relative_error <= plain.relative_error * 1.02


def test_input_covariance_of_a_linear_layer_is_the_second_moment():
    rows = torch.randn(50, 4, generator=seeded())
    moments = cpnb.input_covariance(nn.Linear(4, 3), rows)
    expected = sum(torch.outer(row, row) for row in rows.double()) / 50
    assert_close(moments, expected)


def test_data_aware_start_converts_a_layer():
    conv, images = make_conv(), correlated_images()
    covariance = cpnb.input_covariance(conv, images)
    start = cpnb.data_aware(covariance)
    aware = cpnb.from_layer(conv, rank=4, init=start, generator=seeded())
    plain = cpnb.from_layer(conv, rank=4, init="als", generator=seeded())
    with torch.no_grad():
        expected = conv(images)
        errors = [(layer(images) - expected).norm() for layer in (aware, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_data_aware_start_handles_modes_of_size_one():
    conv = nn.Conv2d(1, 8, (3, 1), dtype=torch.float64)
    images = torch.randn(20, 1, 6, 6, dtype=torch.float64, generator=seeded())
    start = cpnb.data_aware(cpnb.input_covariance(conv, images))
    layer = cpnb.from_layer(conv, rank=3, init=start, generator=seeded())
    assert_close(layer(images), conv(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda k: cpnb.data_aware_als(k, 2, torch.eye(5)),
            ValueError,
            r"covariance has shape \(5, 5\), expected \(54, 54\)",
        ),
        (
            lambda k: cpnb.data_aware_als(k, 2, torch.eye(54) * torch.nan),
            ValueError,
            "covariance has .* NaN or infinite",
        ),
        (
            lambda k: cpnb.data_aware_als(k, 2, torch.eye(54), sweeps=0),
            ValueError,
            "sweeps is 0",
        ),
        (
            lambda k: cpnb.input_covariance(nn.ReLU(), k),
            TypeError,
            "layer is a ReLU, expected an nn.Linear or nn.Conv2d",
        ),
        (
            lambda k: cpnb.input_covariance(nn.Conv2d(6, 6, 3, groups=2), k),
            ValueError,
            "layer has 2 groups, expected one",
        ),
        (
            lambda k: cpnb.CPConv2d(6, 8, 3, init=cpnb.data_aware(torch.eye(54))),
            ValueError,
            "use it with from_layer",
        ),
    ],
)
def test_data_aware_refuses_bad_input_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call(make_conv().weight.detach())
