"""What the components of a CP layer add to its outputs, forward and back."""

from __future__ import annotations

import torch
from torch import Tensor

from cpnb.base import CPLayer
from cpnb.conv import CPConv1d, CPConv2d, CPConv3d
from cpnb.execution import pad_factors
from cpnb.linear import CPLinear
from cpnb.refit import finite_components


class Components:
    """The components of one layer, and what goes forward and back through them."""

    def __init__(self, name: str, layer: CPLayer) -> None:
        kinds = (CPConv1d, CPConv2d, CPConv3d, CPLinear)
        if not isinstance(layer, kinds):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise TypeError(
                f"layer {name!r} is a {type(layer).__name__}, expected one of {names} "
                "to look into its components."
            )
        self._layer = layer
        lam, units = finite_components(layer)
        self._lam, dtype = lam, layer.lam.dtype
        factors = pad_factors(lam, units, layer.kernel_shape)
        self._factors = [factor.to(dtype) for factor in factors]
        # (groups, out / groups, rank)
        self._mix = self._factors[0].unflatten(0, (layer.groups, -1))

    def outputs(self, inputs: Tensor) -> Tensor:
        """Of each component, not mixed. Shape ``(batch, groups, rank, positions)``."""
        if isinstance(self._layer, CPLinear):
            hidden = inputs.flatten(1, -2) if inputs.ndim > 2 else inputs[:, None]
            return (hidden @ self._factors[1]).transpose(1, 2)[:, None]
        return self._layer.branches(inputs, self._factors[1:]).flatten(3)

    def contributions(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        """λ_r ∂/∂λ_r for each image. Shape ``(batch, rank)``."""
        if isinstance(self._layer, CPLinear):
            rows = gradient.flatten(1, -2) if gradient.ndim > 2 else gradient[:, None]
            channels = rows.transpose(1, 2)[:, None]
        else:
            channels = gradient.flatten(2).unflatten(1, (self._layer.groups, -1))
        back = self._mix.transpose(1, 2) @ channels
        return self._lam * (back * outputs).sum((1, 3)).double()

    def energies(self, outputs: Tensor) -> Tensor:
        """Squared norms of what each component adds, summed. Shape ``(rank,)``."""
        squares = outputs.double().square().sum(
            (0, 3)
        ) * self._mix.double().square().sum(1)
        return self._lam.square() * squares.sum(0)

    def overlap(self, outputs: Tensor) -> Tensor:
        """Inner products of what unit components add, summed. ``(rank, rank)``."""
        rows = outputs.double().permute(1, 2, 0, 3).flatten(2)
        mix = self._mix.double()
        return ((rows @ rows.transpose(1, 2)) * (mix.transpose(1, 2) @ mix)).sum(0)

    def zero(self, what: str) -> Tensor:
        """What a layer gets that is not used."""
        zeros = torch.zeros_like(self._lam)
        return torch.outer(zeros, zeros) if what == "output" else zeros
