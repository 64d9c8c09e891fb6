"""Variance of the rebuilt kernel, and what fitted starts fit."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb.cp import cp_to_kernel
from cpnb.initializers import INITIALIZERS, gaussian, unified, uniform

SHAPE = (64, 32, 3, 3)


def mean_variance(init, shape, rank, draws=20, **options):
    generator = torch.Generator().manual_seed(rank)
    variances = [
        cp_to_kernel(*init(shape, rank, generator=generator, **options)).var()
        for _ in range(draws)
    ]
    return torch.stack(variances).mean().item()


SHAPES = {
    "2d": SHAPE,
    "1d": (64, 32, 5),
    "3d": (16, 8, 3, 3, 3),
    "linear": (128, 64),
    "groups": (64, 16, 3, 3),
}


# One draw's ratio has a standard deviation of at most 2 % at SHAPE: unit columns give
# ‖W‖² = λ²(R + Σ_{r≠s} Γ_rs) and the cross terms are of size √2·R·σ_Γ with
# σ_Γ² = Π 1/N_n. Over 20 draws 2 % is more than four standard errors; the other shapes
# are smaller.
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_unified_gives_the_rebuilt_kernel_its_variance(kind, mode):
    shape = SHAPES[kind]
    groups = 2 if kind == "groups" else 1
    fan = shape[1] if mode == "fan_in" else shape[0] // groups
    fan *= math.prod(shape[2:])
    limit = 0.02 if kind == "2d" else 0.05
    for rank in (1, 4, 16, 256) if kind == "2d" else (32,):
        variance = mean_variance(unified, shape, rank, mode=mode, groups=groups)
        assert variance * fan / 2 == pytest.approx(1, abs=limit)
    linear = {"mode": mode, "groups": groups, "nonlinearity": "linear"}
    variance = mean_variance(unified, shape, 16, **linear)
    assert variance * fan == pytest.approx(1, abs=limit)


def test_unified_doubles_the_power_of_rectified_activations():
    """Kaiming's condition: E[(Wx)²] = 2 E[x²], of which ReLU leaves E[x²]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 32, 6, 6, generator=generator).relu()
    options = {"padding": 1, "padding_mode": "circular", "bias": False, "rank": 64}
    ratios = []
    with torch.no_grad():
        for _ in range(200):
            layer = cpnb.CPConv2d(32, 32, 3, **options, generator=generator)
            ratios.append(layer(images).square().mean() / images.square().mean())
    ratios = torch.stack(ratios)
    standard_error = ratios.std() / len(ratios) ** 0.5
    assert abs(ratios.mean() - 2) < 4 * standard_error < 0.2


@pytest.mark.parametrize("rank", [4, 256])
@pytest.mark.parametrize("init", [gaussian, uniform])
def test_paper_starts_have_a_variance_that_ignores_their_own(init, rank):
    """Normalised columns cancel 2/R: Var(W) = R / (O·I·K_h·K_w), also in a layer."""
    variance = mean_variance(init, SHAPE, rank)
    assert variance * math.prod(SHAPE) / rank == pytest.approx(1, abs=0.05)
    layer = cpnb.CPConv2d(32, 64, 3, rank=rank, init=init)
    variance = layer.weight.var().item() * math.prod(SHAPE) / rank
    assert variance == pytest.approx(1, abs=0.1)  # one draw: five deviations of 2 %


def test_paper_starts_draw_directions_of_the_stated_distributions():
    generator = torch.Generator().manual_seed(0)
    for start, fourth in ((gaussian, 3.0), (uniform, 1.8)):  # kurtosis of a column
        lam, (column, _) = start((4000, 300), 50, generator=generator)
        assert torch.equal(lam, torch.ones(50))
        assert_close(column.norm(dim=0), torch.ones(50))
        kurtosis = 4000 * column.pow(4).sum(0).mean().item()
        assert kurtosis == pytest.approx(fourth, rel=0.02)


@pytest.mark.parametrize("init", ["power", "als"])
def test_fitted_starts_are_exact_for_zero_kernels_vectors_and_numbers(init):
    zero = nn.Conv2d(2, 4, 3)
    nn.init.zeros_(zero.weight)
    layer = cpnb.from_layer(zero, rank=3, init=init)
    assert not layer.weight.any()
    assert all(factor.norm(dim=0).min() > 0.5 for factor in layer.factors)
    for plain in (nn.Linear(5, 1), nn.Linear(1, 1)):
        layer = cpnb.from_layer(plain, rank=2, init=init)
        assert_close(layer.weight, plain.weight)


@pytest.mark.parametrize("name", sorted(INITIALIZERS))
@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 1, 3), (1, 1)], ids=str)
def test_every_start_is_repeatable_and_has_no_factor_for_size_one(name, shape):
    state = torch.get_rng_state()
    start = functools.partial(INITIALIZERS[name], shape, 3, dtype=torch.float64)
    lam, factors = start(generator=torch.Generator().manual_seed(5))
    again, _ = start(generator=torch.Generator().manual_seed(5))
    assert torch.equal(lam, again)
    assert lam.dtype == torch.float64
    assert [f.shape for f in factors] == [(n, 3) for n in shape if n > 1]
    assert torch.equal(torch.get_rng_state(), state)
