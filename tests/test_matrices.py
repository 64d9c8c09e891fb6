"""Kernels as matrices: the unfolding, the best split, known variances, ranks."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from cpnb.matrices import (
    MATRIX_INITIALIZERS,
    fold,
    kaiming,
    matrix_break_even,
    matrix_rank,
    spectral,
    spectral_factors,
    unfold,
)
from cpnb.rules import FitRank

FLOAT64 = torch.empty(0, dtype=torch.float64)


def looped_unfolding(kernel, groups):
    """Entry W[o,i,h,w] in row (o,h) and column (i,w) of its group, written out."""
    out, channels, height, width = kernel.shape
    rows, columns = out // groups * height, channels * width
    matrices = torch.zeros(groups, rows, columns, dtype=kernel.dtype)
    for o, i, h, w in itertools.product(*map(range, kernel.shape)):
        group, inside = divmod(o, out // groups)
        matrices[group, inside * height + h, i * width + w] = kernel[o, i, h, w]
    return matrices


@pytest.mark.parametrize("groups", [1, 3])
def test_unfold_moves_each_entry_where_the_loops_say(groups):
    kernel = torch.randn(6, 4, 3, 2)
    matrices = unfold(kernel, groups)
    assert torch.equal(matrices, looped_unfolding(kernel, groups))
    assert torch.equal(fold(matrices, kernel.shape), kernel)


def test_unfold_of_a_linear_weight_is_the_weight():
    weight = torch.randn(5, 7)
    assert torch.equal(unfold(weight), weight[None])
    assert torch.equal(fold(weight[None], weight.shape), weight)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_spectral_factors_leave_the_tail_of_the_singular_values(rank):
    matrices = torch.randn(2, 8, 6, dtype=torch.float64)
    left, right = spectral_factors(matrices, rank)
    tail = torch.linalg.svdvals(matrices)[:, rank:].square().sum(1).sqrt()
    error = (matrices - left @ right.mT).norm(dim=(1, 2))
    assert_close(error, tail, rtol=1e-10, atol=1e-12)
    # Balanced: both sides hold half of every singular value.
    assert_close(left.mT @ left, right.mT @ right)


@pytest.mark.parametrize(("height", "width"), [(3, 3), (5, 1), (1, 3)])
def test_kaiming_start_is_twice_the_height_times_too_wide(height, width):
    """Mean of many kernels; their own spread makes 3 % about four standard errors."""
    shape, rank = (16, 8, height, width), 6
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(300):
        left, right = kaiming(shape, rank, generator=generator, like=FLOAT64)
        squares.append((left @ right.mT).square().mean())
    he = 2 / (8 * height * width)
    ratio = torch.stack(squares).mean().item() / he
    assert ratio == pytest.approx(2 * height, rel=0.03)


@pytest.mark.parametrize("start", MATRIX_INITIALIZERS.values(), ids=MATRIX_INITIALIZERS)
def test_starts_follow_the_generator_and_leave_torchs_alone(start):
    before = torch.random.get_rng_state()
    drawn = [
        start((4, 3, 3, 3), 5, generator=torch.Generator().manual_seed(n), like=FLOAT64)
        for n in (0, 0, 1)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not any(map(torch.equal, drawn[0], drawn[2]))
    assert {matrix.dtype for matrix in drawn[0]} == {torch.float64}


def test_spectral_start_is_that_of_torchs_default_kernel():
    shape, generator = (32, 16, 3, 3), torch.Generator().manual_seed(0)
    left, right = spectral(shape, 48, generator=generator, like=FLOAT64)
    kernel = left @ right.mT  # full rank
    bound = (16 * 9) ** -0.5
    assert kernel.abs().max() <= bound + 1e-12
    assert kernel.var().item() == pytest.approx(bound**2 / 3, rel=0.05)


@pytest.mark.parametrize("middle", [False, True])
def test_matrix_break_even_is_the_smallest_rank_with_as_many_numbers(middle):
    for rows, columns in itertools.product((1, 2, 9, 384), (1, 3, 48, 192)):
        rank = matrix_break_even(rows, columns, middle=middle)

        def held(rank, both=rows + columns):
            return rank * (both + (rank if middle else 0))

        assert held(rank) >= rows * columns > held(rank - 1)
        assert 1 <= rank <= min(rows, columns)


def test_matrix_rank_reads_every_way_to_say_a_rank():
    assert matrix_rank(7, (4, 4)) == 7  # for the caller to clip or refuse
    assert matrix_rank("same", (384, 192)) == matrix_rank(1.0, (384, 192)) == 128
    assert matrix_rank(0.25, (384, 192)) == 32
    assert matrix_rank(1e-9, (384, 192)) == 1
    assert matrix_rank(0.5, (384, 192), middle=True) == 54
    steep = torch.diag(torch.tensor([9.0, 1.0, 0.1]))
    both = torch.stack([steep, torch.eye(3)])
    assert matrix_rank(FitRank(0.2), (3, 3), both[:1]) == 1
    assert matrix_rank(FitRank(0.2), (3, 3), both) == 3
    with pytest.raises(ValueError, match="needs a kernel to look at"):
        matrix_rank(FitRank(0.2), (3, 3))
    with pytest.raises(ValueError, match="rank is 0"):
        matrix_rank(0, (3, 3))
