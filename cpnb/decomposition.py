"""CP decomposition of a given kernel by the greedy power method.

Works on the kernel's device, in float64 inside, for any order; so does ALS in `als.py`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpnb._checks import check_decomposable
from cpnb._diagnostics.degeneracy import Degeneracy, degeneracy
from cpnb.cp import (
    inverse_norms,
    khatri_rao,
    rebuild,
    relative_error,
)
from cpnb.ranks import Rank, resolve_rank

_EXHAUSTED = 1e-14  # a residual below this fraction of ‖W‖ is rounding, not signal


@dataclass(frozen=True)
class DecompositionInfo:
    """How a decomposition went.

    Attributes:
        method: Name of the function.
        relative_error: ``‖W − Ŵ‖_F / ‖W‖_F``.
        iterations: Sweeps done; for the greedy method over all components.
        seconds: Wall-clock time.
        degeneracy: λ_max, energy, worst cosine, sensitivity and whether all is finite.
        weighted_error: The error a data-aware fit minimised, None for other fits.
    """

    method: str
    relative_error: float
    iterations: int
    seconds: float
    degeneracy: Degeneracy
    weighted_error: float | None = None

    @property
    def fit(self) -> float:
        """``1 − relative_error``."""
        return 1 - self.relative_error

    def to_row(self) -> dict[str, Any]:
        """All numbers as one flat dict."""
        row = {n: v for n, v in vars(self).items() if n != "degeneracy"}
        return row | {"fit": self.fit} | self.degeneracy.to_row()


@dataclass(frozen=True, eq=False)
class CPResult:
    """A CP decomposition.

    Attributes:
        lam: Component weights. Shape ``(rank,)``.
        factors: Unit-column factor matrices, one per mode. Shapes ``(size_n, rank)``.
        info: How it went.
    """

    lam: Tensor
    factors: list[Tensor]
    info: DecompositionInfo

    @property
    def relative_error(self) -> float:
        """``‖W − Ŵ‖_F / ‖W‖_F``."""
        return self.info.relative_error


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
        rank: Number of components, or any rank `cpnb.resolve_rank` takes.
        restarts: Random starts per component.
        sweeps: Power sweeps per start.
        generator: Source of the random starts; torch's default one if None.

    Returns:
        `CPResult` in the kernel's dtype; λ ≥ 0.

    Raises:
        TypeError: If ``kernel`` is not a floating-point tensor or ``rank`` no rank.
        ValueError: If ``kernel`` is zero, a vector or not finite, or ``rank``,
            ``restarts`` or ``sweeps`` is below 1.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509 (power-method initialisation;
    10 restarts of 10 sweeps).
    """
    check_decomposable(kernel)
    rank = resolve_rank(rank, kernel.shape, kernel, generator=generator)
    for name, value in (("restarts", restarts), ("sweeps", sweeps)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1.")
    began = time.perf_counter()
    work = kernel.detach().double()
    if kernel.ndim == 2:
        lam, factors, iterations = _svd_terms(work, rank)
    else:
        lam, factors = _greedy_terms(work, rank, restarts, sweeps, generator)
        iterations = sweeps * lam.numel()
    missing = rank - lam.numel()
    if missing:
        lam = torch.cat([lam, lam.new_zeros(missing)])
        extra = [random_units(n, missing, generator, work) for n in kernel.shape]
        factors = [torch.cat(pair, 1) for pair in zip(factors, extra, strict=True)]
    return decomposed("power_method", kernel, lam, factors, iterations, began)


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
    method: str,
    kernel: Tensor,
    lam: Tensor,
    factors: Sequence[Tensor],
    iterations: int,
    began: float,
    weighted_error: float | None = None,
) -> CPResult:
    """Wrap float64 terms as a `CPResult` in the kernel's dtype."""
    info = DecompositionInfo(
        method=method,
        relative_error=relative_error(
            kernel.detach().double(), rebuild(lam, factors)
        ).item(),
        iterations=iterations,
        seconds=time.perf_counter() - began,
        degeneracy=degeneracy(lam, factors),
        weighted_error=weighted_error,
    )
    dtype = kernel.dtype
    return CPResult(lam.to(dtype), [f.to(dtype).contiguous() for f in factors], info)


def _svd_terms(matrix: Tensor, rank: int) -> tuple[Tensor, list[Tensor], int]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return values[:rank], [left[:, :rank], right.T[:, :rank]], 1


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
        outer = khatri_rao([v[:, None] for v in vectors[1:]])
        residual.addr_(vectors[0], outer[:, 0], alpha=-lam.item())
        terms.append((lam, vectors))
    columns = [[vectors[n] for _, vectors in terms] for n in range(kernel.ndim)]
    return torch.stack([lam for lam, _ in terms]), [torch.stack(c, 1) for c in columns]


def _unit(columns: Tensor) -> Tensor:
    return F.normalize(columns, dim=0, eps=torch.finfo(columns.dtype).tiny)


def _rank_one(
    unfolded: Tensor, vectors: list[Tensor], sweeps: int
) -> tuple[Tensor, list[Tensor]]:
    """Best rank-one fit over a batch of starts, held as columns of ``vectors``.

    ``unfolded`` is the mode-0 unfolding. The contraction with mode 0, the large one, is
    shared by the updates of all other modes: two matrix products per sweep.
    """
    first, *others = vectors
    for _ in range(sweeps):
        # Written with the few starts as rows, the products run twice as fast.
        contracted = (first.T @ unfolded).T
        for n, vector in enumerate(others):
            left = contracted.view(vector.shape[0], -1, vector.shape[1])
            if n + 1 < len(others):
                update = (left * khatri_rao(others[n + 1 :])).sum(1)
            else:
                update = left[:, 0]
            others[n] = _unit(update)
            contracted = (left * others[n][:, None]).sum(0)
        update = (khatri_rao(others).T @ unfolded.T).T
        first = _unit(update)
    lam = (update * first).sum(0)
    best = lam.argmax()
    return lam[best], [v[:, best] for v in (first, *others)]
