"""CP decomposition of a given kernel by alternating least squares (ALS)."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cpnb._checks import check_decomposable
from cpnb.cp import khatri_rao, normalize_columns
from cpnb.decomposition import CPResult, decomposed, power_method, random_units
from cpnb.ranks import Rank, resolve_rank

STARTS = ("greedy", "svd", "random")


def als(
    kernel: Tensor,
    rank: Rank,
    *,
    sweeps: int = 50,
    damping: float = 1e-3,
    ridge: float = 0.0,
    tol: float = 1e-8,
    start: str = "greedy",
    extrapolate: bool = True,
    generator: torch.Generator | None = None,
) -> CPResult:
    """Alternating least squares with damping and extrapolation.

    One factor at a time is solved for, the others fixed. With ‖W‖ scaled to 1 and S the
    sum of the squared factor norms, it lowers ``error²·(1 + damping·S) + ridge·S``:
    damping keeps components from growing huge and cancelling each other, and fades as
    the fit becomes exact. Extrapolation along each factor's last change about halves
    the sweeps needed. The best factors met are returned.

    Args:
        kernel: Any order ≥ 2.
        rank: Number of components, or any rank `cpnb.resolve_rank` takes.
        sweeps: At most this many passes over all modes.
        damping: Weight of the factor norms relative to the squared error.
        ridge: Absolute weight of the factor norms. It biases every fit, and is what
            holds λ down on a kernel without a best fit; a fit that breaks down is
            retried with more of it.
        tol: Stop when a sweep changes the root of what is lowered by less.
        start: ``"greedy"``, ``"svd"`` (leading eigenvectors of the modes' Gram
            matrices, random beyond them; fastest) or ``"random"``. The greedy start
            costs more time and gives the smallest λ.
        extrapolate: False, with ``damping=0``, is textbook ALS.
        generator: Source of the random starts; torch's default one if None.

    Returns:
        `CPResult` in the kernel's dtype, sorted by λ ≥ 0.

    Raises:
        TypeError: If ``kernel`` is not a floating-point tensor or ``rank`` no rank.
        ValueError: If ``kernel`` is zero, a vector or not finite, or an option is out
            of range.
        ArithmeticError: If every retry ended in NaN or infinity.

    Source: Kolda & Bader 2009, doi:10.1137/07070111X, section 3.4; extrapolation with
    restarts in the manner of Ang, Cohen, Hien & Gillis 2020, arXiv:2001.04321.
    """
    rank = check_fit_options(
        kernel, rank, generator, sweeps=sweeps, damping=damping, ridge=ridge, tol=tol
    )
    if start not in STARTS:
        raise ValueError(f"start is {start!r}, expected one of {STARTS}.")
    began = time.perf_counter()
    if kernel.ndim == 2:  # a matrix's best fit is its SVD
        fit = power_method(kernel, rank, generator=generator)
        return replace(fit, info=replace(fit.info, method="als"))
    norm = kernel.detach().double().norm()
    unit = kernel.detach().double() / norm
    factors = _start(start, unit, rank, generator)
    for strength in (ridge, *(max(ridge, 1e-8) * 100**n for n in (1, 2, 3))):
        fitted, done = _descend(
            unit, factors, sweeps, damping, strength, tol, extrapolate
        )
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


def check_fit_options(
    kernel: Tensor, rank: Rank, generator: torch.Generator | None, **numbers: float
) -> int:
    """Check what every iterative fit takes; returns the rank as an int."""
    check_decomposable(kernel)
    for name, value in numbers.items():
        least = 1 if name == "sweeps" else 0
        if not value >= least:
            raise ValueError(f"{name} is {value}, expected at least {least}.")
    return resolve_rank(rank, kernel.shape, kernel, generator=generator)


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


def _descend(
    unit: Tensor,
    factors: Sequence[Tensor],
    sweeps: int,
    damping: float,
    ridge: float,
    tol: float,
    extrapolate: bool,
) -> tuple[list[Tensor], int]:
    """Sweep over a kernel of unit norm; the best factors met (or NaN), and the sweeps.

    Each new factor is pushed ``momentum`` times its own change further before the next
    mode uses it. When that raises the goal, the sweep's plain factors are taken
    instead, with less momentum from then on.
    """
    plain = best = list(factors)
    momentum, ceiling, square = 0.5, 1.0, 1.0
    least, previous, done, restart = float("inf"), float("inf"), 0, True
    while done < sweeps:
        done += 1
        if restart:
            # Norms weigh alike on every mode only if the modes' norms are alike.
            units, norms = normalize_columns(plain)
            plain = [u * norms.prod(0) ** (1 / len(units)) for u in units]
            pushed = list(plain)
        push = 0.0 if restart else momentum
        plain, square, size = _sweep(
            unit, plain, pushed, damping * square + ridge, push
        )
        goal = (square * (1 + damping * size) + ridge * size) ** 0.5
        if math.isnan(goal):
            return plain, done
        if goal < least:
            least, best = goal, [*pushed[:-1], plain[-1]]
        if abs(previous - goal) < tol:
            break
        worse, previous = goal > previous, goal
        restart = worse or not extrapolate
        momentum, ceiling = (
            (momentum / 1.5, momentum)
            if worse
            else (min(ceiling, 1.05 * momentum), min(1.0, 1.01 * ceiling))
        )
    return best, done


def _sweep(
    unit: Tensor, before: list[Tensor], pushed: list[Tensor], ridge: float, push: float
) -> tuple[list[Tensor], float, float]:
    """Update every mode once, ``pushed`` in place.

    The contraction with mode 0, the large one, is shared by the updates of all other
    modes: two matrix products in all.

    Returns:
        The plain factors; then, for the last of them beside the pushed others, the
        squared error and the sum of the squared norms.
    """
    unfolded, rank = unit.reshape(unit.shape[0], -1), before[0].shape[1]
    shift = ridge * torch.eye(rank, dtype=unit.dtype, device=unit.device)
    grams, plain, contracted = [f.T @ f for f in pushed], [], unfolded
    for n, factor in enumerate(before):
        rest = pushed[n + 1 :]
        if n == 0:
            product = unfolded @ khatri_rao(rest)
        else:
            left = contracted.view(len(factor), -1, rank)
            product = (left * khatri_rao(rest)).sum(1) if rest else left[:, 0]
        gram = torch.stack(grams[:n] + grams[n + 1 :]).prod(0)
        plain.append(_solve(gram + shift, product))
        pushed[n] = plain[n] + push * (plain[n] - factor) if push else plain[n]
        if rest:
            grams[n] = pushed[n].T @ pushed[n]
            other = left * pushed[n][:, None] if n else None
            contracted = unfolded.T @ pushed[0] if n == 0 else other.sum(0)
    last = plain[-1].T @ plain[-1]
    square = 1 + (gram * last).sum() - 2 * (product * plain[-1]).sum()
    size = sum(g.trace() for g in (*grams[:-1], last))
    return plain, square.clamp_min(0).item(), size.item()


def _solve(gram: Tensor, product: Tensor) -> Tensor:
    """Solve ``X · gram = product``, by Cholesky where that works."""
    root, info = torch.linalg.cholesky_ex(gram)
    if info.item() == 0:
        return torch.cholesky_solve(product.T, root).T
    if not gram.isfinite().all():
        return torch.full_like(product, float("nan"))
    return product @ torch.linalg.pinv(gram, hermitian=True)
