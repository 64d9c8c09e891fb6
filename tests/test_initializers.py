"""Variance of the rebuilt kernel, and what fitted starts fit."""

import functools
import math

import pytest
import torch

import cpnb

SHAPE = (64, 32, 3, 3)


def mean_variance(init, shape, rank, draws=20, **options):
    generator = torch.Generator().manual_seed(rank)
    variances = [
        cpnb.cp_to_kernel(*init(shape, rank, generator=generator, **options)).var()
        for _ in range(draws)
    ]
    return torch.stack(variances).mean().item()


# One draw's ratio has a standard deviation of at most 2 % here: columns are unit, so
# ‖W‖² = λ²(R + Σ_{r≠s} Γ_rs) and the cross terms are of size √2·R·σ_Γ with
# σ_Γ² = Π 1/N_n. Over 20 draws 2 % is more than four standard errors.
@pytest.mark.parametrize("rank", [1, 2, 4, 16, 64, 256])
@pytest.mark.parametrize(
    ("mode", "nonlinearity", "target"),
    [
        ("fan_in", "relu", 2 / (32 * 9)),
        ("fan_in", "linear", 1 / (32 * 9)),
        ("fan_out", "relu", 2 / (64 * 9)),
    ],
)
def test_unified_gives_the_rebuilt_kernel_its_variance(
    rank, mode, nonlinearity, target
):
    variance = mean_variance(
        cpnb.unified, SHAPE, rank, mode=mode, nonlinearity=nonlinearity
    )
    assert variance / target == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("groups", [2, 4])
def test_unified_counts_the_channels_of_one_group(groups):
    shape = (64, 32 // groups, 3, 3)
    inwards = mean_variance(cpnb.unified, shape, 16, groups=groups)
    assert inwards * shape[1] * 9 / 2 == pytest.approx(1, abs=0.03)
    outwards = mean_variance(cpnb.unified, shape, 16, groups=groups, mode="fan_out")
    assert outwards * (64 // groups) * 9 / 2 == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("shape", [(64, 32, 5), (16, 8, 3, 3, 3), (128, 64)], ids=str)
def test_unified_is_calibrated_for_other_orders(shape):
    target = 2 / math.prod(shape[1:])
    variance = mean_variance(cpnb.unified, shape, 32)
    assert variance / target == pytest.approx(1, abs=0.05)


def test_unified_doubles_the_power_of_rectified_activations():
    """Kaiming's condition: E[(Wx)²] = 2 E[x²], of which ReLU leaves E[x²]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 32, 10, 10, generator=generator).relu()
    ratios = []
    with torch.no_grad():
        for _ in range(200):
            layer = cpnb.CPConv2d(32, 32, 3, bias=False, rank=64, generator=generator)
            ratios.append(layer(images).square().mean() / images.square().mean())
    ratios = torch.stack(ratios)
    standard_error = ratios.std() / len(ratios) ** 0.5
    assert abs(ratios.mean() - 2) < 4 * standard_error < 0.2


@pytest.mark.parametrize("rank", [4, 64, 256])
@pytest.mark.parametrize("init", [cpnb.gaussian, cpnb.uniform])
def test_paper_starts_have_a_variance_that_ignores_their_own(init, rank):
    """Normalised columns cancel 2/R: Var(W) = R / (O·I·K_h·K_w)."""

    def normalised(shape, rank, generator):
        lam, factors = init(shape, rank, generator=generator)
        return lam, cpnb.normalize_columns(factors)[0]

    variance = mean_variance(normalised, SHAPE, rank)
    assert variance * math.prod(SHAPE) / rank == pytest.approx(1, abs=0.05)


def test_paper_starts_draw_entries_of_the_stated_variance():
    generator = torch.Generator().manual_seed(0)
    _, normal = cpnb.gaussian((400, 300), 50, generator=generator)
    assert normal[0].var().item() == pytest.approx(2 / 50, rel=0.05)
    _, flat = cpnb.uniform((400, 300), 50, generator=generator)
    bound = math.sqrt(6 / 50)
    assert flat[0].abs().max().item() <= bound
    assert flat[0].var().item() == pytest.approx(bound**2 / 3, rel=0.05)


@pytest.mark.parametrize("init", ["power", "als"])
def test_fitted_starts_fit_the_default_dense_start_without_a_weight(init):
    generator = torch.Generator().manual_seed(0)
    layer = cpnb.CPConv2d(8, 16, 3, rank=300, init=init, generator=generator)
    bound = 1 / math.sqrt(8 * 9)
    assert layer.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.15)


@pytest.mark.parametrize("name", sorted(cpnb.INITIALIZERS))
@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 1, 3), (1, 1)], ids=str)
def test_every_start_is_repeatable_and_has_no_factor_for_size_one(name, shape):
    draws = [
        cpnb.INITIALIZERS[name](
            shape, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64
        )
        for _ in range(2)
    ]
    (lam, factors), (again, _) = draws
    assert torch.equal(lam, again)
    assert lam.dtype == torch.float64
    assert [f.shape for f in factors] == [(n, 3) for n in shape if n > 1]


def test_a_start_given_as_a_function_is_used():
    outwards = functools.partial(cpnb.unified, mode="fan_out")
    layer = cpnb.CPConv2d(8, 32, 3, rank=10, init=outwards)
    assert layer.lam[0].item() == pytest.approx(math.sqrt(2 * 8 / 10))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: cpnb.unified(SHAPE, 2, mode="fan"), "mode is 'fan', expected"),
        (lambda: cpnb.unified(SHAPE, 2, nonlinearity="gelu"), "nonlinearity is 'gelu'"),
        (
            lambda: cpnb.CPConv2d(3, 4, 3, init="kaiming"),
            r"init is 'kaiming', expected one of \['als', 'gaussian'",
        ),
    ],
)
def test_starts_refuse_unknown_names(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("init", [cpnb.unified, cpnb.gaussian, cpnb.uniform])
@pytest.mark.parametrize(
    ("shape", "rank", "error", "text"),
    [
        (SHAPE, 0, ValueError, "rank is 0, expected at least 1"),
        (SHAPE, -1, ValueError, "rank is -1"),
        (SHAPE, 2.5, TypeError, "rank is 2.5, expected an int >= 1"),
        (SHAPE, "same", TypeError, "rank is 'same'"),
        ((0, 3), 2, ValueError, r"shape is \(0, 3\), expected \(out, in / groups"),
        ((), 2, ValueError, r"shape is \(\), expected"),
    ],
)
def test_starts_refuse_bad_ranks_and_shapes(init, shape, rank, error, text):
    with pytest.raises(error, match=text):
        init(shape, rank)
