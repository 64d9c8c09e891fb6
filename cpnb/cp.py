"""Functional core: CP (Kruskal) tensors as plain torch tensors.

A kernel of order N is ``Σ_r lam[r] · f_0[:, r] ∘ … ∘ f_{N-1}[:, r]``: component
weights ``lam`` of shape ``(rank,)`` and one factor matrix ``(size_n, rank)`` per mode.
"""

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "break_even_rank",
    "canonical_gauge",
    "component_gram",
    "cp_to_kernel",
    "khatri_rao",
    "normalize_columns",
    "relative_error",
    "resolve_rank",
]

Rank = int | float | str | Callable[[Tensor], int]
CPForm = tuple[Tensor, list[Tensor]]


def cp_to_kernel(lam: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Sum the rank-one components into a full kernel.

    ``weight[o,i,h,w] = Σ_r lam[r]·A[o,r]·B[i,r]·C[h,r]·D[w,r]``, computed as one
    Khatri-Rao product and one matrix product.

    Args:
        lam: Component weights, any sign. Shape ``(rank,)``.
        factors: One matrix per mode. Shapes ``(size_n, rank)``.

    Returns:
        Kernel. Shape ``(size_0, ..., size_{N-1})``.

    Raises:
        ValueError: If column counts differ or do not match ``lam``.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509.

    >>> lam = torch.tensor([2.0])
    >>> cp_to_kernel(lam, [torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [5.0]])])
    tensor([[ 2., 10.],
            [ 6., 30.]])
    """
    check_cp(lam, factors)
    return rebuild(lam, factors)


def rebuild(lam: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Do the work of `cp_to_kernel` without its checks."""
    sizes = [f.shape[0] for f in factors]
    # λ goes into the smallest factor: a product of size (3, rank), not (256, rank).
    smallest = sizes.index(min(sizes))
    first, *rest = [f * lam if n == smallest else f for n, f in enumerate(factors)]
    if not rest:
        return first.sum(1)
    return (first @ columnwise_kronecker(rest).T).view(sizes)


def khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product; the last matrix's row index runs fastest.

    Matrices of shapes ``(size_n, rank)`` give one of shape ``(Π size_n, rank)``.

    >>> khatri_rao([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]).T
    tensor([[3., 4., 6., 8.]])
    """
    _check_factors(matrices, "matrices")
    return columnwise_kronecker(matrices)


def columnwise_kronecker(matrices: Sequence[Tensor]) -> Tensor:
    """Do the work of `khatri_rao` without its checks, which no tracer can follow."""
    # Small modes first, so that only the last product has the full size.
    rightwards = matrices[0].shape[0] < matrices[-1].shape[0]
    pending = list(matrices) if rightwards else list(matrices)[::-1]
    product = pending[0]
    for matrix in pending[1:]:
        left, right = (product, matrix) if rightwards else (matrix, product)
        product = (left[:, None] * right[None]).flatten(0, 1)
    return product


def inverse_norms(factors: Sequence[Tensor]) -> Tensor:
    """One over each column's 2-norm; 0 for a zero column, with zero gradient.

    A component with a zero column therefore contributes nothing and stays put,
    instead of spreading NaN through the layer. Shape ``(modes, rank)``; float64 for
    factors of half precision: the squares of bfloat16 leave float32's range.
    """
    if factors[0].dtype in (torch.float16, torch.bfloat16):
        return inverse_norms([f.double() for f in factors])
    squares = torch.stack([(f * f).sum(0) for f in factors])
    alive = squares >= torch.finfo(squares.dtype).tiny
    # Not rsqrt: its gradient has the cube of the norm, which leaves float32's range
    # for columns of length 1e-13 and 1e13 already.
    return alive / torch.where(alive, squares, 1).sqrt()


def with_unit_columns(lam: Tensor, factors: Sequence[Tensor]) -> CPForm:
    """λ and factors for `rebuild` that stand for λ with the columns at unit length.

    The two largest factors stay as they are and their norms go into λ, which saves two
    passes over them; no product leaves the range of float32 for columns from 1e-15 to
    1e15. In half precision, whose range is too short for that, all are normalised.
    Shapes and dtype stay.
    """
    if not factors:
        return lam, []
    inverses = inverse_norms(factors).unbind()
    if factors[0].dtype in (torch.float16, torch.bfloat16):
        units = [f * inverse for f, inverse in zip(factors, inverses, strict=True)]
        return lam, [unit.to(lam.dtype) for unit in units]
    by_size = sorted(range(len(factors)), key=lambda n: -factors[n].shape[0])
    folded = list(factors)
    for n in by_size[:2]:
        lam = lam * inverses[n]
    for n in by_size[2:]:
        folded[n] = factors[n] * inverses[n]
    return lam, folded


def normalize_columns(factors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Scale every column of every factor to unit 2-norm; zero columns stay zero.

    Returns:
        The unit-column factors, shapes ``(size_n, rank)``, and the norms, ``(modes,
        rank)``.

    >>> units, norms = normalize_columns([torch.tensor([[3.0, 0.0], [4.0, 0.0]])])
    >>> units[0].T, norms
    (tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]]), tensor([[5., 0.]]))
    """
    _check_factors(factors)
    inverses = inverse_norms(factors)
    units = [(f * i).to(f) for f, i in zip(factors, inverses, strict=True)]
    norms = [(f * unit).sum(0) for f, unit in zip(factors, units, strict=True)]
    return units, torch.stack(norms)


