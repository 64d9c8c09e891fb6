"""Functional core: CP (Kruskal) tensors as plain torch tensors.

A kernel of order N is ``Σ_r lam[r] · f_0[:, r] ∘ … ∘ f_{N-1}[:, r]``: component
weights ``lam`` of shape ``(rank,)`` and one factor matrix ``(size_n, rank)`` per mode.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpnb._checks import check_cp, check_factors, check_floating


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
        TypeError: If a tensor is missing or not of floating-point type.
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
    """Do the work of `cp_to_kernel` without its checks, for a layer's forward."""
    sizes = [f.shape[0] for f in factors]
    # λ goes into the smallest factor: a product of size (3, rank), not (256, rank).
    smallest = sizes.index(min(sizes))
    first, *rest = [f * lam if n == smallest else f for n, f in enumerate(factors)]
    if not rest:
        return first.sum(1)
    return (first @ khatri_rao(rest).T).view(sizes)


def khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product; the last matrix's row index runs fastest.

    Args:
        matrices: At least one matrix. Shapes ``(size_n, rank)``.

    Returns:
        Shape ``(Π size_n, rank)``.

    Raises:
        ValueError: If there is no matrix or the column counts differ.

    >>> khatri_rao([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]).T
    tensor([[3., 4., 6., 8.]])
    """
    if not len(matrices):
        raise ValueError(
            "matrices is empty, expected at least one (size, rank) matrix."
        )
    ranks = [m.shape[-1] for m in matrices]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"matrices have {ranks} columns, expected the same number in each."
        )
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
    instead of spreading NaN through the layer.

    Args:
        factors: At least one. Shapes ``(size_n, rank)``.

    Returns:
        Shape ``(modes, rank)``.
    """
    if factors[0].dtype is torch.float16:  # squares of 1e-4 underflow there
        return inverse_norms([f.float() for f in factors]).half()
    squares = torch.stack([(f * f).sum(0) for f in factors])
    alive = squares >= torch.finfo(squares.dtype).tiny
    return torch.where(alive, squares, 1).rsqrt() * alive


def normalize_columns(factors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Scale every column of every factor to unit 2-norm; zero columns stay zero.

    Args:
        factors: Shapes ``(size_n, rank)``.

    Returns:
        The unit-column factors and the norms, of shape ``(modes, rank)``.

    Raises:
        TypeError: If a factor is not a floating-point tensor.
        ValueError: If there is no factor or the column counts differ.

    >>> units, norms = normalize_columns([torch.tensor([[3.0, 0.0], [4.0, 0.0]])])
    >>> units[0].T, norms
    (tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]]), tensor([[5., 0.]]))
    """
    check_factors(factors)
    inverses = inverse_norms(factors)
    units = [f * inverse for f, inverse in zip(factors, inverses, strict=True)]
    norms = [(f * unit).sum(0) for f, unit in zip(factors, units, strict=True)]
    return units, torch.stack(norms)


def component_gram(factors: Sequence[Tensor]) -> Tensor:
    """Inner products Γ between the rank-one terms (λ left out).

    ``Γ = (AᵀA) * (BᵀB) * …`` elementwise. With unit columns these are the cosines
    between components.

    Args:
        factors: Shapes ``(size_n, rank)``.

    Returns:
        Symmetric matrix. Shape ``(rank, rank)``.

    Raises:
        TypeError: If a factor is not a floating-point tensor.
        ValueError: If there is no factor or the column counts differ.
    """
    check_factors(factors)
    gram = factors[0].T @ factors[0]
    for factor in factors[1:]:
        gram = gram * (factor.T @ factor)
    return gram


def cp_norm(lam: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of the kernel, ``√(λᵀΓλ)``, without building the kernel.

    Args:
        lam: Shape ``(rank,)``.
        factors: Shapes ``(size_n, rank)``.

    Returns:
        Scalar tensor; its gradient is zero where the norm is zero.

    Raises:
        TypeError: If a tensor is not of floating-point type.
        ValueError: If shapes disagree.

    >>> cp_norm(torch.tensor([2.0]), [torch.eye(2)[:, :1], torch.eye(3)[:, :1]])
    tensor(2.)
    """
    check_cp(lam, factors)
    square = lam @ component_gram(factors) @ lam
    positive = square > 0
    return torch.where(positive, square, 1).sqrt() * positive


def canonical_gauge(
    lam: Tensor, factors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Write the same kernel in its canonical gauge.

    Unit columns; λ ≥ 0, in descending order; in every mode but the first the entry of
    largest magnitude is positive, and what remains of the sign sits in mode 0. Two CP
    forms that differ by order, scale or sign of their components become equal.

    Args:
        lam: Component weights, any sign. Shape ``(rank,)``.
        factors: Shapes ``(size_n, rank)``.

    Returns:
        ``(lam, factors)`` of the same shapes and of the same kernel.

    Raises:
        TypeError: If a tensor is not of floating-point type.
        ValueError: If shapes disagree.
    """
    check_cp(lam, factors)
    units, norms = normalize_columns(factors)
    lam = lam * norms.prod(0)
    sign = torch.where(lam < 0, -1, 1).to(lam.dtype)
    for n, unit in enumerate(units[1:], start=1):
        peak = unit.gather(0, unit.abs().argmax(0, keepdim=True))[0]
        flip = torch.where(peak < 0, -1, 1).to(lam.dtype)
        units[n], sign = unit * flip, sign * flip
    units[0] = units[0] * sign
    order = lam.abs().argsort(descending=True, stable=True)
    return lam.abs()[order], [unit[:, order] for unit in units]


def relative_error(kernel: Tensor, approximation: Tensor) -> Tensor:
    """``‖kernel − approximation‖_F / ‖kernel‖_F``; a zero kernel gives 0 or infinity.

    Args:
        kernel: Reference, any shape.
        approximation: Same shape.

    Returns:
        Scalar tensor.

    Raises:
        TypeError: If a tensor is not of floating-point type.
        ValueError: If the shapes differ.

    >>> relative_error(torch.ones(4), torch.zeros(4))
    tensor(1.)
    """
    if kernel.shape != approximation.shape:
        raise ValueError(
            f"approximation has shape {tuple(approximation.shape)}, expected "
            f"{tuple(kernel.shape)} as the kernel."
        )
    check_floating(kernel, "kernel")
    check_floating(approximation, "approximation")
    difference = torch.linalg.vector_norm(kernel - approximation)
    return torch.where(
        difference == 0, difference, difference / torch.linalg.vector_norm(kernel)
    )
