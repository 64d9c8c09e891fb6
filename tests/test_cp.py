"""The functional core against loop specifications, TensorLy and autograd."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared import random_cp
from torch.autograd import gradcheck
from torch.testing import assert_close

from cpnb.cp import (
    break_even_rank,
    canonical_gauge,
    component_gram,
    cp_parameters,
    cp_to_kernel,
    khatri_rao,
    normalize_columns,
    rebuild,
    relative_error,
    resolve_rank,
    with_unit_columns,
)

SHAPES = [(5, 4), (5, 4, 3), (4, 3, 3, 2), (3, 2, 2, 2, 2), (7,)]


def loop_kernel(lam, factors):
    kernel = torch.zeros([len(f) for f in factors], dtype=lam.dtype)
    for index in itertools.product(*(range(len(f)) for f in factors)):
        for r in range(len(lam)):
            term = lam[r].clone()
            for f, i in zip(factors, index, strict=True):
                term *= f[i, r]
            kernel[index] += term
    return kernel


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cp_to_kernel_equals_the_loop_specification(shape):
    lam, factors = random_cp(shape, 3)
    assert_close(cp_to_kernel(lam, factors), loop_kernel(lam, factors))


def test_khatri_rao_equals_tensorly_whichever_mode_is_largest():
    from tensorly.tenalg import khatri_rao as peer

    for shape in [(2, 3, 7), (7, 3, 2), (3, 7, 2)]:
        _, factors = random_cp(shape, 5)
        oracle = torch.from_numpy(peer([f.numpy() for f in factors]))
        assert_close(khatri_rao(factors), oracle)
    assert_close(khatri_rao(factors[:1]), factors[0])


def test_normalize_columns_leaves_zero_columns_with_finite_gradient():
    factor = torch.tensor([[0.0, 3.0], [0.0, 4.0]], requires_grad=True)
    (unit,), norms = normalize_columns([factor])
    (unit.sum() + norms.sum()).backward()
    assert unit[:, 0].tolist() == [0, 0]
    assert norms[0].tolist() == [0, 5]
    assert factor.grad.isfinite().all()


def test_component_gram_holds_the_inner_products_of_rank_one_terms():
    _, factors = random_cp((4, 3, 2), 3)
    ones = torch.ones(1, dtype=torch.float64)
    terms = [loop_kernel(ones, [f[:, r : r + 1] for f in factors]) for r in range(3)]
    expected = torch.tensor([[(a * b).sum().item() for b in terms] for a in terms])
    assert_close(component_gram(factors), expected.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_canonical_gauge_keeps_the_kernel_and_its_promises(shape):
    lam, factors = random_cp(shape, 6)
    gauge_lam, gauge = canonical_gauge(lam, factors)
    assert_close(cp_to_kernel(gauge_lam, gauge), cp_to_kernel(lam, factors))
    assert (gauge_lam >= 0).all()
    assert (gauge_lam.diff() <= 0).all()
    for n, factor in enumerate(gauge):
        assert_close(factor.norm(dim=0), torch.ones(6, dtype=torch.float64))
        if n:
            assert (factor.gather(0, factor.abs().argmax(0, keepdim=True)) > 0).all()


@given(
    seed=st.integers(0, 10**6),
    permutation=st.permutations(range(4)),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=12, max_size=12),
    scales=st.lists(st.floats(0.1, 10), min_size=12, max_size=12),
)
def test_kernel_and_gauge_are_the_same_for_every_order_scale_and_sign(
    seed, permutation, signs, scales
):
    lam, factors = random_cp((4, 3, 2), 4, seed)
    change = (torch.tensor(signs) * torch.tensor(scales)).double().view(3, 4)
    order = torch.tensor(permutation)
    other_lam = (lam / change.prod(0))[order]
    other = [(f * c)[:, order] for f, c in zip(factors, change, strict=True)]
    assert_close(cp_to_kernel(other_lam, other), cp_to_kernel(lam, factors))
    expected_lam, expected = canonical_gauge(lam, factors)
    gauge_lam, gauge = canonical_gauge(other_lam, other)
    assert_close([gauge_lam, *gauge], [expected_lam, *expected])


def test_relative_error_equals_its_definition_and_handles_a_zero_kernel():
    kernel = torch.tensor([3.0, 4.0])
    error = relative_error(kernel, torch.tensor([3.0, 0.0])).item()
    assert error == pytest.approx(0.8)
    zero = torch.zeros(2)
    assert relative_error(zero, zero).item() == 0
    assert relative_error(zero, kernel).item() == math.inf


def test_core_functions_pass_gradcheck():
    lam, factors = random_cp((3, 2, 2), 2)
    inputs = [t.requires_grad_() for t in (lam, *factors)]
    assert gradcheck(lambda lam, *f: cp_to_kernel(lam, f), inputs)
    assert gradcheck(lambda lam, *f: rebuild(*with_unit_columns(lam, f)), inputs)
    assert gradcheck(lambda *f: component_gram(f), inputs[1:])
    assert gradcheck(lambda *f: tuple(normalize_columns(f)[0]), inputs[1:])
    assert gradcheck(lambda *f: khatri_rao(f), inputs[1:])
    kernel = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda k: relative_error(k, torch.ones_like(k)), [kernel])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 32, 3, 3), 179), ((128, 9216), 127), ((32, 1, 3, 3), 8), ((10,), 1)],
    ids=str,
)
def test_break_even_rank_is_the_first_rank_as_large_as_the_dense_kernel(
    shape, expected
):
    rank = break_even_rank(shape)
    per_component = sum(n for n in shape if n > 1) + 1
    assert rank == expected
    assert rank * per_component >= math.prod(shape) > (rank - 1) * per_component
    assert cp_parameters(shape, rank) == rank * per_component + 1


def test_resolve_rank_understands_ints_fractions_same_and_functions():
    kernel = torch.ones(64, 32, 3, 3)
    ranks = {7: 7, np.int64(2): 2, "same": 179, 1.0: 179, 0.5: 90, 1e-9: 1, len: 64}
    for rank, expected in ranks.items():
        assert resolve_rank(rank, kernel.shape, kernel) == expected


A, B, C = torch.ones(3, 2), torch.ones(4, 2), torch.ones(4, 5)
LAM = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "arguments", "text"),
    [
        (cp_to_kernel, (LAM, [A, C]), r"factors\[1\] has 5 columns, expected rank 2"),
        (cp_to_kernel, (LAM, [A, C]), r"from lam\). Rebuild it with shape \(4, 2\)"),
        (cp_to_kernel, (A, [A, B]), r"lam has shape \(3, 2\), expected \(rank,\)"),
        (cp_to_kernel, (LAM, []), "factors is empty, expected one"),
        (cp_to_kernel, (LAM, [A, LAM]), r"factors\[1\] has shape \(2,\), expected two"),
        (khatri_rao, ([A, C],), r"5 columns, expected rank 2 \(from matrices\[0\]\)"),
        (relative_error, (A, B), r"approximation has shape \(4, 2\), expected \(3"),
        (resolve_rank, (0, (3, 3)), "rank is 0, expected an int >= 1"),
        (resolve_rank, (1.5, (3, 3)), "rank is 1.5.*For a number of components"),
        (resolve_rank, (math.nan, (3, 3)), "rank is nan"),
        (resolve_rank, ("all", (3, 3)), "rank is 'all'"),
        (resolve_rank, (len, (4, 3)), "rank is a function.*needs a kernel to look at"),
    ],
)
def test_core_refuses_bad_values_with_a_clear_error(call, arguments, text):
    with pytest.raises(ValueError, match=text):
        call(*arguments)


@pytest.mark.parametrize("rank", [True, None])
def test_resolve_rank_refuses_other_types(rank):
    with pytest.raises(TypeError, match=f"rank is {rank}, expected an int >= 1"):
        resolve_rank(rank, (3, 3))
