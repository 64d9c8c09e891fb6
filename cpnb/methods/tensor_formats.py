"""Unified initialisation of tensorial convolutions, for any tensor format.

Source: Pan et al. 2022, arXiv:2205.15307; the variance is re-derived from the abstract.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cpnb.initializers import PHI


@dataclass(frozen=True)
class TensorFormat:
    """A tensor network, weights that share edges, that stands for a kernel.

    Kernel edges are in upper case: ``OP`` make up the output channels, ``IJ`` the input
    channels, ``HWK`` the window. Rank edges are in lower case.

    Attributes:
        vertices: The edges of each weight, in the order of its axes.
    """

    vertices: tuple[str, ...]

    @property
    def ranks(self) -> str:
        """Rank edges, in the order in which ``ranks`` are given."""
        edges = dict.fromkeys("".join(self.vertices))
        return "".join(edge for edge in edges if edge.islower())

    @property
    def equation(self) -> str:
        """Einsum equation of the kernel, its modes ordered out, in, window."""
        kernel = "".join(e for e in "OPIJHWK" if e in "".join(self.vertices))
        return f"{','.join(self.vertices)}->{kernel}"

    def rebuild(self, weights: Sequence[Tensor]) -> Tensor:
        """Contract the network. Shape: one axis per kernel edge."""
        return torch.einsum(self.equation, *weights)


FORMATS = {
    "cp": TensorFormat(("Or", "Ir", "Hr", "Wr")),
    "cp3": TensorFormat(("Or", "Ir", "Kr")),
    "tucker2": TensorFormat(("Oa", "Ib", "abK")),
    "tucker": TensorFormat(("Oa", "Ib", "Hc", "Wd", "abcd")),
    "tt": TensorFormat(("Oa", "aKb", "bI")),
    "tr": TensorFormat(("aOb", "bPc", "cId", "dJe", "eKa")),
    "btd": TensorFormat(("nOa", "nIb", "nabK")),
}


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
    edge once: input channels, window and ranks. Fan-out is the fan-in of the backward
    pass, which the paper's Reproducing Transformation makes a convolution, too.

    Args:
        format: A name in `FORMATS`: cp (four factors), cp3 (three, one for the whole
            window), tucker2, tucker, tt (tensor train), tr (tensor ring of five cores,
            two for each channel mode) or btd (block term: Tucker-2 blocks).
        shape: Kernel shape ``(out, in / groups, *kernel_size)``.
        ranks: One per rank edge, in the order of ``FORMATS[format].ranks``; an int for
            all of them.
        mode: Whose variance is kept: activations (fan-in) or gradients (fan-out).
        nonlinearity: ``"relu"`` (φ = ½) or ``"linear"`` (φ = 1).
        groups: Groups of the convolution.

    Returns:
        σ².

    >>> round(unified_variance("cp", (64, 32, 3, 3), 16), 6)
    0.144338
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {tuple(FORMATS)}.")
    edges = FORMATS[format].ranks
    ranks = (ranks,) * len(edges) if isinstance(ranks, int) else tuple(ranks)
    if len(ranks) != len(edges):
        raise ValueError(
            f"ranks is {ranks}, expected {len(edges)} ints for format {format!r}, one "
            f"per rank edge of {FORMATS[format].vertices}."
        )
    # The Reproducing Transformation: the backward pass is a convolution in which
    # outputs and inputs, within each group, change places.
    channels = {"fan_in": shape[1], "fan_out": shape[0] // groups}[mode]
    contracted = channels * math.prod(shape[2:]) * math.prod(ranks)
    n = len(FORMATS[format].vertices)
    return (PHI[nonlinearity] * contracted) ** (-1 / n)
