"""A textbook ALS fit at one rank and ridge: its numbers, in words as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpnb.als import als
from cpnb.cp import component_gram, khatri_rao
from cpnb.diagnostics import ENERGY_LIMIT, Degeneracy


@dataclass(frozen=True)
class DegeneracyPoint:
    """A textbook ALS fit at one rank and ridge.

    Attributes:
        rank: Number of components.
        ridge: Absolute weight of the factor norms.
        relative_error: ``‖W − Ŵ‖_F / ‖W‖_F``.
        degeneracy: What the meter says about the components.
        cut_errors: Relative error after keeping the 1, 2, …, rank largest components.
    """

    rank: int
    ridge: float
    relative_error: float
    degeneracy: Degeneracy
    cut_errors: list[float]


def degeneracy_point(kernel: Tensor, rank: int, ridge: float) -> DegeneracyPoint:
    """Fit by textbook ALS, 50 sweeps from one random start, and measure the result.

    Args:
        kernel: Any order ≥ 3.
        rank: Number of components.
        ridge: As `cpnb.als` takes it.

    Returns:
        The point; the same arguments give the same one.

    Raises:
        ArithmeticError: If the fit ends in NaN or infinity.
    """
    generator = torch.Generator().manual_seed(0)
    kernel = kernel.detach().cpu().double()
    fit = als(
        kernel,
        rank,
        ridge=ridge,
        damping=0,
        extrapolate=False,
        start="random",
        generator=generator,
    )
    # ‖W − Ŵ_k‖² = ‖W‖² − 2 Σ_{r≤k} ⟨W, term_r⟩ + ‖Ŵ_k‖², for all k at once.
    terms = fit.lam * khatri_rao(fit.factors)
    inner = (terms.T @ kernel.flatten()).cumsum(0)
    overlap = fit.lam[:, None] * component_gram(fit.factors) * fit.lam
    squares = kernel.square().sum() - 2 * inner + overlap.cumsum(0).cumsum(1).diagonal()
    norm = torch.where(kernel.any(), kernel.norm(), 1)
    cut_errors = (squares.clamp_min(0).sqrt() / norm).tolist()
    return DegeneracyPoint(
        rank, ridge, fit.relative_error, fit.info.degeneracy, cut_errors
    )


def status_lines(point: DegeneracyPoint) -> list[str]:
    """The numbers in words, not escaped for HTML."""
    meter, half = point.degeneracy, max(1, point.rank // 2)
    verdict = "degenerate" if meter.degenerate else "not degenerate"
    return [
        f"Rank {point.rank}, ridge {point.ridge:.2g}: relative error "
        f"{point.relative_error:.3f}.",
        f"Largest λ/‖W‖ {meter.lam_max:.2f}; energy Σλ²/‖W‖² {meter.energy:.2f} "
        f"({verdict}, the limit is {ENERGY_LIMIT:g}); worst cancellation "
        f"{meter.worst_cancellation:.3f}.",
        f"Half of the components, the {half} of largest λ: relative error "
        f"{point.cut_errors[half - 1]:.3f}.",
    ]
