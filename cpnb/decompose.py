"""CP decomposition of a given kernel: the greedy power method and least squares.

Works on the kernel's device, in float64 inside, for any order.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cpnb.cp import (
    Rank,
    columnwise_kronecker,
    inverse_norms,
    normalize_columns,
    rebuild,
    relative_error,
    resolve_rank,
)

__all__ = ["CPResult", "als", "power_method"]

_TINY = torch.finfo(torch.float64).tiny
_EXHAUSTED = 1e-14  # a residual below this fraction of ‖W‖ is rounding, not signal


@dataclass(frozen=True, eq=False)
class CPResult:
    """A CP decomposition and how it went.

    Attributes:
        lam: Component weights. Shape ``(rank,)``.
        factors: Unit-column factor matrices, one per mode. Shapes ``(size_n, rank)``.
        relative_error: ``‖W − Ŵ‖_F / ‖W‖_F``.
        seconds: Wall-clock time.
    """

    lam: Tensor
    factors: list[Tensor]
    relative_error: float
    seconds: float


def power_method(
    kernel: Tensor,
    rank: Rank,
    *,
    restarts: int = 10,
    sweeps: int = 10,
    generator: torch.Generator | None = None,
) -> CPResult:
    """Greedy rank-one deflation by the higher-order power method.

    Each component is the best of ``restarts`` rank-one fits (run as one batch) to what
    the earlier ones left over, so the result is *nested*: its first k components are
    the result for rank k, of relative error exactly ``√(1 − Σ_{r≤k} λ_r²/‖W‖²)``. For
    a matrix the method's limit, the singular value decomposition, is taken directly.
    Once nothing is left, further components get λ = 0 and random unit directions.

    Args:
        kernel: Any order ≥ 2.
        rank: Number of components, or any rank `cpnb.cp.resolve_rank` takes.
        restarts: Random starts per component.
        sweeps: Power sweeps per start.
        generator: Source of the random starts; torch's default one if None.

    Returns:
        `CPResult` in the kernel's dtype; λ ≥ 0.

    Raises:
        ValueError: If ``kernel`` is zero, a vector or not finite.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509 (power-method initialisation;
    10 restarts of 10 sweeps).
    """
    _check_kernel(kernel)
    rank = resolve_rank(rank, kernel.shape, kernel)
    began = time.perf_counter()
    work = kernel.detach().double()
    if kernel.ndim == 2:
        left, values, right = torch.linalg.svd(work, full_matrices=False)
        lam, factors = values[:rank], [left[:, :rank], right.T[:, :rank]]
    else:
        lam, factors = _greedy_terms(work, rank, restarts, sweeps, generator)
    missing = rank - lam.numel()
    if missing:
        lam = torch.cat([lam, lam.new_zeros(missing)])
        extra = [random_units(n, missing, generator, work) for n in kernel.shape]
        factors = [torch.cat(pair, 1) for pair in zip(factors, extra, strict=True)]
    return decomposed(kernel, lam, factors, began)


def als(
    kernel: Tensor,
    rank: Rank,
    *,
    sweeps: int = 50,
    damping: float = 1e-3,
    ridge: float = 0.0,
    tol: float = 1e-8,
    start: Literal["greedy", "random"] = "greedy",
    extrapolate: bool = True,
    generator: torch.Generator | None = None,
) -> CPResult:
    """Alternating least squares with damping and extrapolation.

    With ‖W‖ scaled to 1 and S the sum of the squared factor norms, it lowers
    ``error²·(1 + damping·S) + ridge·S``: damping keeps components from growing huge and
    cancelling each other, and fades as the fit becomes exact. Extrapolation along each
    factor's last change about halves the sweeps needed.

    Args:
        kernel: Any order ≥ 2.
        rank: As in `power_method`.
        sweeps: At most this many passes over all modes.
        damping: Weight of the factor norms relative to the squared error.
        ridge: Absolute weight of the factor norms; it biases every fit. One that breaks
            down is retried with more of it.
        tol: Stop when a sweep changes the root of what is lowered by less.
        start: ``"greedy"`` takes longer than ``"random"`` and gives smaller λ.
        extrapolate: False, with ``damping=0``, is textbook ALS.
        generator: Source of the random starts; torch's default one if None.

    Returns:
        `CPResult` in the kernel's dtype, sorted by λ ≥ 0.

    Raises:
        ValueError: If ``kernel`` is zero, a vector or not finite.
        ArithmeticError: If every retry ended in NaN or infinity.

    Source: Kolda & Bader 2009, doi:10.1137/07070111X, section 3.4; extrapolation with
    restarts in the manner of Ang, Cohen, Hien & Gillis 2020, arXiv:2001.04321.
    """
    _check_kernel(kernel)
    rank = resolve_rank(rank, kernel.shape, kernel)
    if kernel.ndim == 2:  # a matrix's best fit is its SVD
        return power_method(kernel, rank, generator=generator)
    began = time.perf_counter()
    norm = kernel.detach().double().norm()
    unit = kernel.detach().double() / norm
    factors = _start(start, unit, rank, generator)
    for strength in (ridge, *(max(ridge, 1e-8) * 100**n for n in (1, 2, 3))):
        fitted = _descend(unit, factors, sweeps, damping, strength, tol, extrapolate)
        units, norms = normalize_columns(fitted)
        lam = norms.prod(0) * norm
        if lam.isfinite().all():
            order = lam.argsort(descending=True)
            units = [u[:, order] for u in units]
            return decomposed(kernel, lam[order], units, began)
    raise ArithmeticError(
        f"ALS ended in NaN or infinity at rank {rank} for a kernel of shape "
        f"{tuple(kernel.shape)}, also with ridge {strength:g}. Lower the rank or use "
        "power_method."
    )


def _check_kernel(kernel: Tensor) -> None:
    if kernel.ndim < 2 or not kernel.any():
        raise ValueError(
            f"kernel of shape {tuple(kernel.shape)} is a vector or zero, expected at "
            "least two modes and something to decompose. For a random start take "
            "cpnb.initializers.unified."
        )
    if not kernel.is_floating_point():  # the result has its dtype
        raise ValueError(f"kernel is {kernel.dtype}, expected real floating point.")
    if not kernel.isfinite().all():
        bad = int((~kernel.isfinite()).sum())
        raise ValueError(
            f"kernel has {bad} NaN or infinite entries out of {kernel.numel()}, "
            "expected finite values. Check the training run or file it came from."
        )


def random_units(
    size: int, count: int, generator: torch.Generator | None, like: Tensor
) -> Tensor:
    """Directions uniform on the sphere, as columns. Shape ``(size, count)``."""
    device = generator.device if generator is not None else like.device
    draw = torch.randn(
        size, count, generator=generator, device=device, dtype=torch.float64
    )
    return (draw * inverse_norms([draw])[0]).to(like)


def decomposed(
    kernel: Tensor, lam: Tensor, factors: Sequence[Tensor], began: float
) -> CPResult:
    """Wrap float64 terms as a `CPResult` in the kernel's dtype."""
    error = relative_error(kernel.detach().double(), rebuild(lam, factors))
    dtype = kernel.dtype
    return CPResult(
        lam=lam.to(dtype),
        factors=[f.to(dtype).contiguous() for f in factors],
        relative_error=error.item(),
        seconds=time.perf_counter() - began,
    )


