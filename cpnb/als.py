"""CP decomposition of a given kernel by alternating least squares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpnb._checks import check_kernel
from cpnb.cp import component_gram, khatri_rao, normalize_columns
from cpnb.decomposition import CPResult, decomposed, power_method
from cpnb.ranks import resolve_rank


def als(
    kernel: Tensor,
    rank: int | float | str,
    *,
    sweeps: int = 50,
    ridge: float = 1e-6,
    tol: float = 1e-8,
    generator: torch.Generator | None = None,
) -> CPResult:
    """Alternating least squares, started from a short greedy fit.

    One factor at a time is solved for, the others fixed. The ridge (on norm-balanced
    factors of the kernel scaled to ‖W‖ = 1) keeps components from growing huge and
    cancelling each other; a solve that breaks down is retried with more ridge.

    Args:
        kernel: Any order ≥ 1.
        rank: Number of components, or any rank `cpnb.resolve_rank` takes.
        sweeps: At most this many passes over all modes.
        ridge: Weight of the squared factor norms; 0 is textbook ALS.
        tol: Stop when a sweep changes the relative error by less.
        generator: Source of the random starts; torch's default one if None.

    Returns:
        `CPResult` in the kernel's dtype, sorted by λ ≥ 0.

    Raises:
        TypeError: If ``kernel`` is not a floating-point tensor or ``rank`` no rank.
        ValueError: If ``kernel`` has NaN or infinite entries, or a number is out of
            range.
        ArithmeticError: If every retry ended in NaN or infinity.

    Source: Kolda & Bader 2009, doi:10.1137/07070111X, section 3.4; the ridge against
    degeneracy after Phan et al. 2020, arXiv:2008.05441 (their bound is not this one).
    """
    check_kernel(kernel)
    rank = resolve_rank(rank, kernel.shape)
    if sweeps < 1 or ridge < 0 or tol < 0:
        raise ValueError(
            f"sweeps is {sweeps}, ridge is {ridge}, tol is {tol}; expected sweeps >= 1 "
            "and the others >= 0."
        )
    start = power_method(kernel, rank, restarts=4, sweeps=4, generator=generator)
    if kernel.ndim < 3 or not start.lam.any():
        return start  # a matrix's best fit is its SVD; a zero kernel has nothing to fit
    work = kernel.detach().double()
    norm = work.norm()
    # Components without weight would stay at zero for ever: start them small instead.
    lam = start.lam.double() / norm
    lam = lam.clamp_min(1e-3 * lam.abs().max())
    factors = [f.double() * lam ** (1 / kernel.ndim) for f in start.factors]
    for strength in (ridge, *(max(ridge, 1e-8) * 100**n for n in (1, 2, 3))):
        fitted = _als_sweeps(work / norm, factors, sweeps, strength, tol)
        units, norms = normalize_columns(fitted)
        lam = norms.prod(0) * norm
        if lam.isfinite().all():
            order = lam.argsort(descending=True)
            return decomposed(kernel, lam[order], [u[:, order] for u in units])
    raise ArithmeticError(
        f"ALS ended in NaN or infinity at rank {rank} for a kernel of shape "
        f"{tuple(kernel.shape)}, also with ridge {strength:g}. Lower the rank or "
        "use power_method."
    )


def _als_sweeps(
    kernel: Tensor, factors: Sequence[Tensor], sweeps: int, ridge: float, tol: float
) -> list[Tensor]:
    """ALS on a kernel of unit norm; ends early on convergence or on NaN."""
    unfolded = kernel.reshape(kernel.shape[0], -1)
    factors, rank = list(factors), factors[0].shape[1]
    identity = ridge * torch.eye(rank, dtype=kernel.dtype, device=kernel.device)
    previous = float("inf")
    for _ in range(sweeps):
        gram = component_gram(factors[1:])
        product = unfolded @ khatri_rao(factors[1:])
        factors[0] = _solve(gram + identity, product)
        contracted = unfolded.T @ factors[0]  # shared by the other modes' updates
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
        if not abs(previous - error) >= tol:  # converged, or NaN
            break
        previous = error
        # The ridge acts alike on every mode only if their column norms are alike.
        units, norms = normalize_columns(factors)
        balanced = norms.prod(0) ** (1 / len(factors))
        factors = [unit * balanced for unit in units]
    return factors


def _solve(gram: Tensor, product: Tensor) -> Tensor:
    """Solve ``X · gram = product``, by Cholesky where that works."""
    root, info = torch.linalg.cholesky_ex(gram)
    if info.item() == 0:
        return torch.cholesky_solve(product.T, root).T
    if not gram.isfinite().all():
        return torch.full_like(product, float("nan"))
    return product @ torch.linalg.pinv(gram, hermitian=True)
