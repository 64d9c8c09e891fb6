"""CP decomposition of a given kernel by alternating least squares (ALS)."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from cpnb._checks import check_kernel
from cpnb.cp import component_gram, khatri_rao, normalize_columns
from cpnb.decomposition import CPResult, decomposed, power_method, random_units
from cpnb.ranks import resolve_rank

STARTS = ("greedy", "svd", "random")


def als(
    kernel: Tensor,
    rank: int | float | str,
    *,
    sweeps: int = 50,
    ridge: float = 1e-6,
    tol: float = 1e-8,
    start: str = "greedy",
    generator: torch.Generator | None = None,
) -> CPResult:
    """Alternating least squares with a ridge, by default from a short greedy fit.

    One factor at a time is solved for, the others fixed. The ridge (on norm-balanced
    factors of the kernel scaled to ‖W‖ = 1) keeps components from growing huge and
    cancelling each other; a fit that breaks down is retried with more ridge.

    Args:
        kernel: Any order ≥ 1.
        rank: Number of components, or any rank `cpnb.resolve_rank` takes.
        sweeps: At most this many passes over all modes.
        ridge: Weight of the squared factor norms; 0 is textbook ALS.
        tol: Stop when a sweep changes the relative error by less.
        start: ``"greedy"``, ``"svd"`` (leading eigenvectors of the modes' Gram
            matrices, random beyond them) or ``"random"``.
        generator: Source of the random starts; torch's default one if None.

    Returns:
        `CPResult` in the kernel's dtype, sorted by λ ≥ 0.

    Raises:
        TypeError: If ``kernel`` is not a floating-point tensor or ``rank`` no rank.
        ValueError: If ``kernel`` has NaN or infinite entries, or an option is out of
            range.
        ArithmeticError: If every retry ended in NaN or infinity.

    Source: Kolda & Bader 2009, doi:10.1137/07070111X, section 3.4.
    """
    rank = _checked(kernel, rank, sweeps=sweeps, ridge=ridge, tol=tol)
    if start not in STARTS:
        raise ValueError(f"start is {start!r}, expected one of {STARTS}.")
    began = time.perf_counter()
    if kernel.ndim < 3 or not kernel.any():
        # A matrix's best fit is its SVD; a zero kernel has nothing to fit.
        return power_method(kernel, rank, generator=generator)
    norm = kernel.detach().double().norm()
    unit = kernel.detach().double() / norm
    factors = _start(start, unit, rank, generator)
    for strength in (ridge, *(max(ridge, 1e-8) * 100**n for n in (1, 2, 3))):
        fitted, done = _als_sweeps(unit, factors, sweeps, strength, tol)
        units, norms = normalize_columns(fitted)
        lam = norms.prod(0) * norm
        if lam.isfinite().all():
            order = lam.argsort(descending=True)
            units = [u[:, order] for u in units]
            return decomposed("als", kernel, lam[order], units, done, began)
    raise ArithmeticError(
        f"ALS ended in NaN or infinity at rank {rank} for a kernel of shape "
        f"{tuple(kernel.shape)}, also with ridge {strength:g}. Lower the rank or use "
        "power_method."
    )


def bounded_als(
    kernel: Tensor,
    rank: int | float | str,
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
        kernel: Any order ≥ 1.
        rank: Number of components, or any rank `cpnb.resolve_rank` takes.
        max_error: Bound on the relative error; None takes what `als` reaches.
        sweeps: At most this many passes over all modes.
        tol: Stop when a sweep lowers Σλ² by less than this fraction.
        generator: Source of the random starts; torch's default one if None.

    Returns:
        `CPResult`; its error exceeds ``max_error`` only if no update could reach it.

    Raises:
        TypeError: If ``kernel`` is not a floating-point tensor or ``rank`` no rank.
        ValueError: If ``kernel`` has NaN or infinite entries, or an option is out of
            range.

    Source: Phan et al. 2020, arXiv:2008.05441 (error-preserving correction); the update
    is re-derived as a ridge whose weight meets the bound.
    """
    rank = _checked(kernel, rank, sweeps=sweeps, tol=tol)
    if max_error is not None and not 0 <= max_error < 1:
        raise ValueError(
            f"max_error is {max_error}, expected a relative error in [0, 1)."
        )
    began = time.perf_counter()
    first = als(kernel, rank, generator=generator)
    if kernel.ndim < 3 or not kernel.any():
        return first
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


