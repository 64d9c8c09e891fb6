"""The 2-norm of circular convolutions against the matrix of the whole operator."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cpnb
from cpnb import circular_lipschitz, gram_lipschitz

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def draw(*shape, seed=0):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def circular(kernel, images):
    """out[o, p] = Σ kernel[o, i, q] · images[i, (p + q) mod size], one by one."""
    out = torch.zeros(len(kernel), *images.shape[1:], dtype=kernel.dtype)
    for place in itertools.product(*map(range, images.shape[1:])):
        for step in itertools.product(*map(range, kernel.shape[2:])):
            at = [
                (p + q) % n
                for p, q, n in zip(place, step, images.shape[1:], strict=True)
            ]
            out[(slice(None), *place)] += (
                kernel[(slice(None), slice(None), *step)] @ images[(slice(None), *at)]
            )
    return out


def matrix_of(operator, shape):
    """The matrix of a linear map on tensors of this shape, column by column."""
    count = torch.Size(shape).numel()
    units = torch.eye(count, dtype=torch.float64).view(count, *shape)
    return torch.stack([operator(unit).flatten() for unit in units], 1)


CASES = [
    ((3, 2, 3), (5,)),
    ((2, 3, 3, 2), (4, 3)),
    ((2, 2, 3, 3), (3, 3)),
    ((2, 1, 2, 2, 1), (3, 2, 2)),
]


@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
def test_exact_value_is_the_norm_of_the_whole_matrix(shape, size):
    kernel = draw(*shape)
    matrix = matrix_of(lambda x: circular(kernel, x), (shape[1], *size))
    expected = torch.linalg.matrix_norm(matrix, 2)
    torch.testing.assert_close(circular_lipschitz(kernel, size), expected)


@pytest.mark.parametrize(
    "shape",
    [(16, 8, 3, 3), (8, 16, 3, 3), (32, 32, 5, 5), (6, 4, 3), (5, 4, 3, 3, 3)],
    ids=str,
)
def test_bound_is_above_the_exact_value_and_closes_as_proved(shape):
    kernel, size = draw(*shape), 8
    exact = circular_lipschitz(kernel, size).item()
    last = float("inf")
    for count in range(8):
        bound = gram_lipschitz(kernel, size, iterations=count).item()
        slack = min(shape[:2]) ** (0.5 / 2**count)
        assert exact <= bound * (1 + 1e-12)
        assert bound <= exact * slack * (1 + 1e-12)
        assert bound <= last * (1 + 1e-12)
        last = bound
    six = gram_lipschitz(kernel, size).item()
    assert six <= 1.03 * exact  # 32 ** (1/128) = 1.027


@pytest.mark.parametrize("power", [-30, 0, 30])
def test_bound_neither_overflows_nor_vanishes(power):
    kernel = draw(6, 5, 3, 3).float()
    scaled = gram_lipschitz(kernel * 2.0**power, 6, iterations=10)
    assert scaled.item() == pytest.approx(
        2.0**power * gram_lipschitz(kernel, 6, iterations=10).item(), rel=1e-4
    )


def test_zero_kernel_has_norm_and_bound_zero():
    kernel = torch.zeros(2, 3, 3, 3, requires_grad=True)
    assert circular_lipschitz(kernel, 5) == 0
    bound = gram_lipschitz(kernel, 5)
    bound.backward()
    assert bound == 0 and kernel.grad.isfinite().all()


def test_groups_bound_the_block_diagonal_operator():
    conv = nn.Conv2d(
        4, 6, 3, padding=1, padding_mode="circular", groups=2, bias=False
    ).double()
    matrix = matrix_of(lambda x: conv(x[None])[0].detach(), (4, 4, 4))
    expected = torch.linalg.matrix_norm(matrix, 2).item()
    assert circular_lipschitz(conv, 4).item() == pytest.approx(expected)
    bound = gram_lipschitz(conv, 4).item()
    assert expected * (1 - 1e-12) <= bound <= 1.02 * expected


def test_layers_count_by_their_kernels():
    layer = cpnb.CPConv2d(3, 4, 3, rank=5).double()
    for function in (circular_lipschitz, gram_lipschitz):
        torch.testing.assert_close(function(layer, 6), function(layer.weight, 6))
    half = nn.Conv2d(2, 2, 3).bfloat16()
    assert circular_lipschitz(half, 4).dtype == torch.float32


def test_a_larger_torus_bounds_the_zero_padded_convolution():
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    matrix = matrix_of(lambda x: conv(x[None])[0].detach(), (2, 5, 5))
    norm = torch.linalg.matrix_norm(matrix, 2)
    assert norm <= circular_lipschitz(conv, 5 + 3 - 1)


def test_bound_passes_gradcheck_and_reaches_every_factor():
    kernel = draw(3, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: gram_lipschitz(k, 5), kernel)
    layer = cpnb.CPConv2d(3, 4, 3, rank=5)
    gram_lipschitz(layer, 6).backward()
    for parameter in (layer.scale, layer.lam, *layer.factors):
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("function", [circular_lipschitz, gram_lipschitz])
@pytest.mark.parametrize(
    ("kernel", "size", "error", "match"),
    [
        (nn.Conv2d(2, 2, 3, stride=2), 6, ValueError, r"has stride \(2, 2\)"),
        (nn.Conv2d(2, 2, 3, dilation=2), 6, ValueError, r"has dilation \(2, 2\)"),
        (torch.ones(2, 2, 3, 3), 2, ValueError, "size is 2, expected 2 numbers"),
        (
            torch.ones(2, 2, 3, 3),
            (4, 4, 4),
            ValueError,
            r"at least the window \(3, 3\)",
        ),
        (torch.ones(2, 2), 4, ValueError, "one to three window modes"),
        (nn.Linear(2, 2), 4, ValueError, r"matrix_norm"),
        (torch.full((1, 1, 1), torch.nan), 4, ValueError, "1 NaN or infinite"),
        (nn.ReLU(), 4, TypeError, "kernel is a NoneType"),
        ([1.0], 4, TypeError, "kernel is a list"),
    ],
)
def test_bad_arguments_are_refused(function, kernel, size, error, match):
    with pytest.raises(error, match=match):
        function(kernel, size)


def test_negative_iterations_are_refused():
    with pytest.raises(ValueError, match="iterations is -1"):
        gram_lipschitz(torch.ones(1, 1, 3, 3), 4, iterations=-1)
