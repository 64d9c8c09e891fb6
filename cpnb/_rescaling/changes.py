"""What a rescaling does to the parameters of one layer, and to their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cpnb.base import CPLayer
from cpnb.lowrank_base import LowRankLayer


@dataclass(frozen=True)
class Change:
    """What the parameters of a layer are multiplied by, elementwise.

    Attributes:
        parameters: Those of the layer that change.
        factors: One per parameter, of a shape that broadcasts to it.
    """

    parameters: Sequence[nn.Parameter]
    factors: Sequence[Tensor]

    def carry_(self, gradients: Sequence[Tensor | None]) -> None:
        """Turn gradients, or running means of them, into those after the change.

        To be called before the parameters change.

        Args:
            gradients: One per parameter, None where there is none.
        """
        for gradient, factor in zip(gradients, self.factors, strict=True):
            if gradient is not None:
                gradient.div_(factor)


@dataclass(frozen=True)
class CanonicalChange(Change):
    """The change of a CP layer, whose first parameter is λ.

    The growth of a column, which λ takes from it, depends on the column. So the change
    is not linear, and gradients are turned by its derivative at this very point.

    Attributes:
        count: How many factors change; they come after λ.
    """

    count: int

    def carry_(self, gradients: Sequence[Tensor | None]) -> None:
        """As `Change.carry_`."""
        lam = self.parameters[0]
        along_lam = 0 if gradients[0] is None else gradients[0] * lam
        for n in range(1, self.count + 1):
            gradient, f, factor = gradients[n], self.parameters[n], self.factors[n]
            if gradient is None:
                continue
            square = (f * f).sum(0)
            slope = ((gradient * f).sum(0) - along_lam) / square
            radial = f * torch.where(square > 0, slope, 0)
            gradient.sub_(radial).addcmul_(radial * factor, factor)
        super().carry_(gradients)


def canonical_change(layer: CPLayer, rows: Tensor, columns: Tensor) -> CanonicalChange:
    """Multiply the rows of a CP kernel by ``rows``, divide its columns by ``columns``.

    A factor f with row scale e becomes ``e·f / t``, with ``t_r = ‖e·f_r‖ / ‖f_r‖``, and
    λ is multiplied by t: the columns keep the norms they have.

    Args:
        layer: Not changed yet.
        rows: Shape ``(groups, out / groups)``.
        columns: Shape ``(groups, in / groups)``, the same for each group unless it has
            one input only: all groups share the factor of the inputs.
    """
    out, per_group = layer.kernel_shape[:2]
    if per_group == 1:  # no factor of the inputs, but each row has just one
        outputs, inputs = (rows / columns).flatten(), []
    else:
        outputs, inputs = rows.flatten(), [1 / columns[0]]
    scales = [outputs, *inputs] if out > 1 else inputs
    changed = list(layer.factors)[: len(scales)]
    lam_factor, factors = torch.ones_like(layer.lam), []
    for f, scale in zip(changed, scales, strict=True):
        square = f * f
        before, after = square.sum(0), scale.square().to(f.dtype) @ square
        growth = torch.where(before > 0, after / before, 1).sqrt()
        lam_factor = lam_factor * growth
        factors.append(scale[:, None] / growth)
    parameters, factors = [layer.lam, *changed], [lam_factor, *factors]
    if out == 1:  # no factor of the outputs
        parameters.append(layer.scale)
        factors.append(outputs[0])
    if layer.bias is not None:
        parameters.append(layer.bias)
        factors.append(rows.flatten())
    return CanonicalChange(parameters, factors, len(scales))


def low_rank_change(layer: LowRankLayer, rows: Tensor, columns: Tensor) -> Change:
    """Multiply the rows of ``U Vᵀ`` in U, divide its columns in V; M stays.

    Args:
        layer: Not changed yet.
        rows: Shape ``(groups, out / groups)``.
        columns: Shape ``(groups, in / groups)``.
    """
    parameters, factors = [], []
    for matrix, scale in ((layer.left, rows), (layer.right, 1 / columns)):
        scale = scale.flatten()
        parameters.append(matrix)
        # A channel has one row of the matrix for each row or column of the window.
        factors.append(scale.repeat_interleave(len(matrix) // len(scale))[:, None])
    if layer.bias is not None:
        parameters.append(layer.bias)
        factors.append(rows.flatten())
    return Change(parameters, factors)