def _checked(kernel: Tensor, rank: int | float | str, **numbers: float) -> int:
    check_kernel(kernel)
    for name, value in numbers.items():
        least = 1 if name == "sweeps" else 0
        if not value >= least:
            raise ValueError(f"{name} is {value}, expected at least {least}.")
    return resolve_rank(rank, kernel.shape)


def _start(
    start: str, unit: Tensor, rank: int, generator: torch.Generator | None
) -> list[Tensor]:
    if start == "greedy":
        greedy = power_method(unit, rank, restarts=4, sweeps=4, generator=generator)
        # Components without weight would stay at zero for ever: start them small.
        lam = greedy.lam.clamp_min(1e-3 * greedy.lam.abs().max())
        return [f * lam ** (1 / unit.ndim) for f in greedy.factors]
    factors = [random_units(n, rank, generator, unit) for n in unit.shape]
    if start == "svd":
        for mode, factor in enumerate(factors):
            unfolded = unit.movedim(mode, 0).flatten(1)
            vectors = torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors.flip(1)
            factor[:, : len(vectors)] = vectors[:, :rank]
    return [f * rank ** (-0.5 / unit.ndim) for f in factors]


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


def _als_sweeps(
    unit: Tensor, factors: Sequence[Tensor], sweeps: int, ridge: float, tol: float
) -> tuple[list[Tensor], int]:
    """ALS on a kernel of unit norm; ends early on convergence or on NaN.

    The contraction with mode 0, the large one, is shared by the updates of all other
    modes: two matrix products per sweep.
    """
    unfolded = unit.reshape(unit.shape[0], -1)
    factors, rank = list(factors), factors[0].shape[1]
    identity = ridge * torch.eye(rank, dtype=unit.dtype, device=unit.device)
    previous, done = float("inf"), 0
    while done < sweeps:
        done += 1
        gram = component_gram(factors[1:])
        product = unfolded @ khatri_rao(factors[1:])
        factors[0] = _solve(gram + identity, product)
        contracted = unfolded.T @ factors[0]
        for n in range(1, len(factors)):
            left = contracted.view(factors[n].shape[0], -1, rank)
            rest = factors[n + 1 :]
            product = (left * khatri_rao(rest)).sum(1) if rest else left[:, 0]
            gram = component_gram(factors[:n] + rest)
            factors[n] = _solve(gram + identity, product)
            contracted = (left * factors[n][:, None]).sum(0)
        full = gram * (factors[-1].T @ factors[-1])
        square = 1 + full.sum() - 2 * (product * factors[-1]).sum()
        error = square.clamp_min(0).sqrt().item()
        # The ridge acts alike on every mode only if their column norms are alike.
        units, norms = normalize_columns(factors)
        factors = [u * norms.prod(0) ** (1 / len(units)) for u in units]
        if not abs(previous - error) >= tol:  # converged, or NaN
            break
        previous = error
    return factors, done


def _solve(gram: Tensor, product: Tensor) -> Tensor:
    """Solve ``X · gram = product``, by Cholesky where that works."""
    root, info = torch.linalg.cholesky_ex(gram)
    if info.item() == 0:
        return torch.cholesky_solve(product.T, root).T
    if not gram.isfinite().all():
        return torch.full_like(product, float("nan"))
    return product @ torch.linalg.pinv(gram, hermitian=True)
