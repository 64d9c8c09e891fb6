"""Greedy power method and ALS: their promises, and TensorLy as oracle."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb.als import _start

SHAPES = [(8, 6, 3, 3), (9, 7, 5), (6, 5), (4, 3, 2, 2, 2)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_kernel(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def exact_kernel(shape, rank, seed=0):
    """A kernel of known rank, its λ well apart, with its canonical form."""
    factors = [random_kernel((n, rank), seed + i) for i, n in enumerate(shape)]
    lam = torch.arange(rank, 0, -1, dtype=torch.float64)
    units, _ = cpnb.normalize_columns(factors)
    return cpnb.cp_to_kernel(lam, units), cpnb.canonical_gauge(lam, units)


def border_rank_kernel():
    a, b = torch.eye(2, dtype=torch.float64)
    return sum(
        torch.einsum("i,j,k->ijk", *term) for term in [(a, a, b), (a, b, a), (b, a, a)]
    )


def rebuilt(result):
    return cpnb.cp_to_kernel(result.lam, result.factors)


@pytest.mark.parametrize("method", [cpnb.power_method, cpnb.als])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decomposition_reports_its_error_and_has_unit_columns(method, shape):
    kernel = random_kernel(shape)
    result = method(kernel, 5, generator=seeded())
    assert len(result.factors) == len(shape)
    error = cpnb.relative_error(kernel, rebuilt(result)).item()
    assert result.relative_error == pytest.approx(error, abs=1e-12)
    assert 0 < error < 1
    assert (result.lam >= 0).all()
    for factor in result.factors:
        assert_close(factor.norm(dim=0), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_power_method_error_follows_from_lambda_alone(shape):
    kernel = random_kernel(shape)
    for rank in (1, 3, 6):
        result = cpnb.power_method(kernel, rank, generator=seeded())
        explained = (result.lam / kernel.norm()).square().sum().item()
        predicted = math.sqrt(max(0.0, 1 - explained))
        assert result.relative_error == pytest.approx(predicted, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_power_method_is_nested(shape):
    kernel = random_kernel(shape)
    long = cpnb.power_method(kernel, 6, generator=seeded())
    short = cpnb.power_method(kernel, 4, generator=seeded())
    assert_close(short.lam, long.lam[:4])
    for s, f in zip(short.factors, long.factors, strict=True):
        assert_close(s, f[:, :4])


def test_power_method_is_the_svd_for_a_matrix():
    matrix = random_kernel((7, 5))
    result = cpnb.power_method(matrix, 3)
    assert_close(result.lam, torch.linalg.svdvals(matrix)[:3])


def test_power_method_finds_the_best_rank_one_term():
    """Against a brute-force search: many long power iterations from random starts."""
    kernel = random_kernel((5, 4, 3))
    best = 0.0
    for seed in range(50):
        a, b, c = (
            random_kernel((n,), 10 * seed + i) for i, n in enumerate(kernel.shape)
        )
        for _ in range(200):
            a = torch.einsum("ijk,j,k->i", kernel, b, c)
            a /= a.norm()
            b = torch.einsum("ijk,i,k->j", kernel, a, c)
            b /= b.norm()
            c = torch.einsum("ijk,i,j->k", kernel, a, b)
            value = c.norm().item()
            c /= value
        best = max(best, value)
    result = cpnb.power_method(kernel, 1, sweeps=100, restarts=50, generator=seeded())
    assert result.lam.item() == pytest.approx(best, rel=1e-6)


def test_power_method_is_at_least_as_good_as_tensorly():
    import numpy as np
    from tensorly.decomposition import CPPower

    kernel = random_kernel((8, 6, 3, 3))
    state = np.random.get_state()  # noqa: NPY002 - TensorLy draws from it
    try:
        np.random.seed(0)  # noqa: NPY002
        peer = CPPower(rank=8).fit_transform(kernel.numpy())
    finally:
        np.random.set_state(state)  # noqa: NPY002
    lam, factors = torch.from_numpy(peer[0]), [torch.from_numpy(f) for f in peer[1]]
    peer_error = cpnb.relative_error(kernel, cpnb.cp_to_kernel(lam, factors)).item()
    mine = cpnb.power_method(kernel, 8, generator=seeded()).relative_error
    # Greedy paths part ways with their starts: 2 % is the spread over seeds here.
    assert mine <= peer_error * 1.02


def test_als_is_at_least_as_good_as_tensorly():
    from tensorly.decomposition import parafac

    kernel = random_kernel((8, 6, 3, 3))
    peer = parafac(
        kernel.numpy(), 8, n_iter_max=50, init="random", random_state=0, tol=1e-8
    )
    lam, factors = torch.from_numpy(peer[0]), [torch.from_numpy(f) for f in peer[1]]
    peer_error = cpnb.relative_error(kernel, cpnb.cp_to_kernel(lam, factors)).item()
    mine = cpnb.als(kernel, 8, generator=seeded()).relative_error
    assert mine <= peer_error * 1.01


def test_als_recovers_every_component_of_a_low_rank_kernel():
    kernel, (lam, factors) = exact_kernel((9, 8, 3, 3), rank=4)
    result = cpnb.als(kernel, 4, sweeps=500, damping=0, tol=0, generator=seeded())
    assert result.relative_error < 1e-6
    found_lam, found = cpnb.canonical_gauge(result.lam, result.factors)
    assert_close(found_lam, lam, rtol=1e-4, atol=0)
    for f, expected in zip(found, factors, strict=True):
        assert_close(f, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_more_sweeps_never_give_a_worse_fit(damping):
    """The best factors met are kept, also across extrapolations that went wrong."""
    kernel = random_kernel((8, 6, 3, 3))

    def goal(sweeps):
        result = cpnb.als(
            kernel, 20, sweeps=sweeps, damping=damping, tol=0, generator=seeded()
        )
        size = 4 * (result.lam / kernel.norm()).sqrt().sum().item()
        return result.relative_error**2 * (1 + damping * size)

    goals = [goal(n) for n in range(1, 40)]
    # Balancing the norms at the end changes their sum a little: 1 % of the damping.
    slack = 1 + 10 * damping
    assert all(b <= a * slack + 1e-12 for a, b in itertools.pairwise(goals))
    assert goals[-1] < 0.5 * goals[0]


def test_als_extrapolates_to_a_better_fit_in_the_same_sweeps():
    kernel = random_kernel((16, 8, 3, 3))
    errors = [
        cpnb.als(
            kernel, 30, sweeps=20, extrapolate=extrapolate, generator=seeded()
        ).relative_error
        for extrapolate in (False, True)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_damping_keeps_components_small_at_almost_no_cost():
    kernel = random_kernel((16, 8, 3, 3))
    free = cpnb.als(kernel, 8, sweeps=200, damping=0, generator=seeded())
    damped = cpnb.als(kernel, 8, sweeps=200, generator=seeded())
    assert damped.info.degeneracy.energy < 0.5 * free.info.degeneracy.energy
    assert damped.relative_error < 1.01 * free.relative_error


def test_textbook_als_never_raises_the_error():
    kernel = random_kernel((8, 6, 3, 3))
    errors = [
        cpnb.als(
            kernel, 6, sweeps=n, damping=0, tol=0, extrapolate=False, generator=seeded()
        ).relative_error
        for n in range(1, 15)
    ]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_als_ridge_holds_lambda_down_on_a_degenerate_kernel():
    """The border-rank kernel aab + aba + baa has no best fit of rank 2."""
    kernel = border_rank_kernel()
    options = {"sweeps": 2000, "tol": 0, "generator": seeded()}
    free = cpnb.als(kernel, 2, damping=0, **options)
    held = cpnb.als(kernel, 2, ridge=1e-2, **options)
    assert free.relative_error < held.relative_error
    assert free.lam.max() > 3 * held.lam.max()


@pytest.mark.parametrize("start", ["greedy", "svd", "random"])
def test_als_improves_on_every_start_and_svd_starts_from_singular_vectors(start):
    kernel = random_kernel((8, 6, 3, 3))
    one = cpnb.als(kernel, 6, sweeps=1, start=start, generator=seeded())
    many = cpnb.als(kernel, 6, sweeps=80, start=start, generator=seeded())
    assert many.relative_error < one.relative_error < 1
    factors = _start("svd", kernel / kernel.norm(), 4, seeded())
    left = torch.linalg.svd(kernel.flatten(1)).U[:, :4]
    overlap = (left * factors[0] / factors[0].norm(dim=0)).sum(0).abs()
    assert_close(overlap, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [300, 450, 600])
def test_als_stays_finite_where_float32_als_of_the_oracle_does_not(dtype, rank):
    kernel = random_kernel((64, 32, 3, 3), dtype=dtype)
    result = cpnb.als(kernel, rank, sweeps=10, generator=seeded())
    assert result.info.degeneracy.finite
    assert all(f.isfinite().all() for f in (result.lam, *result.factors))
    assert result.relative_error < 1e-2


def test_bounded_als_lowers_the_energy_and_keeps_the_error():
    kernel = random_kernel((8, 6, 3, 3))
    free = cpnb.als(kernel, 20, generator=seeded())
    held = cpnb.bounded_als(kernel, 20, generator=seeded())
    assert held.relative_error <= free.relative_error * (1 + 1e-4)
    assert held.info.degeneracy.energy < 0.9 * free.info.degeneracy.energy
    assert held.info.degeneracy.sensitivity < free.info.degeneracy.sensitivity


@pytest.mark.parametrize("max_error", [0.1, 0.3])
def test_bounded_als_meets_its_bound_on_the_border_rank_kernel(max_error):
    held = cpnb.bounded_als(border_rank_kernel(), 2, max_error=max_error)
    assert held.relative_error == pytest.approx(max_error, rel=1e-3)
    assert not held.info.degeneracy.degenerate


def test_bounded_als_of_a_matrix_uses_the_error_it_is_allowed():
    matrix = random_kernel((7, 5))
    held = cpnb.bounded_als(matrix, 5, max_error=0.3)
    assert held.info.method == "bounded_als"
    assert held.relative_error == pytest.approx(0.3, rel=1e-3)
    exact = torch.linalg.svdvals(matrix).square().sum()
    assert held.lam.square().sum() < 0.9 * exact


def test_bounded_als_of_a_healthy_kernel_finds_its_own_components():
    """Orthogonal components have the least energy there is: nothing to gain."""
    factors = [torch.eye(n, dtype=torch.float64)[:, :3] for n in (5, 4, 3)]
    lam = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    kernel = cpnb.cp_to_kernel(lam, factors)
    result = cpnb.bounded_als(kernel, 3, generator=seeded())
    assert_close(result.lam, lam, rtol=1e-4, atol=0)


def test_info_holds_what_direct_computation_gives():
    kernel = random_kernel((6, 5, 3))
    for method in (cpnb.power_method, cpnb.als, cpnb.bounded_als):
        result = method(kernel, 4, generator=seeded())
        row = result.info.to_row()
        norm = rebuilt(result).norm()
        gram = cpnb.component_gram(result.factors).fill_diagonal_(0)
        assert row["method"] == method.__name__
        assert row["fit"] == 1 - result.relative_error
        assert row["iterations"] >= 1
        assert row["seconds"] > 0
        assert row["lam_max"] == pytest.approx((result.lam.max() / norm).item())
        energy = (result.lam / norm).square().sum().item()
        assert row["energy"] == pytest.approx(energy)
        assert row["worst_cosine"] == pytest.approx(gram.abs().max().item())
        assert row["finite"] is True


@pytest.mark.parametrize("method", [cpnb.power_method, cpnb.als])
def test_decomposition_repeats_bit_for_bit_and_leaves_the_global_generator(method):
    kernel = random_kernel((6, 5, 3))
    state = torch.get_rng_state()
    first = method(kernel, 4, generator=seeded(3))
    second = method(kernel, 4, generator=seeded(3))
    assert torch.equal(first.lam, second.lam)
    assert all(map(torch.equal, first.factors, second.factors))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "method", [cpnb.power_method, cpnb.als, cpnb.bounded_als], ids=lambda m: m.__name__
)
def test_decompositions_refuse_what_cannot_be_decomposed(method):
    with pytest.raises(ValueError, match="kernel is zero everywhere, expected somet"):
        method(torch.zeros(4, 3, 2), 2)
    with pytest.raises(ValueError, match=r"kernel has shape \(5,\), expected at least"):
        method(torch.ones(5), 2)


@pytest.mark.parametrize("init", ["power", "als"])
def test_fitted_starts_are_exact_for_zero_kernels_and_vectors(init):
    zero = nn.Conv2d(2, 4, 3)
    nn.init.zeros_(zero.weight)
    layer = cpnb.from_layer(zero, rank=3, init=init)
    assert not layer.weight.any()
    for factor in layer.factors:
        assert_close(factor.norm(dim=0).detach(), torch.ones(3))
    vector = nn.Linear(5, 1)
    layer = cpnb.from_layer(vector, rank=2, init=init)
    assert_close(layer.weight, vector.weight)


def test_power_method_pads_with_zero_lambda_when_nothing_is_left():
    kernel, _ = exact_kernel((4, 3), rank=2)
    result = cpnb.power_method(kernel, 5, generator=seeded())
    assert result.relative_error < 1e-12
    assert result.lam[2:].abs().max() < 1e-12
    assert result.factors[0].shape == (4, 5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda k: cpnb.power_method(k, 0), ValueError, "rank is 0"),
        (
            lambda k: cpnb.power_method(k * float("nan"), 2),
            ValueError,
            "kernel has 24 NaN or infinite entries out of 24",
        ),
        (lambda k: cpnb.als(k / 0, 2), ValueError, "kernel has 24 NaN or infinite"),
        (
            lambda k: cpnb.als(k.int(), 2),
            TypeError,
            "kernel has dtype torch.int32, expected a floating-point",
        ),
        (
            lambda k: cpnb.als(k.numpy(), 2),
            TypeError,
            r"kernel is a ndarray, expected a torch.Tensor",
        ),
        (lambda k: cpnb.als(k[0, 0, 0], 2), ValueError, r"kernel has shape \(\)"),
        (lambda k: cpnb.als(k[:0], 2), ValueError, r"kernel has shape \(0, 3, 2\)"),
        (lambda k: cpnb.power_method(k, 2, restarts=0), ValueError, "restarts is 0"),
        (lambda k: cpnb.power_method(k, 2, sweeps=-1), ValueError, "sweeps is -1"),
        (lambda k: cpnb.als(k, 2, ridge=-1.0), ValueError, "ridge is -1.0"),
        (lambda k: cpnb.als(k, 2, sweeps=0), ValueError, "sweeps is 0"),
        (lambda k: cpnb.als(k, 2, tol=math.nan), ValueError, "tol is nan"),
        (
            lambda k: cpnb.als(k, 2, start="hosvd"),
            ValueError,
            r"start is 'hosvd', expected one of \('greedy', 'svd', 'random'\)",
        ),
        (
            lambda k: cpnb.bounded_als(k, 2, max_error=1.5),
            ValueError,
            r"max_error is 1.5, expected a relative error in \[0, 1\)",
        ),
    ],
)
def test_decompositions_refuse_bad_input_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(4, 3, 2))


def test_als_says_what_to_do_when_every_retry_fails(monkeypatch):
    import sys

    module = sys.modules["cpnb.als"]
    monkeypatch.setattr(
        module, "_solve", lambda gram, product: torch.full_like(product, math.nan)
    )
    with pytest.raises(ArithmeticError, match=r"rank 2 .* Lower the rank or use power"):
        cpnb.als(random_kernel((4, 3, 2)), 2)
