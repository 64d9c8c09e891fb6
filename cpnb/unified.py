"""Unified initialisation of tensorial convolutions, for any tensor format.

A format is a tensor network: vertices (weights) that share edges. Kernel edges are in
upper case (``O`` and ``P`` make up the output channels, ``I`` and ``J`` the input
channels, ``H``, ``W`` and ``K`` the window), rank edges in lower case.

Source: Pan et al. 2022, arXiv:2205.15307. The variance rule is re-derived from its
abstract and agrees with Monte Carlo for every format here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_OUT, _IN, _WINDOW = "OP", "IJ", "HWK"


@dataclass(frozen=True)
class TensorFormat:
    """A tensor network that stands for a convolution kernel.

    Attributes:
        name: Name in `FORMATS`.
        vertices: The edges of each weight, in the order of its axes.
    """

    name: str
    vertices: tuple[str, ...]

    @property
    def ranks(self) -> str:
        """Rank edges, in the order in which ``ranks`` are given."""
        return "".join(
            dict.fromkeys(e for v in self.vertices for e in v if e.islower())
        )

    @property
    def equation(self) -> str:
        """Einsum equation of the kernel, its modes ordered out, in, window."""
        edges = "".join(dict.fromkeys("".join(self.vertices)))
        kernel = "".join(e for kind in (_OUT, _IN, _WINDOW) for e in kind if e in edges)
        return f"{','.join(self.vertices)}->{kernel}"

    def rebuild(self, weights: Sequence[Tensor]) -> Tensor:
        """Contract the network. Shape: one axis per kernel edge."""
        return torch.einsum(self.equation, *weights)


FORMATS: Mapping[str, TensorFormat] = MappingProxyType(
    {
        name: TensorFormat(name, tuple(vertices.split()))
        for name, vertices in {
            "cp": "Or Ir Hr Wr",
            "cp3": "Or Ir Kr",
            "tucker2": "Oa Ib abK",
            "tucker": "Oa Ib Hc Wd abcd",
            "tt": "Oa aKb bI",
            "tr": "aOb bPc cId dJe eKa",
            "btd": "nOa nIb nabK",
        }.items()
    }
)


def unified_variance(
    format: str,
    shape: Sequence[int],
    ranks: int | Sequence[int],
    *,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: Literal["relu", "linear"] = "relu",
    groups: int = 1,
) -> float:
    """Variance of every weight entry that gives the kernel Kaiming's variance.

    ``σ² = (φ · Π e)^(−1/n)`` over the n vertices, where Π e runs over every contracted
    edge once: input channels, window and ranks. For fan-out the same rule is applied to
    the equivalent convolution of the backward pass, which `reproducing_transformation`
    gives.

    Args:
        format: A name in `FORMATS`: cp (four factors), cp3 (three, one for the whole
            window), tucker2, tucker, tt (tensor train), tr (tensor ring of five cores,
            two for each channel mode) or btd (block term: Tucker-2 blocks).
        shape: Kernel shape ``(out, in / groups, *kernel_size)``.
        ranks: One per rank edge, in the order of ``FORMATS[format].ranks``; an int for
            all of them.
        mode: ``"fan_in"`` keeps the variance of activations, ``"fan_out"`` that of
            gradients.
        nonlinearity: ``"relu"`` (φ = ½) or ``"linear"`` (φ = 1).
        groups: Groups of the convolution.

    Returns:
        σ².

    Raises:
        ValueError: If a name is unknown or a number out of range.

    >>> round(unified_variance("cp", (64, 32, 3, 3), 16), 6)
    0.144338
    """
    ranks = _check(format, shape, ranks, mode, nonlinearity, groups)
    if mode == "fan_out":
        shape = reproducing_transformation(shape, groups=groups)
    phi = 0.5 if nonlinearity == "relu" else 1.0
    contracted = math.prod(shape[1:]) * math.prod(ranks)
    return (phi * contracted) ** (-1 / len(FORMATS[format].vertices))


def reproducing_transformation(
    shape: Sequence[int], *, groups: int = 1
) -> tuple[int, ...]:
    """Kernel shape of the convolution that the backward pass is equivalent to.

    Gradients flow through the same network read the other way round: output and input
    channels change places (within each group), the window is flipped.
    `backward_as_convolution` carries it out.

    Args:
        shape: ``(out, in / groups, *kernel_size)``.
        groups: Groups of the convolution.

    Returns:
        ``(in, out / groups, *kernel_size)``.

    >>> reproducing_transformation((64, 16, 3, 3), groups=2)
    (32, 32, 3, 3)
    """
    out, channels, *window = shape
    return (channels * groups, out // groups, *window)


def reproduced_weights(format: str, weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights of the network of the equivalent backward convolution: windows flipped.

    Args:
        format: A name in `FORMATS`.
        weights: One per vertex; a merged window edge ``K`` must be given as two axes'
            product in row-major order, which flipping reverses as a whole.

    Returns:
        The weights with every window axis reversed.
    """
    return [
        weight.flip([axis for axis, edge in enumerate(edges) if edge in _WINDOW])
        for edges, weight in zip(FORMATS[format].vertices, weights, strict=True)
    ]


def backward_as_convolution(
    gradient: Tensor,
    kernel: Tensor,
    *,
    input_size: Sequence[int],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """Backward pass of a 2-D convolution as a convolution of the output's gradient.

    The gradient is spread out by the stride, padded, and convolved (stride 1, same
    dilation) with the kernel of the transformed network.

    Args:
        gradient: Gradient of the output. Shape ``(batch, out, height, width)``.
        kernel: Kernel of the *transformed* network, window already flipped. Shape
            ``(in, out, kernel_height, kernel_width)``.
        input_size: Height and width of the forward input.
        stride: Of the forward convolution.
        padding: Of the forward convolution.
        dilation: Of the forward convolution.

    Returns:
        Gradient of the input. Shape ``(batch, in, *input_size)``.
    """
    batch, out, *size = gradient.shape
    spread = [(n - 1) * stride + 1 for n in size]
    spaced = gradient.new_zeros(batch, out, *spread)
    spaced[..., ::stride, ::stride] = gradient
    margins = []
    for wide, reach, window in zip(spread, input_size, kernel.shape[2:], strict=True):
        before = dilation * (window - 1) - padding
        # What the forward pass left over at the far end gets gradient zero.
        after = reach + dilation * (window - 1) - before - wide
        margins = [before, after, *margins]
    return F.conv2d(F.pad(spaced, margins), kernel, dilation=dilation)


def _check(
    format: str,
    shape: Sequence[int],
    ranks: int | Sequence[int],
    mode: str,
    nonlinearity: str,
    groups: int,
) -> tuple[int, ...]:
    for name, value, known in (
        ("format", format, tuple(FORMATS)),
        ("mode", mode, ("fan_in", "fan_out")),
        ("nonlinearity", nonlinearity, ("relu", "linear")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}.")
    edges = FORMATS[format].ranks
    ranks = (ranks,) * len(edges) if isinstance(ranks, int) else tuple(ranks)
    if len(ranks) != len(edges) or min(ranks) < 1:
        raise ValueError(
            f"ranks is {ranks}, expected {len(edges)} ints >= 1 for format {format!r}, "
            f"one per rank edge of {FORMATS[format].vertices}."
        )
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"shape is {tuple(shape)}, expected (out, in / groups, *kernel_size), "
            "every size >= 1."
        )
    if groups < 1 or shape[0] % groups:
        raise ValueError(
            f"groups is {groups}, expected a divisor of the {shape[0]} output channels."
        )
    return ranks
