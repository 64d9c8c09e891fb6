"""Least squares for the λ of the components that stay."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from cpnb.base import CPLayer
from cpnb.cp import component_gram


def finite_components(layer: CPLayer) -> tuple[Tensor, list[Tensor]]:
    """λ with σ folded in and the unit factors of a layer, in float64.

    Args:
        layer: A CP layer.

    Returns:
        λ, shape ``(rank,)``, and the factors of the modes of size > 1, shapes
        ``(size_n, rank)``; without gradients.

    Raises:
        ValueError: If a parameter is not finite.
    """
    lam, units = layer.components(torch.float64)
    if not all(t.isfinite().all() for t in (lam, *units)):
        raise ValueError(
            f"the {type(layer).__name__} has NaN or infinite parameters, expected "
            "finite ones. Go back to a checkpoint from before training diverged."
        )
    return lam.detach(), [unit.detach() for unit in units]


def unit_gram(lam: Tensor, units: Sequence[Tensor]) -> Tensor:
    """Inner products Γ between unit components. Shape ``(rank, rank)``."""
    if not units:  # every mode of size 1: each component is the number λ_r
        return lam.new_ones(len(lam), len(lam))
    return component_gram(units)


def refit_lam(lam: Tensor, gram: Tensor, index: Tensor) -> Tensor:
    """λ' of the kept components with the least error against all of them.

    Minimises ``dᵀ gram d`` over the λ' of the kept, where d is λ − λ' on them and λ on
    the others. With Γ for ``gram`` that is the squared error of the kernel, with
    `output_gram` that of the layer's outputs.

    Args:
        lam: λ of all components. Shape ``(rank,)``.
        gram: Positive semi-definite. Shape ``(rank, rank)``.
        index: Components that stay, distinct. Shape ``(kept,)``.

    Returns:
        λ' in the order of ``index``; never of larger error than λ itself.
    """
    dropped = torch.ones_like(lam, dtype=torch.bool)
    dropped[index] = False
    inverse = torch.linalg.pinv(gram[index][:, index], hermitian=True)
    moved = inverse @ (gram[index] @ (lam * dropped))
    error = lam * dropped
    before = error @ gram @ error
    error[index] = -moved
    # Where the kept components are all but dependent, rounding may make it worse.
    return lam[index] + moved * (error @ gram @ error <= before)


@torch.no_grad()
def keep_components(
    layer: CPLayer, index: Tensor, lam: Tensor | None = None
) -> CPLayer:
    """Copy a layer with some of its components, as they are or with other λ.

    Args:
        layer: A CP layer.
        index: The components, distinct, in the order they are to have.
        lam: Their λ with σ folded in; as they are if None. Shape as ``index``.

    Returns:
        A copy of rank ``len(index)``.
    """
    cut = copy.deepcopy(layer)
    cut._resize(len(index))
    for new, old in zip(cut.factors, layer.factors, strict=True):
        new.copy_(old[:, index])
    if lam is None:
        cut.lam.copy_(layer.lam[index])
        return cut
    scale = layer.scale.double()
    lam = lam / torch.where(scale == 0, 1, scale)
    if not layer.signed and len(cut.factors):  # |λ| is used: the signs move elsewhere
        cut.factors[0].mul_(torch.where(lam < 0, -1, 1))
    cut.lam.copy_(lam)
    return cut