def component_gram(factors: Sequence[Tensor]) -> Tensor:
    """Inner products Γ between the rank-one terms (λ left out).

    ``Γ = (AᵀA) * (BᵀB) * …`` elementwise, shape ``(rank, rank)``, for factors of shapes
    ``(size_n, rank)``. With unit columns these are the cosines between components.
    """
    _check_factors(factors)
    gram = factors[0].T @ factors[0]
    for factor in factors[1:]:
        gram = gram * (factor.T @ factor)
    return gram


def canonical_gauge(lam: Tensor, factors: Sequence[Tensor]) -> CPForm:
    """Write the same kernel in its canonical gauge.

    Unit columns; λ ≥ 0, in descending order; in every mode but the first the entry of
    largest magnitude is positive, and what remains of the sign sits in mode 0. Two CP
    forms that differ by scale, sign or (with distinct |λ|) order of their components
    become equal.

    Args:
        lam: Component weights, any sign. Shape ``(rank,)``.
        factors: Shapes ``(size_n, rank)``.

    Returns:
        ``(lam, factors)`` of the same shapes and of the same kernel.
    """
    check_cp(lam, factors)
    units, norms = normalize_columns(factors)
    lam = lam * norms.prod(0)
    sign = torch.where(lam < 0, -1, 1).to(lam.dtype)
    for n, unit in enumerate(units[1:], start=1):
        peak = unit.gather(0, unit.abs().argmax(0, keepdim=True))[0]
        flip = torch.where(peak < 0, -1, 1).to(lam.dtype)
        units[n] = unit * flip
        sign = sign * flip
    units[0] = units[0] * sign
    order = lam.abs().argsort(descending=True, stable=True)
    return lam.abs()[order], [unit[:, order] for unit in units]


def relative_error(kernel: Tensor, approximation: Tensor) -> Tensor:
    """``‖kernel − approximation‖_F / ‖kernel‖_F``; a zero kernel gives 0 or infinity.

    Args:
        kernel: Reference, any shape.
        approximation: Same shape.

    >>> relative_error(torch.ones(4), torch.zeros(4))
    tensor(1.)
    """
    if kernel.shape != approximation.shape:
        raise ValueError(
            f"approximation has shape {tuple(approximation.shape)}, expected "
            f"{tuple(kernel.shape)} as the kernel."
        )
    difference = torch.linalg.vector_norm(kernel - approximation)
    return torch.where(
        difference == 0, difference, difference / torch.linalg.vector_norm(kernel)
    )


