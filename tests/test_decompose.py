"""Greedy power method and ALS: their promises, and TensorLy as oracle."""

import itertools
import math

import pytest
import torch
from shared import randn, seeded
from torch.testing import assert_close

from cpnb import decompose
from cpnb.cp import canonical_gauge, cp_to_kernel, normalize_columns, relative_error
from cpnb.decompose import als, power_method

SHAPES = [(8, 6, 3, 3), (9, 7, 5), (6, 5), (4, 3, 2, 2, 2)]
METHODS = [power_method, als]


def exact_kernel(shape, rank, seed=0):
    """A kernel of known rank, its λ well apart, with its canonical form."""
    factors = [randn(n, rank, seed=seed + i) for i, n in enumerate(shape)]
    lam = torch.arange(rank, 0, -1, dtype=torch.float64)
    units, _ = normalize_columns(factors)
    return cp_to_kernel(lam, units), canonical_gauge(lam, units)


def error_of(kernel, lam, factors):
    return relative_error(kernel, cp_to_kernel(lam, factors)).item()


def energy(kernel, result):
    return (result.lam / kernel.norm()).square().sum().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decomposition_reports_its_error_and_has_unit_columns(method, shape):
    kernel = randn(*shape)
    result = method(kernel, 5, generator=seeded())
    assert len(result.factors) == len(shape)
    error = error_of(kernel, result.lam, result.factors)
    assert result.relative_error == pytest.approx(error, abs=1e-12)
    assert 0 < error < 1
    assert (result.lam >= 0).all()
    for factor in result.factors:
        assert_close(factor.norm(dim=0), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_decomposition_repeats_bit_for_bit_and_leaves_the_global_generator(method):
    kernel = randn(6, 5, 3)
    state = torch.get_rng_state()
    first = method(kernel, 4, generator=seeded(3))
    second = method(kernel, 4, generator=seeded(3))
    assert torch.equal(first.lam, second.lam)
    assert all(map(torch.equal, first.factors, second.factors))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_power_method_is_nested_and_its_error_follows_from_lambda_alone(shape):
    kernel = randn(*shape)
    long = power_method(kernel, 6, generator=seeded())
    short = power_method(kernel, 4, generator=seeded())
    assert_close(short.lam, long.lam[:4])
    assert_close(short.factors, [factor[:, :4] for factor in long.factors])
    for result in (long, short):
        predicted = math.sqrt(max(0.0, 1 - energy(kernel, result)))
        assert result.relative_error == pytest.approx(predicted, abs=1e-7)


def test_power_method_is_the_svd_for_a_matrix():
    matrix = randn(7, 5)
    result = power_method(matrix, 3)
    assert_close(result.lam, torch.linalg.svdvals(matrix)[:3])


def test_power_method_pads_with_zero_lambda_when_nothing_is_left():
    for shape, rank in (((4, 3), 5), ((4, 3, 3), 60)):
        kernel, _ = exact_kernel(shape, rank=2)
        result = power_method(kernel, rank, generator=seeded())
        assert result.relative_error < 1e-12
        assert result.lam[rank - 2 :].abs().max() < 1e-12
        assert result.factors[0].shape == (4, rank)
        assert_close(result.factors[0].norm(dim=0), torch.ones(rank).double())


def test_als_is_at_least_as_good_as_tensorly():
    from tensorly.decomposition import parafac

    kernel = randn(8, 6, 3, 3)
    lam, factors = parafac(
        kernel.numpy(), 8, n_iter_max=50, init="random", random_state=0, tol=1e-8
    )
    peer = error_of(kernel, torch.from_numpy(lam), list(map(torch.from_numpy, factors)))
    assert als(kernel, 8, generator=seeded()).relative_error <= peer * 1.01


def test_als_recovers_every_component_of_a_low_rank_kernel():
    kernel, (lam, factors) = exact_kernel((9, 8, 3, 3), rank=4)
    result = als(kernel, 4, sweeps=200, damping=0, tol=0, generator=seeded())
    assert result.relative_error < 1e-6
    fitted_lam, fitted = canonical_gauge(result.lam, result.factors)
    assert_close(fitted_lam, lam, rtol=1e-4, atol=0)
    assert_close(fitted, factors, rtol=0, atol=1e-4)


TEXTBOOK = {"extrapolate": False, "start": "random"}


@pytest.mark.parametrize(
    ("damping", "options"), [(0.0, {}), (1e-3, {}), (0.0, TEXTBOOK)]
)
def test_als_never_fits_worse_with_more_sweeps(damping, options):
    """The best factors met are kept, also across extrapolations that went wrong."""
    kernel = randn(6, 5, 3, 3)

    def goal(sweeps):
        settings = {"sweeps": sweeps, "damping": damping, "tol": 0, **options}
        result = als(kernel, 12, **settings, generator=seeded())
        size = 4 * (result.lam / kernel.norm()).sqrt().sum().item()
        return result.relative_error**2 * (1 + damping * size)

    goals = [goal(n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)]
    # Balancing the norms at the end changes their sum a little: 1 % of the damping.
    slack = 1 + 10 * damping
    assert all(b <= a * slack + 1e-12 for a, b in itertools.pairwise(goals))
    assert goals[-1] < 0.6 * goals[0]


def test_damping_keeps_components_small_at_almost_no_cost():
    kernel = randn(16, 8, 3, 3)
    free = als(kernel, 8, sweeps=200, damping=0, generator=seeded())
    damped = als(kernel, 8, sweeps=200, generator=seeded())
    assert energy(kernel, damped) < 0.5 * energy(kernel, free)
    assert damped.relative_error < 1.01 * free.relative_error


def test_als_ridge_holds_lambda_down_on_a_degenerate_kernel():
    """The border-rank kernel aab + aba + baa has no best fit of rank 2."""
    a, b = torch.eye(2, dtype=torch.float64)
    terms = [(a, a, b), (a, b, a), (b, a, a)]
    kernel = sum(torch.einsum("i,j,k->ijk", *term) for term in terms)
    options = {"sweeps": 300, "tol": 0, "generator": seeded()}
    free = als(kernel, 2, damping=0, **options)
    ridged = als(kernel, 2, ridge=1e-2, **options)
    assert free.relative_error < ridged.relative_error
    assert free.lam.max() > 3 * ridged.lam.max()


def test_als_says_what_to_do_when_every_retry_fails(monkeypatch):
    monkeypatch.setattr(decompose, "_solve", lambda gram, product: product * math.nan)
    with pytest.raises(ArithmeticError, match=r"rank 2 .* Lower the rank or use power"):
        als(randn(4, 3, 2), 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kernel", "rank", "text"),
    [
        (torch.zeros(4, 3, 2), 2, "is a vector or zero, expected at least two modes"),
        (torch.ones(5), 2, r"kernel of shape \(5,\) is a vector or zero, expected at"),
        (torch.ones(0, 3, 2), 2, r"kernel of shape \(0, 3, 2\)"),
        (torch.ones(4, 3) * math.nan, 2, "kernel has 12 NaN or infinite entries out"),
        (torch.arange(24).view(2, 3, 4), 2, "kernel is torch.int64, expected real"),
        (torch.ones(4, 3, 2), 0, "rank is 0"),
    ],
    ids=["zero", "vector", "empty", "nan", "integers", "rank"],
)
def test_decompositions_refuse_bad_input_with_a_clear_error(method, kernel, rank, text):
    with pytest.raises(ValueError, match=text):
        method(kernel, rank)
