"""Unified initialisation: Monte Carlo for every format, autograd for the backward."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import cpnb
from cpnb.unified import (
    FORMATS,
    backward_as_convolution,
    reproduced_weights,
    reproducing_transformation,
)

OUT, IN, WINDOW = 8, 6, (3, 3)
SIZES = {"H": 3, "W": 3, "K": 9}
RANKS = {
    "cp": (5,),
    "cp3": (5,),
    "tucker2": (4, 3),
    "tucker": (4, 3, 2, 2),
    "tt": (4, 3),
    "tr": (2, 3, 2, 2, 3),
    "btd": (3, 2, 4),
}


def draw(name, ranks, std, generator, out=OUT, channels=IN, dtype=torch.float32):
    """Weights of a network; a ring splits out into 4 x (out/4), in into 2 x (in/2)."""
    ring = name == "tr"
    kernel = {"O": 4, "P": out // 4, "I": 2, "J": channels // 2} if ring else {}
    sizes = SIZES | {"O": out, "I": channels} | kernel
    sizes |= dict(zip(FORMATS[name].ranks, ranks, strict=True))
    return [
        torch.randn([sizes[e] for e in edges], generator=generator, dtype=dtype) * std
        for edges in FORMATS[name].vertices
    ]


def mean_square(name, ranks, variance, draws=400):
    """Mean of the kernel's squared entries over draws, and its standard error."""
    generator = torch.Generator().manual_seed(0)
    std = math.sqrt(variance)
    squares = torch.stack(
        [
            FORMATS[name].rebuild(draw(name, ranks, std, generator)).square().mean()
            for _ in range(draws)
        ]
    )
    return squares.mean().item(), (squares.std() / draws**0.5).item()


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("nonlinearity", ["relu", "linear"])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_unified_variance_gives_every_format_kaimings_variance(
    name, nonlinearity, mode
):
    for ranks in (RANKS[name], tuple(2 * r for r in RANKS[name])):
        variance = cpnb.unified_variance(
            name, (OUT, IN, *WINDOW), ranks, mode=mode, nonlinearity=nonlinearity
        )
        phi = 0.5 if nonlinearity == "relu" else 1.0
        target = 1 / (phi * (IN if mode == "fan_in" else OUT) * 9)
        found, standard_error = mean_square(name, ranks, variance)
        # Products of Gaussians have heavy tails; the error is the sample's own.
        assert abs(found - target) < 4.5 * standard_error
        assert standard_error < 0.35 * target


@pytest.mark.parametrize(("name", "count"), [("cp", 4), ("cp3", 3), ("tucker2", 3),
                                             ("tucker", 5), ("tt", 3), ("tr", 5),
                                             ("btd", 3)])  # fmt: skip
def test_formats_have_the_vertices_of_the_literature(name, count):
    assert len(FORMATS[name].vertices) == count
    assert cpnb.unified_variance(name, (8, 6, 3, 3), 2) == pytest.approx(
        (0.5 * 6 * 9 * 2 ** len(FORMATS[name].ranks)) ** (-1 / count)
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(9, 11), (10, 8)], ids=str)
def test_backward_as_convolution_equals_autograd(stride, padding, dilation, size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, IN, *size, generator=generator, dtype=torch.float64)
    images.requires_grad_()
    weight = torch.randn(OUT, IN, 3, 2, generator=generator, dtype=torch.float64)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    output = F.conv2d(images, weight, **geometry)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(gradient)
    transformed = weight.flip((2, 3)).transpose(0, 1)
    found = backward_as_convolution(gradient, transformed, input_size=size, **geometry)
    assert_close(found, images.grad)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_reproducing_transformation_of_every_format_equals_autograd(name):
    generator = torch.Generator().manual_seed(0)
    weights = draw(name, RANKS[name], 1.0, generator, dtype=torch.float64)
    weight = FORMATS[name].rebuild(weights).reshape(OUT, IN, *WINDOW)
    images = torch.randn(2, IN, 9, 10, generator=generator, dtype=torch.float64)
    images.requires_grad_()
    geometry = {"stride": 2, "padding": 1, "dilation": 2}
    output = F.conv2d(images, weight, **geometry)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(gradient)
    flipped = FORMATS[name].rebuild(reproduced_weights(name, weights))
    transformed = flipped.reshape(OUT, IN, *WINDOW).transpose(0, 1)
    assert transformed.shape == reproducing_transformation((OUT, IN, *WINDOW))
    found = backward_as_convolution(
        gradient, transformed, input_size=(9, 10), **geometry
    )
    assert_close(found, images.grad)


def test_unified_variance_keeps_gradients_at_their_scale_for_fan_out():
    """The condition itself: E[(∂x)²] = 2 E[(∂y)²] on average over kernels."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(4, OUT, 12, 12, generator=generator)
    shape = (OUT, IN, *WINDOW)
    std = math.sqrt(cpnb.unified_variance("cp", shape, 5, mode="fan_out"))
    ratios = []
    for _ in range(300):
        weights = draw("cp", (5,), std, generator)
        flipped = FORMATS["cp"].rebuild(reproduced_weights("cp", weights))
        images = F.conv2d(gradient, flipped.transpose(0, 1))
        ratios.append(images.square().mean() / gradient.square().mean())
    ratios = torch.stack(ratios)
    assert abs(ratios.mean() - 2) < 4.5 * ratios.std() / len(ratios) ** 0.5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "hosvd"}, "format is 'hosvd', expected one of"),
        ({"mode": "fan"}, "mode is 'fan'"),
        ({"nonlinearity": "gelu"}, "nonlinearity is 'gelu'"),
        ({"ranks": (2, 2)}, r"ranks is \(2, 2\), expected 1 ints >= 1 for format 'cp'"),
        ({"ranks": 0}, r"ranks is \(0,\)"),
        ({"shape": (8,)}, r"shape is \(8,\), expected \(out, in / groups"),
        ({"groups": 3}, "groups is 3, expected a divisor of the 8 output channels"),
    ],
)
def test_unified_variance_refuses_bad_input_with_a_clear_error(options, text):
    arguments = {"format": "cp", "shape": (8, 6, 3, 3), "ranks": 4} | options
    positional = [arguments.pop(name) for name in ("format", "shape", "ranks")]
    with pytest.raises(ValueError, match=text):
        cpnb.unified_variance(*positional, **arguments)