def break_even_rank(shape: Sequence[int]) -> int:
    """Rank at which the CP form holds as many parameters as the dense kernel.

    ``R_same = ⌈Π size_n / (Σ size_n + 1)⌉``, the +1 for λ. Modes of size 1 carry no
    factor and do not count.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509 (ranks of its networks).

    >>> break_even_rank((64, 32, 3, 3))
    179
    """
    return math.ceil(math.prod(shape) / (sum(n for n in shape if n > 1) + 1))


def exact_rank(shape: Sequence[int]) -> int:
    """``Π size_n / max size_n``: with as many components every kernel is exact."""
    return math.prod(shape) // max(shape)


def cp_parameters(shape: Sequence[int], rank: int) -> int:
    """Parameters of a CP kernel: λ, one factor per mode of size > 1, and σ."""
    return rank * (sum(n for n in shape if n > 1) + 1) + 1


def resolve_rank(rank: Rank, shape: Sequence[int], kernel: Tensor | None = None) -> int:
    """Turn a rank as the user says it into a number of components.

    Args:
        rank: An int ≥ 1; a float in (0, 1], the fraction of the break-even rank
            (rounded, at least 1); ``"same"`` for the break-even rank; or a function of
            the kernel such as ``cpnb.methods.fit_rank(0.1)``.
        shape: Kernel shape.
        kernel: For such a function to look at.

    Returns:
        Number of components.

    Raises:
        TypeError: If ``rank`` is none of these types.
        ValueError: If it is out of range, or a function without a kernel.

    >>> resolve_rank("same", (64, 32, 3, 3)), resolve_rank(0.5, (64, 32, 3, 3))
    (179, 90)
    """
    meaning = 'an int >= 1, a float in (0, 1] (fraction of break-even), or "same"'
    if callable(rank):
        if kernel is None:
            raise ValueError(
                f"rank is a function, which needs a kernel to look at, expected "
                f"{meaning}. Use the function with cpnb.from_layer or "
                "cpnb.canonicalize."
            )
        rank = rank(kernel)
    if rank == "same":
        return break_even_rank(shape)
    if isinstance(rank, float) and 0 < rank <= 1:
        return max(1, round(rank * break_even_rank(shape)))
    if isinstance(rank, float | str):
        raise ValueError(
            f"rank is {rank!r}, expected {meaning}. For a number of components pass an "
            "int."
        )
    if isinstance(rank, bool) or not hasattr(rank, "__index__"):
        raise TypeError(f"rank is {rank!r}, expected {meaning}.")
    count = operator.index(rank)
    if count < 1:
        raise ValueError(f"rank is {count}, expected {meaning}.")
    return count


def _check_factors(factors: Sequence[Tensor], name: str = "factors") -> None:
    if not len(factors):
        raise ValueError(f"{name} is empty, expected one (size, rank) matrix per mode.")
    for n, factor in enumerate(factors):
        if factor.ndim != 2:
            raise ValueError(
                f"{name}[{n}] has shape {tuple(factor.shape)}, expected two dimensions "
                "(size, rank)."
            )
        if factor.shape[1] != factors[0].shape[1]:
            raise ValueError(
                f"{name}[{n}] has {factor.shape[1]} columns, expected rank "
                f"{factors[0].shape[1]} (from {name}[0])."
            )


def check_cp(lam: Tensor, factors: Sequence[Tensor]) -> None:
    if lam.ndim != 1 or not lam.numel():
        raise ValueError(
            f"lam has shape {tuple(lam.shape)}, expected (rank,) with rank >= 1."
        )
    for n, factor in enumerate(factors):
        if factor.ndim == 2 and factor.shape[1] != len(lam):
            raise ValueError(
                f"factors[{n}] has {factor.shape[1]} columns, expected rank {len(lam)} "
                f"(from lam). Rebuild it with shape ({factor.shape[0]}, {len(lam)})."
            )
    _check_factors(factors)