def _greedy_terms(
    kernel: Tensor,
    rank: int,
    restarts: int,
    sweeps: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, list[Tensor]]:
    residual = kernel.reshape(kernel.shape[0], -1).clone()
    limit = _EXHAUSTED * residual.norm()
    terms: list[tuple[Tensor, list[Tensor]]] = []
    for _ in range(rank):
        if residual.norm() <= limit:
            break
        # Their length does not matter: each update normalises.
        starts = random_units(sum(kernel.shape), restarts, generator, kernel)
        lam, vectors = _rank_one(residual, list(starts.split(kernel.shape)), sweeps)
        outer = columnwise_kronecker([v[:, None] for v in vectors[1:]])
        residual.addr_(vectors[0], outer[:, 0], alpha=-lam.item())
        terms.append((lam, vectors))
    columns = [[vectors[n] for _, vectors in terms] for n in range(kernel.ndim)]
    return torch.stack([lam for lam, _ in terms]), [torch.stack(c, 1) for c in columns]


def _rank_one(
    unfolded: Tensor, vectors: list[Tensor], sweeps: int
) -> tuple[Tensor, list[Tensor]]:
    """Best rank-one fit over a batch of starts, held as columns of ``vectors``.

    The contraction with mode 0, the large one, is shared by all other modes.
    """
    first, *others = vectors
    for _ in range(sweeps):
        # Written with the few starts as rows, the products run twice as fast.
        contracted = (first.T @ unfolded).T
        for n, vector in enumerate(others):
            left = contracted.view(vector.shape[0], -1, vector.shape[1])
            if n + 1 < len(others):
                update = (left * columnwise_kronecker(others[n + 1 :])).sum(1)
            else:
                update = left[:, 0]
            others[n] = F.normalize(update, dim=0, eps=_TINY)
            contracted = (left * others[n][:, None]).sum(0)
        update = (columnwise_kronecker(others).T @ unfolded.T).T
        first = F.normalize(update, dim=0, eps=_TINY)
    lam = (update * first).sum(0)
    best = lam.argmax()
    return lam[best], [v[:, best] for v in (first, *others)]


