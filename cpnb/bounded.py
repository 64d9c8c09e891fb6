"""CP decomposition with components no larger than a given error needs."""

import time

import torch
from torch import Tensor

from cpnb.als import als, check_fit_options
from cpnb.cp import component_gram, khatri_rao, normalize_columns
from cpnb.decomposition import CPResult, decomposed
from cpnb.ranks import Rank


def bounded_als(
    kernel: Tensor,
    rank: Rank,
    *,
    max_error: float | None = None,
    sweeps: int = 100,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
) -> CPResult:
    """Smallest components (least Σλ²) whose error stays within a bound.

    Starts from `als`. Each update takes, among all factors of a mode that keep the
    error within the bound, the one of least norm while the other modes have unit
    columns; if none does, the one of least error. Both come from one eigendecomposition
    of an ``R × R`` matrix.

    Args:
        kernel: Any order ≥ 2.
        rank: Number of components, or any rank `cpnb.resolve_rank` takes.
        max_error: Bound on the relative error; None takes what `als` reaches.
        sweeps: At most this many passes over all modes.
        tol: Stop when a sweep lowers Σλ² by less than this fraction.
        generator: Source of the random starts; torch's default one if None.

    Returns:
        `CPResult`; its error exceeds ``max_error`` only if no update could reach it.

    Raises:
        TypeError: If ``kernel`` is not a floating-point tensor or ``rank`` no rank.
        ValueError: If ``kernel`` is zero, a vector or not finite, or an option is out
            of range.

    Source: Phan et al. 2020, arXiv:2008.05441 (error-preserving correction); the update
    is re-derived as a ridge whose weight meets the bound.
    """
    rank = check_fit_options(kernel, rank, generator, sweeps=sweeps, tol=tol)
    if max_error is not None and not 0 <= max_error < 1:
        raise ValueError(
            f"max_error is {max_error}, expected a relative error in [0, 1)."
        )
    began = time.perf_counter()
    first = als(kernel, rank, generator=generator)
    norm = kernel.detach().double().norm()
    bound = first.relative_error * (1 + 1e-9) if max_error is None else max_error
    bound, unit = max(bound, 1e-7), kernel.detach().double() / norm
    units, lam = [f.double() for f in first.factors], first.lam.double() / norm
    energy, done = lam.square().sum(), 0
    while done < sweeps:
        done += 1
        for n, unfolded in enumerate(_unfoldings(unit)):
            others = units[:n] + units[n + 1 :]
            gram, product = component_gram(others), unfolded @ khatri_rao(others)
            solved, error = _least_norm(gram, product, bound**2)
            (units[n],), norms = normalize_columns([solved])
        lam = norms[0]
        before, energy = energy, lam.square().sum()
        if error <= bound * (1 + 1e-6) and abs(before - energy) <= tol * before:
            break
    order = lam.argsort(descending=True)
    units = [u[:, order] for u in units]
    return decomposed("bounded_als", kernel, lam[order] * norm, units, done, began)


def _unfoldings(kernel: Tensor) -> list[Tensor]:
    return [kernel.movedim(n, 0).flatten(1) for n in range(kernel.ndim)]


def _least_norm(gram: Tensor, product: Tensor, bound: float) -> tuple[Tensor, float]:
    """Factor of least norm with squared error ``bound`` at most, and its error.

    ``X(μ) = P (G + μ)⁻¹`` for the largest μ within the bound, by bisection; the error
    grows with μ. If even μ = 0 is above the bound, that is the answer.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(1e-14 * values[-1])
    rotated = product @ vectors
    squares = rotated.square().sum(0)

    def error(mu: float) -> float:
        explained = squares * (values + 2 * mu) / (values + mu).square()
        return max(0.0, 1 - explained.sum().item())

    low, high = 1e-16 * values[-1].item(), 1e4 * values[-1].item()
    mu = 0.0
    if error(low) < bound:
        for _ in range(50):
            mu = (low * high) ** 0.5
            low, high = (mu, high) if error(mu) <= bound else (low, mu)
        mu = low
    return (rotated / (values + mu)) @ vectors.T, error(mu) ** 0.5
