"""Kernels as matrices: unfolded by axis, split in two, at a rank that makes sense."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpnb.initializers import dense_start
from cpnb.ranks import KernelRule, Rank, resolve_rank

Factors = tuple[Tensor, Tensor]


def unfolded_shape(shape: Sequence[int], groups: int = 1) -> tuple[int, int]:
    """Rows and columns of each group's matrix of `unfold`."""
    out, channels, height, width = (*shape, 1, 1)[:4]
    return out // groups * height, channels * width


def unfold(kernel: Tensor, groups: int = 1) -> Tensor:
    """Write a kernel as one matrix per group, rows (out, height), columns (in, width).

    The rank of the matrix is the number of channels between a ``(1, width)`` and a
    ``(height, 1)`` convolution that make up the kernel. A linear weight is its own
    unfolding.

    Args:
        kernel: Shape ``(out, in / groups, height, width)`` or ``(out, in)``.
        groups: Groups of the convolution.

    Returns:
        Shape ``(groups, out / groups · height, in / groups · width)``.

    Source: Khodak et al. 2021, arXiv:2105.01029. Its released code reshapes without
    moving the axes, which mixes them up.

    >>> unfold(torch.zeros(8, 3, 5, 7)).shape
    torch.Size([1, 40, 21])
    """
    out, channels, height, width = (*kernel.shape, 1, 1)[:4]
    tall = kernel.reshape(groups, out // groups, channels, height, width)
    rows, columns = unfolded_shape(kernel.shape, groups)
    return tall.transpose(2, 3).reshape(groups, rows, columns)


def fold(matrices: Tensor, shape: Sequence[int]) -> Tensor:
    """The kernel of this shape whose `unfold` the matrices are."""
    out, channels, height, width = (*shape, 1, 1)[:4]
    groups = len(matrices)
    tall = matrices.reshape(groups, out // groups, height, channels, width)
    return tall.transpose(2, 3).reshape(*shape)


def spectral_factors(matrices: Tensor, rank: int) -> Factors:
    """U and V of the best ``U Vᵀ`` of a rank, half of each singular value in either.

    Args:
        matrices: Shape ``(..., rows, columns)``.
        rank: At most ``min(rows, columns)``, where the product is exact.

    Returns:
        U of shape ``(..., rows, rank)`` and V of shape ``(..., columns, rank)``, both
        in float64.

    Source: Khodak et al. 2021, arXiv:2105.01029 (spectral initialisation).
    """
    left, values, right = torch.linalg.svd(
        matrices.detach().double(), full_matrices=False
    )
    root = values[..., None, :rank].sqrt()
    return left[..., :rank] * root, right.mT[..., :rank] * root


def spectral(
    shape: Sequence[int],
    rank: int,
    *,
    groups: int = 1,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Factors:
    """Spectral initialisation: `spectral_factors` of a dense weight.

    Args:
        shape: Kernel shape ``(out, in / groups, *kernel_size)``.
        rank: Columns of U and V.
        groups: Groups of the convolution.
        weight: The kernel; torch's default start for the shape if None.
        generator: Source of that start; torch's default one if None.
        like: Decides device and dtype.

    Returns:
        U of shape ``(groups, rows, rank)`` and V of shape ``(groups, columns, rank)``.
    """
    if weight is None:
        weight = dense_start(shape, generator, like.device, like.dtype)
    left, right = spectral_factors(unfold(weight, groups), rank)
    return left.to(like), right.to(like)


def kaiming(
    shape: Sequence[int],
    rank: int,
    *,
    groups: int = 1,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Factors:
    """Kaiming's normal start on each matrix by itself: the usual default, and too wide.

    U has variance 2/rank and V has 2/columns, so the kernel has
    ``4 / (in / groups · width)``: ``2 · height`` times Kaiming's variance for the dense
    layer, 6 times for a 3×3 kernel. One gain of 2 is that of a ReLU that is not there,
    and U does not see that its window of ``height`` adds up as well.

    Args: see `spectral`; ``weight`` is ignored. Source: the released code of Khodak et
    al. 2021, arXiv:2105.01029, whose baseline this is.
    """
    rows, columns = unfolded_shape(shape, groups)
    device = generator.device if generator is not None else like.device
    both = []
    for size, fan in ((rows, rank), (columns, columns)):
        empty = torch.empty(groups, size, rank, device=device, dtype=torch.float64)
        draw = empty.normal_(0, math.sqrt(2 / fan), generator=generator)
        both.append(draw.to(like))
    return both[0], both[1]


MATRIX_INITIALIZERS: dict[str, Callable[..., Factors]] = {
    "spectral": spectral,
    "kaiming": kaiming,
}


def resolve_matrix_init(init: str | Callable[..., Factors]) -> Callable[..., Factors]:
    """Look an initialiser up by name; a callable is passed through.

    Raises:
        ValueError: If the name is unknown.
    """
    if callable(init):
        return init
    if init not in MATRIX_INITIALIZERS:
        raise ValueError(
            f"init is {init!r}, expected one of {sorted(MATRIX_INITIALIZERS)} or a "
            "function with the signature of cpnb.matrices.spectral."
        )
    return MATRIX_INITIALIZERS[init]


def matrix_break_even(rows: int, columns: int, *, middle: bool = False) -> int:
    """Smallest rank at which the factors hold at least as many numbers as the matrix.

    >>> matrix_break_even(384, 192), matrix_break_even(384, 192, middle=True)
    (128, 108)
    """
    both, whole = rows + columns, rows * columns
    if not middle:
        return math.ceil(whole / both)
    # rank · (both + rank) ≥ whole
    rank = (math.isqrt(both**2 + 4 * whole) - both) // 2
    return rank if rank * (both + rank) >= whole else rank + 1


def matrix_rank(
    rank: Rank,
    shape: tuple[int, int],
    matrices: Tensor | None = None,
    *,
    middle: bool = False,
) -> int:
    """Turn a rank as the user says it into a number of columns; it may be too large.

    Args:
        rank: As in `resolve_rank`; fractions are of `matrix_break_even`.
        shape: Rows and columns.
        matrices: For a rule to look at; the largest rank it finds counts. Shape
            ``(groups, rows, columns)``.
        middle: Whether there is a square matrix between the factors.

    Returns:
        At least 1. An int is passed on as it is.

    Raises:
        TypeError: If ``rank`` is of the wrong type.
        ValueError: If it is out of range, or a rule without matrices.
    """
    if isinstance(rank, KernelRule) and matrices is not None:
        return max(rank.count(matrix) for matrix in matrices)
    count = resolve_rank(rank, shape)  # refuses what is no rank
    if isinstance(rank, float | str):
        share = rank if isinstance(rank, float) else 1.0
        return max(1, round(share * matrix_break_even(*shape, middle=middle)))
    return count