def _start(
    start: str, unit: Tensor, rank: int, generator: torch.Generator | None
) -> list[Tensor]:
    if start not in ("greedy", "random"):
        raise ValueError(f"start is {start!r}, expected 'greedy' or 'random'.")
    if start == "greedy":
        greedy = power_method(unit, rank, restarts=4, sweeps=4, generator=generator)
        # Components without weight would stay at zero for ever: start them small.
        lam = greedy.lam.clamp_min(1e-3 * greedy.lam.abs().max())
        return [f * lam ** (1 / unit.ndim) for f in greedy.factors]
    factors = [random_units(n, rank, generator, unit) for n in unit.shape]
    return [f * rank ** (-0.5 / unit.ndim) for f in factors]


def _descend(
    unit: Tensor,
    factors: Sequence[Tensor],
    sweeps: int,
    damping: float,
    ridge: float,
    tol: float,
    extrapolate: bool,
) -> list[Tensor]:
    """Sweep over a kernel of unit norm; the best factors met, or NaN.

    Each new factor is pushed ``momentum`` times its own change further. When that
    raises the goal, the plain factors are taken instead, with less momentum from then.
    """
    plain = best = list(factors)
    momentum = 0.5
    ceiling = square = 1.0
    least = previous = math.inf
    restart = True
    for _ in range(sweeps):
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
            return plain
        if goal < least:
            least = goal
            best = [*pushed[:-1], plain[-1]]
        if abs(previous - goal) < tol:
            break
        worse = goal > previous
        previous = goal
        restart = worse or not extrapolate
        if worse:
            ceiling = momentum
            momentum = momentum / 1.5
        else:
            momentum = min(ceiling, 1.05 * momentum)
            ceiling = min(1.0, 1.01 * ceiling)
    return best


def _sweep(
    unit: Tensor, before: list[Tensor], pushed: list[Tensor], ridge: float, push: float
) -> tuple[list[Tensor], float, float]:
    """Update every mode once, ``pushed`` in place, by two products with the kernel.

    Returns:
        The plain factors; then, for the last of them beside the pushed others, the
        squared error and the sum of the squared norms.
    """
    unfolded = unit.reshape(unit.shape[0], -1)
    rank = before[0].shape[1]
    shift = ridge * torch.eye(rank, dtype=unit.dtype, device=unit.device)
    grams = [f.T @ f for f in pushed]
    plain: list[Tensor] = []
    contracted = unfolded
    for n, factor in enumerate(before):
        rest = pushed[n + 1 :]
        if n == 0:
            product = unfolded @ columnwise_kronecker(rest)
        else:
            left = contracted.view(len(factor), -1, rank)
            product = (left * columnwise_kronecker(rest)).sum(1) if rest else left[:, 0]
        gram = torch.stack(grams[:n] + grams[n + 1 :]).prod(0)
        plain.append(_solve(gram + shift, product))
        pushed[n] = plain[n] + push * (plain[n] - factor) if push else plain[n]
        if rest:
            grams[n] = pushed[n].T @ pushed[n]
            if n == 0:
                contracted = unfolded.T @ pushed[0]
            else:
                contracted = (left * pushed[n][:, None]).sum(0)
    last = plain[-1].T @ plain[-1]
    square = 1 + (gram * last).sum() - 2 * (product * plain[-1]).sum()
    size = sum(g.trace().item() for g in (*grams[:-1], last))
    return plain, square.clamp_min(0).item(), size


def _solve(gram: Tensor, product: Tensor) -> Tensor:
    """Solve ``X · gram = product``, by Cholesky where that works."""
    root, info = torch.linalg.cholesky_ex(gram)
    if info.item() == 0:
        return torch.cholesky_solve(product.T, root).T
    if not gram.isfinite().all():
        return torch.full_like(product, float("nan"))
    return product @ torch.linalg.pinv(gram, hermitian=True)
