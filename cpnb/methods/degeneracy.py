"""Components that are huge and cancel: a meter."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from cpnb.cp import check_cp, component_gram, normalize_columns

# Dropping each component with probability ½ changes the kernel by (1 + energy)/4 of
# ‖W‖² on average: above 3 by more than the zero kernel does. For two equal components
# that is a cosine below −2/3.
ENERGY_LIMIT = 3.0


@dataclass(frozen=True)
class Degeneracy:
    """What the components of one CP kernel do to each other.

    A component is ``λ_r`` times a rank-one term of norm 1; ‖W‖ is the norm of their
    sum. If a parameter is not finite, the numbers are NaN.

    Attributes:
        rank: Number of components.
        lam_max: ``max |λ_r| / ‖W‖``; at most 1 for orthogonal components. Saturates
            below 1e8: beyond, float64 cannot tell ‖W‖ from zero.
        energy: ``Σ λ_r² / ‖W‖²``; 1 for orthogonal components, 0 if all λ are.
        worst_cosine: Largest |cosine| between two components, harmless if they add up.
        worst_cancellation: Most negative cosine with the signs of λ counted, at most
            0. Near −1 two components cancel: degeneracy.
        sensitivity: Expected ‖ΔW‖² per unit variance of independent noise on every
            entry of the norm-balanced factors: ``Σ_n size_n · Σ_r |λ_r|^(2 − 2/N)``.
        float32_error: Relative error of the kernel if factors and λ are rounded to
            float32, about ``2⁻²³ · Σ|λ_r| / ‖W‖``.
        finite: Whether every parameter is.
    """

    rank: int
    lam_max: float
    energy: float
    worst_cosine: float
    worst_cancellation: float
    sensitivity: float
    float32_error: float
    finite: bool

    @property
    def degenerate(self) -> bool:
        """Whether energy is above `ENERGY_LIMIT`, or not finite.

        So are close ALS fits of random kernels (energy 6 at break-even), whose order
        and cuts by |λ| mean nothing.
        """
        return not self.energy <= ENERGY_LIMIT

    def to_row(self) -> dict[str, int | float | bool]:
        """The numbers and the flag as a dict, for a DataFrame."""
        return asdict(self) | {"degenerate": self.degenerate}


@torch.no_grad()
def degeneracy(lam: Tensor, factors: Sequence[Tensor]) -> Degeneracy:
    """Measure how much the components of a CP kernel cancel each other.

    Everything comes from their Gram matrix, in float64; the kernel is never built.

    Args:
        lam: Component weights, any sign. Shape ``(rank,)``.
        factors: One matrix per mode, columns of any norm; modes of size 1 may be left
            out. Shapes ``(size_n, rank)``.

    Returns:
        `Degeneracy`. Bad numbers do not raise; they make it ``degenerate``.

    Source: de Silva & Lim 2008, doi:10.1137/06066518X (degeneracy); Phan et al. 2020,
    arXiv:2008.05441 (sensitivity).

    >>> a, b = torch.eye(2).unbind()
    >>> near = a + 0.1 * b  # 10·near∘near∘near − 10·a∘a∘a is almost aab + aba + baa
    >>> pair = torch.stack([near, a], 1)
    >>> meter = degeneracy(torch.tensor([10.0, -10.0]), [pair, pair, pair])
    >>> meter.degenerate, round(meter.worst_cancellation, 3), round(meter.lam_max, 1)
    (True, -0.985, 5.8)
    """
    if len(factors):
        check_cp(lam, factors)
    lam = lam.double()
    modes = [factor.double() for factor in factors]
    # A mode of size 1 is a number per component: it has no direction and no factor.
    for number in (factor for factor in modes if factor.shape[0] == 1):
        lam = lam * number[0]
    modes = [factor for factor in modes if factor.shape[0] > 1]
    gram = lam.new_ones(len(lam), len(lam))
    if modes:
        units, norms = normalize_columns(modes)
        lam = lam * norms.prod(0)
        gram = component_gram(units)
    if not (lam.isfinite().all() and gram.isfinite().all()):
        nan = math.nan
        return Degeneracy(len(lam), nan, nan, nan, nan, nan, nan, False)
    # Without a common factor in λ no square can overflow or vanish.
    peak = lam.abs().max()
    scale = torch.where(peak > 0, peak, 1)
    lam = lam / scale
    weight, signs = lam.abs(), lam.sign()
    total = weight.sum()
    floor = torch.finfo(lam.dtype).eps * total.square()
    norm = torch.where(peak > 0, torch.maximum(lam @ gram @ lam, floor), 1).sqrt()
    # A component of weight 0 points nowhere, so its sign 0 takes it out.
    cosines = (signs[:, None] * gram * signs).fill_diagonal_(0)
    rows = sum(factor.shape[0] for factor in modes)
    power = 2 - 2 / max(len(modes), 1)
    numbers = [
        weight.max() / norm,
        weight.square().sum() / norm.square(),
        cosines.abs().max().clamp(max=1),
        cosines.min().clamp(-1, 0),
        # 0⁰ is 0 here: without weight a component takes no noise to the kernel.
        rows * (weight.pow(power) * (weight > 0)).sum() * scale.pow(power),
        torch.finfo(torch.float32).eps * total / norm,
    ]
    return Degeneracy(*[len(lam), *torch.stack(numbers).tolist(), True])
