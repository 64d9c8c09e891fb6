"""CP layers with an equilibrated kernel, of the same rank."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from cpnb._normalizers.base import LEARNABLE, Gain, frobenius, start_gain
from cpnb._normalizers.equilibration import cp_equilibrium
from cpnb.base import CPLayer
from cpnb.conv import CPConv1d, CPConv2d, CPConv3d
from cpnb.cp import normalize_columns
from cpnb.execution import fold_norms, pad_factors
from cpnb.linear import CPLinear


class ConditionedCP(CPLayer):
    """Mixin for CP layers with an equilibrated kernel, of which σ is the gain.

    Attributes:
        equilibration: The mode, a key of `SWEEPS`.
        detach: Whether the gradient takes the scales as constants.
    """

    _plain: type[CPLayer]
    equilibration: str
    detach: bool

    def components(
        self, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """As in `CPLayer`, of the equilibrated kernel."""
        stored = [factor.to(dtype) for factor in self.factors]
        lam = fold_norms(self._signed_lam(self.lam).to(dtype), stored)
        lam, factors = self._equilibrated(lam, stored)
        lam = lam * self.scale.to(dtype)
        if not factors:
            return lam, factors
        units, norms = normalize_columns(factors)
        return lam * norms.prod(0), units

    def _unscaled(self) -> tuple[Tensor, list[Tensor]]:
        return self._equilibrated(*super()._unscaled())

    def _equilibrated(
        self, lam: Tensor, stored: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Scale the rows of the first two modes; λ takes the scale of a mode of 1."""
        factors = pad_factors(lam, stored, self.kernel_shape)
        wide = torch.promote_types(lam.dtype, torch.float32)
        with torch.autocast(lam.device.type, enabled=False):
            scales = cp_equilibrium(
                lam.to(wide), [f.to(wide) for f in factors], self.equilibration
            )
        for n, scale in enumerate(scales):
            scale = (scale.detach() if self.detach else scale).to(lam.dtype)
            if self.kernel_shape[n] == 1:
                lam = lam * scale
            else:
                factors[n] = factors[n] * scale[:, None]
        return lam, [
            f for f, n in zip(factors, self.kernel_shape, strict=True) if n > 1
        ]

    def _resize(self, rank: int) -> None:
        raise TypeError(
            f"the layer is a {type(self).__name__} of rank {self.rank}, expected no "
            f"normalizer when its rank changes to {rank}. Call "
            "cpnb.remove_normalizer(model, keep_cp=True) first."
        )

    @torch.no_grad()
    def plain(self) -> CPLayer:
        """The CP layer of the same kernel and rank, without the equilibration."""
        lam, units = self.components(torch.float64)
        new = copy.deepcopy(self)
        new.__class__ = self._plain
        del new.equilibration, new.detach
        # |λ| is used where λ is not signed: the sign of σ, the only one, stays there.
        new.scale.fill_(-1 if not self.signed and self.scale < 0 else 1)
        new.scale.requires_grad_(self.lam.requires_grad)
        new.lam.copy_(lam * new.scale)
        for factor, unit in zip(new.factors, units, strict=True):
            factor.copy_(unit)
        return new

    def extra_repr(self) -> str:
        """The text of the plain layer, then the mode."""
        detached = ", detach=True" if self.detach else ""
        return f"{super().extra_repr()}, mode={self.equilibration!r}{detached}"


class ConditionedCPConv1d(ConditionedCP, CPConv1d):
    """`CPConv1d` with an equilibrated kernel."""

    _plain = CPConv1d


class ConditionedCPConv2d(ConditionedCP, CPConv2d):
    """`CPConv2d` with an equilibrated kernel."""

    _plain = CPConv2d


class ConditionedCPConv3d(ConditionedCP, CPConv3d):
    """`CPConv3d` with an equilibrated kernel."""

    _plain = CPConv3d


class ConditionedCPLinear(ConditionedCP, CPLinear):
    """`CPLinear` with an equilibrated kernel."""

    _plain = CPLinear


_CONDITIONED = {
    kind._plain: kind
    for kind in (
        *(ConditionedCPConv1d, ConditionedCPConv2d, ConditionedCPConv3d),
        ConditionedCPLinear,
    )
}


@torch.no_grad()
def conditioned_cp(layer: CPLayer, mode: str, detach: bool, gain: Gain) -> CPLayer:
    """Turn a CP layer, in place, into its conditioned kind; σ becomes the gain."""
    norm, sign = frobenius(layer.weight), -1 if layer.scale < 0 else 1
    # A class of its own per kind, not one per layer as torch's parametrisations make.
    layer.__class__ = _CONDITIONED[type(layer)]
    layer.equilibration, layer.detach = mode, detach
    layer.scale.fill_(1.0)
    layer.scale.fill_(sign * start_gain(gain, norm, frobenius(layer.weight)))
    layer.scale.requires_grad_(gain == LEARNABLE and layer.lam.requires_grad)
    return layer
