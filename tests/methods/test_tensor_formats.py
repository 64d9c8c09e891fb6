"""Unified initialisation: Monte Carlo for every format, autograd for the backward."""

import math

import pytest
import torch
import torch.nn.functional as F
from shared import randn, seeded
from torch.testing import assert_close

from cpnb.methods.tensor_formats import FORMATS, unified_variance

SHAPE = (8, 6, 3, 3)
SIZES = {"O": 8, "I": 6, "H": 3, "W": 3, "K": 9}
# A ring splits out into 4 x (out/4), in into 2 x (in/2).
RING = {"O": 4, "P": 2, "I": 2, "J": 3}
RANKS = {
    "cp": (5,),
    "cp3": (5,),
    "tucker2": (4, 3),
    "tucker": (4, 3, 2, 2),
    "tt": (4, 3),
    "tr": (2, 3, 2, 2, 3),
    "btd": (3, 2, 4),
}


def draw(name, ranks, std, generator, dtype=torch.float32):
    """Weights of a network with Gaussian entries."""
    sizes = SIZES | (RING if name == "tr" else {})
    sizes |= dict(zip(FORMATS[name].ranks, ranks, strict=True))
    shapes = [[sizes[edge] for edge in edges] for edges in FORMATS[name].vertices]
    return [torch.randn(s, generator=generator, dtype=dtype) * std for s in shapes]


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("nonlinearity", ["relu", "linear"])
@pytest.mark.parametrize("name", RANKS)
def test_unified_variance_gives_every_format_kaimings_variance(
    name, nonlinearity, mode
):
    options = {"mode": mode, "nonlinearity": nonlinearity}
    phi = 0.5 if nonlinearity == "relu" else 1.0
    target = 1 / (phi * SHAPE[mode == "fan_in"] * 9)
    for ranks in (RANKS[name], tuple(2 * r for r in RANKS[name])):
        std = math.sqrt(unified_variance(name, SHAPE, ranks, **options))
        generator = seeded()
        draws = [draw(name, ranks, std, generator) for _ in range(300)]
        squares = [FORMATS[name].rebuild(one).square().mean() for one in draws]
        squares = torch.stack(squares)
        # Products of Gaussians have heavy tails; the error is the sample's own.
        standard_error = (squares.std() / len(squares) ** 0.5).item()
        assert abs(squares.mean().item() - target) < 4.5 * standard_error
        assert standard_error < 0.4 * target


@pytest.mark.parametrize("name", RANKS)
def test_reproducing_transformation_gives_the_backward_pass(name):
    """Window edges read backwards and channels swapped: ∂x is a convolution of ∂y."""
    weights = draw(name, RANKS[name], 1.0, seeded(), dtype=torch.float64)
    flipped = [
        weight.flip([axis for axis, edge in enumerate(edges) if edge in "HWK"])
        for edges, weight in zip(FORMATS[name].vertices, weights, strict=True)
    ]
    kernel, turned = (
        FORMATS[name].rebuild(each).reshape(SHAPE) for each in (weights, flipped)
    )
    images = randn(2, 6, 9, 11).requires_grad_()
    output = F.conv2d(images, kernel)
    slope = randn(*output.shape, seed=1)
    output.backward(slope)
    rebuilt = F.conv2d(F.pad(slope, [2] * 4), turned.transpose(0, 1))
    assert_close(rebuilt, images.grad)


def test_unified_variance_has_its_closed_form_for_cp():
    assert unified_variance("cp", SHAPE, 2) == pytest.approx((0.5 * 6 * 9 * 2) ** -0.25)
    # Fan-out of 64 outputs in two groups: 32 of them see an input channel.
    grouped = unified_variance("cp", (64, 16, 3, 3), 4, mode="fan_out", groups=2)
    assert grouped == pytest.approx((0.5 * 32 * 9 * 4) ** -0.25)


def test_unified_variance_refuses_unknown_formats_and_wrong_ranks():
    with pytest.raises(ValueError, match="format is 'hosvd', expected one of"):
        unified_variance("hosvd", SHAPE, 4)
    text = r"ranks is \(2, 2\), expected 1 ints for format 'cp'"
    with pytest.raises(ValueError, match=text):
        unified_variance("cp", SHAPE, (2, 2))
