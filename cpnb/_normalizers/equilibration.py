"""Rows or columns of equal norm: the scales that make them so, dense or in CP form."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cpnb._normalizers.base import inverse_root

# Rows come last, so that their norms are exact where both are scaled in turn.
SWEEPS = {"row": "r", "column": "c", "row-column": "crcrcr"}


def equilibrium(
    mode: str,
    rows: Tensor,
    columns: Tensor,
    row_squares: Callable[[Tensor], Tensor],
    column_squares: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Scales of rows and columns that make the norms of either, or both, equal.

    Rows get norm 1; columns alone ``√(rows / columns)``, so that the mean square of the
    row norms is 1 in every mode. Zero rows and columns get 0.

    Args:
        mode: A key of `SWEEPS`.
        rows: Ones. Shape ``(..., rows)``.
        columns: Ones. Shape ``(..., columns)``.
        row_squares: Maps squared scales of the columns to the squared row norms.
        column_squares: Maps squared scales of the rows to the squared column norms.

    Returns:
        The scales, of the shapes of ``rows`` and ``columns``.
    """
    height, width = rows.shape[-1], columns.shape[-1]
    for side in SWEEPS[mode]:
        if side == "r":
            rows = inverse_root(row_squares(columns.square()))
        else:
            columns = inverse_root(column_squares(rows.square()))
    if mode == "column":
        columns = columns * math.sqrt(height / width)
    return rows, columns


def equilibrate(matrix: Tensor, mode: str, detach: bool) -> Tensor:
    """Scale a matrix as `equilibrium` says.

    Args:
        matrix: Shape ``(groups, rows, columns)``.
        mode: ``"row"``, ``"column"`` or ``"row-column"``.
        detach: Whether the gradient takes the scales as constants.

    Returns:
        The same shape.
    """
    squares = (matrix.detach() if detach else matrix).square()
    rows, columns = equilibrium(
        mode,
        torch.ones_like(squares[..., 0]),
        torch.ones_like(squares[..., 0, :]),
        lambda scales: (squares @ scales.unsqueeze(-1)).squeeze(-1),
        lambda scales: (scales.unsqueeze(-2) @ squares).squeeze(-2),
    )
    if mode != "column":
        matrix = matrix * rows.unsqueeze(-1)
    return matrix if mode == "row" else matrix * columns.unsqueeze(-2)


def cp_equilibrium(
    lam: Tensor, factors: list[Tensor], mode: str
) -> tuple[Tensor, Tensor]:
    """`equilibrium` of a CP kernel by R×R Gram matrices, without building it.

    Rows are those of the unfolding, ``‖W_o‖² = a_o Λ (BᵀB * CᵀC * DᵀD) Λ a_oᵀ``. All
    columns of one input channel share their scale, as single ones would raise the rank.

    Args:
        lam: Component weights. Shape ``(rank,)``.
        factors: One per mode, also of size 1. Shapes ``(size_n, rank)``.
        mode: ``"row"``, ``"column"`` or ``"row-column"``.

    Returns:
        Scales of the rows of the first and of the second factor.
    """
    output, source, *spatial = factors
    window = torch.outer(lam, lam)
    for factor in spatial:
        window = window * (factor.T @ factor)

    def squares(factor: Tensor, other: Tensor, scales: Tensor) -> Tensor:
        gram = window * (other.T @ (scales[:, None] * other))
        return ((factor @ gram) * factor).sum(1)

    return equilibrium(
        mode,
        torch.ones_like(output[:, 0]),
        torch.ones_like(source[:, 0]),
        lambda scales: squares(output, source, scales),
        lambda scales: squares(source, output, scales),
    )
