"""The functional core against loop specifications, TensorLy and autograd."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

import cpnb

SHAPES = [(5, 4), (5, 4, 3), (4, 3, 3, 2), (3, 2, 2, 2, 2), (7,)]


def random_cp(shape, rank, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    lam = torch.randn(rank, generator=generator, dtype=dtype)
    factors = [torch.randn(n, rank, generator=generator, dtype=dtype) for n in shape]
    return lam, factors


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
    assert_close(cpnb.cp_to_kernel(lam, factors), loop_kernel(lam, factors))


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_cp_to_kernel_equals_tensorly(shape):
    import tensorly

    lam, factors = random_cp(shape, 6, seed=1)
    oracle = tensorly.cp_to_tensor((lam.numpy(), [f.numpy() for f in factors]))
    assert_close(cpnb.cp_to_kernel(lam, factors), torch.from_numpy(oracle))


def test_khatri_rao_equals_tensorly_whichever_mode_is_largest():
    from tensorly.tenalg import khatri_rao

    for shape in [(2, 3, 7), (7, 3, 2), (3, 7, 2), (4,)]:
        _, factors = random_cp(shape, 5)
        mine = cpnb.khatri_rao(factors)
        if len(shape) == 1:
            assert_close(mine, factors[0])
        else:
            oracle = khatri_rao([f.numpy() for f in factors])
            assert_close(mine, torch.from_numpy(oracle))


@given(seed=st.integers(0, 10**6), permutation=st.permutations(range(4)))
def test_cp_to_kernel_ignores_the_order_of_components(seed, permutation):
    lam, factors = random_cp((4, 3, 2), 4, seed)
    order = torch.tensor(permutation)
    permuted = cpnb.cp_to_kernel(lam[order], [f[:, order] for f in factors])
    assert_close(permuted, cpnb.cp_to_kernel(lam, factors))


def test_normalize_columns_gives_unit_columns_and_their_norms():
    _, factors = random_cp((5, 4, 3), 6)
    units, norms = cpnb.normalize_columns(factors)
    for n, (unit, factor) in enumerate(zip(units, factors, strict=True)):
        assert_close(unit.norm(dim=0), torch.ones(6, dtype=torch.float64))
        assert_close(norms[n], factor.norm(dim=0))
        assert_close(unit * norms[n], factor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_normalize_columns_keeps_precision_when_columns_are_tiny(dtype):
    factor = torch.full((4, 2), 1e-4, dtype=dtype)
    (unit,), _ = cpnb.normalize_columns([factor])
    assert unit.dtype == dtype
    assert_close(unit.float(), torch.full((4, 2), 0.5), rtol=1e-2, atol=0)


def test_normalize_columns_leaves_zero_columns_with_finite_gradient():
    factor = torch.tensor([[0.0, 3.0], [0.0, 4.0]], requires_grad=True)
    (unit,), norms = cpnb.normalize_columns([factor])
    (unit.sum() + norms.sum()).backward()
    assert unit[:, 0].tolist() == [0, 0]
    assert norms[0].tolist() == [0, 5]
    assert factor.grad.isfinite().all()


def test_component_gram_holds_the_inner_products_of_rank_one_terms():
    _, factors = random_cp((4, 3, 2), 3)
    ones = torch.ones(1, dtype=torch.float64)
    terms = [loop_kernel(ones, [f[:, r : r + 1] for f in factors]) for r in range(3)]
    expected = torch.tensor([[(a * b).sum().item() for b in terms] for a in terms])
    assert_close(cpnb.component_gram(factors), expected.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cp_norm_equals_the_norm_of_the_kernel(shape):
    lam, factors = random_cp(shape, 5)
    assert_close(cpnb.cp_norm(lam, factors), cpnb.cp_to_kernel(lam, factors).norm())


def test_cp_norm_of_a_zero_kernel_has_a_finite_gradient():
    lam = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    _, factors = random_cp((3, 2), 2)
    cpnb.cp_norm(lam, factors).backward()
    assert lam.grad.tolist() == [0, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_canonical_gauge_keeps_the_kernel_and_its_promises(shape):
    lam, factors = random_cp(shape, 6)
    gauge_lam, gauge = cpnb.canonical_gauge(lam, factors)
    rebuilt = cpnb.cp_to_kernel(gauge_lam, gauge)
    assert_close(rebuilt, cpnb.cp_to_kernel(lam, factors))
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
def test_canonical_gauge_is_the_same_for_every_form_of_a_kernel(
    seed, permutation, signs, scales
):
    lam, factors = random_cp((4, 3, 2), 4, seed)
    change = torch.tensor(signs, dtype=torch.float64) * torch.tensor(
        scales, dtype=torch.float64
    )
    change = change.view(3, 4)
    order = torch.tensor(permutation)
    other_lam = (lam / change.prod(0))[order]
    other = [(f * c)[:, order] for f, c in zip(factors, change, strict=True)]
    expected_lam, expected = cpnb.canonical_gauge(lam, factors)
    found_lam, found = cpnb.canonical_gauge(other_lam, other)
    assert_close(found_lam, expected_lam)
    for f, e in zip(found, expected, strict=True):
        assert_close(f, e)


def test_relative_error_equals_its_definition_and_handles_a_zero_kernel():
    kernel, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])
    assert cpnb.relative_error(kernel, other).item() == pytest.approx(0.8)
    zero = torch.zeros(2)
    assert cpnb.relative_error(zero, zero).item() == 0
    assert cpnb.relative_error(zero, kernel).item() == math.inf


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 32, 3, 3), 179), ((128, 9216), 127), ((32, 1, 3, 3), 8), ((10,), 1)],
    ids=str,
)
def test_break_even_rank_is_the_first_rank_as_large_as_the_dense_kernel(
    shape, expected
):
    rank = cpnb.break_even_rank(shape)
    per_component = sum(n for n in shape if n > 1) + 1
    assert rank == expected
    assert rank * per_component >= math.prod(shape) > (rank - 1) * per_component


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(7, 7), (True + 1, 2), ("same", 179), (1.0, 179), (0.5, 90), (1e-9, 1)],
    ids=str,
)
def test_resolve_rank_understands_ints_fractions_and_same(rank, expected):
    assert cpnb.resolve_rank(rank, (64, 32, 3, 3)) == expected


def test_core_functions_pass_gradcheck():
    lam, factors = random_cp((3, 2, 2), 2)
    inputs = [t.requires_grad_() for t in (lam, *factors)]
    assert gradcheck(lambda lam, *f: cpnb.cp_to_kernel(lam, f), inputs)
    assert gradcheck(lambda lam, *f: cpnb.cp_norm(lam, f), inputs)
    assert gradcheck(lambda *f: cpnb.component_gram(f), inputs[1:])
    assert gradcheck(lambda *f: tuple(cpnb.normalize_columns(f)[0]), inputs[1:])
    assert gradcheck(lambda *f: cpnb.khatri_rao(f), inputs[1:])
    kernel = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda k: cpnb.relative_error(k, torch.ones_like(k)), [kernel])


A, B = torch.ones(3, 2), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: cpnb.cp_to_kernel(torch.ones(2), [A, torch.ones(4, 5)]),
            ValueError,
            r"factors\[1\] has 5 columns, expected rank 2 \(from lam\). "
            r"Rebuild it with shape \(4, 2\)",
        ),
        (
            lambda: cpnb.cp_to_kernel(torch.ones(2, 1), [A, B]),
            ValueError,
            r"lam has shape \(2, 1\), expected \(rank,\)",
        ),
        (
            lambda: cpnb.cp_to_kernel(torch.ones(2), []),
            ValueError,
            "factors is empty",
        ),
        (
            lambda: cpnb.cp_to_kernel(torch.ones(2), [A, B[0]]),
            ValueError,
            r"factors\[1\] has shape \(2,\), expected two dimensions",
        ),
        (
            lambda: cpnb.cp_to_kernel(torch.ones(2), [A.int(), B]),
            TypeError,
            r"factors\[0\] has dtype torch.int32, expected a floating-point dtype",
        ),
        (
            lambda: cpnb.cp_norm([1.0, 2.0], [A, B]),
            TypeError,
            "lam is a list, expected a torch.Tensor",
        ),
        (
            lambda: cpnb.component_gram([A, torch.ones(4, 5)]),
            ValueError,
            r"factors\[1\] has 5 columns, expected rank 2 \(from factors\[0\]\)",
        ),
        (
            lambda: cpnb.cp_norm(torch.ones(2), [A.double(), B]),
            TypeError,
            r"factors\[0\] has dtype torch.float64, expected torch.float32 as lam",
        ),
        (
            lambda: cpnb.relative_error(A.int(), A.int()),
            TypeError,
            "kernel has dtype torch.int32, expected a floating-point",
        ),
        (lambda: cpnb.khatri_rao([]), ValueError, "matrices is empty"),
        (
            lambda: cpnb.khatri_rao([A, torch.ones(4, 5)]),
            ValueError,
            r"matrices have \[2, 5\] columns",
        ),
        (
            lambda: cpnb.relative_error(A, B),
            ValueError,
            r"approximation has shape \(4, 2\), expected \(3, 2\)",
        ),
        (lambda: cpnb.break_even_rank((3, 0)), ValueError, r"shape is \(3, 0\)"),
        (
            lambda: cpnb.resolve_rank(0, (3, 3)),
            ValueError,
            "rank is 0, expected an int",
        ),
        (lambda: cpnb.resolve_rank(-2, (3, 3)), ValueError, "rank is -2"),
        (
            lambda: cpnb.resolve_rank(1.5, (3, 3)),
            ValueError,
            "rank is 1.5.*pass an int",
        ),
        (lambda: cpnb.resolve_rank(float("nan"), (3, 3)), ValueError, "rank is nan"),
        (lambda: cpnb.resolve_rank("all", (3, 3)), ValueError, "rank is 'all'"),
        (lambda: cpnb.resolve_rank(True, (3, 3)), TypeError, "rank is True"),
        (lambda: cpnb.resolve_rank(None, (3, 3)), TypeError, "rank is None"),
    ],
)
def test_core_refuses_bad_input_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call()
