"""How each kind of layer takes a scale on its outputs and on its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from cpnb._rescaling.changes import Change, canonical_change, low_rank_change
from cpnb.base import CPLayer
from cpnb.conv import CPConv1d, CPConv2d, CPConv3d
from cpnb.linear import CPLinear
from cpnb.lowrank import LowRankConv2d, LowRankLinear
from cpnb.lowrank_base import LowRankLayer

# Kinds of layers, with the numbers of axes that their inputs may have.
_CONVOLUTIONS = {
    **{nn.Conv1d: (3,), nn.Conv2d: (4,), nn.Conv3d: (5,)},
    **{CPConv1d: (3,), CPConv2d: (4,), CPConv3d: (5,), LowRankConv2d: (4,)},
}
_LINEAR = {nn.Linear: (2,), CPLinear: (2,), LowRankLinear: (2,)}
WEIGHTED = {**_CONVOLUTIONS, **_LINEAR}
BATCH_NORMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
NORMS = {
    **BATCH_NORMS,
    nn.GroupNorm: (2, 3, 4, 5),
    **{nn.InstanceNorm1d: (3,), nn.InstanceNorm2d: (4,), nn.InstanceNorm3d: (5,)},
}


@dataclass(frozen=True)
class Layer:
    """A layer of a model with the units it writes and reads.

    Attributes:
        name: In the model.
        module: A weighted layer or a norm.
        rows: Unit of each output. Shape ``(groups, out / groups)``.
        columns: Unit of each input. Shape ``(groups, in / groups)``. A norm, which
            takes the scale of its input away, is one weight per group that reads
            nothing.
        cancelled: Units whose scale batch norm is to take away, or None. Shape
            ``(in,)``.
    """

    name: str
    module: nn.Module
    rows: Tensor
    columns: Tensor
    cancelled: Tensor | None = None

    def squares(self, dtype: torch.dtype) -> Tensor:
        """Squared norms by output and input: ``(groups, out/groups, in/groups)``."""
        weight = self.module.weight.detach().to(dtype)
        squares = weight.square().flatten(2).sum(2) if weight.ndim > 2 else weight**2
        return squares.reshape(*self.rows.shape, self.columns.shape[1])

    def row_squares(self, squares: Tensor, scales: Tensor) -> Tensor:
        """Squared norm of each row, of the layer scaled thus. Shape ``(out,)``."""
        rows, columns = scales[self.rows].square(), scales[self.columns].square()
        return ((squares @ (1 / columns)[..., None])[..., 0] * rows).flatten()

    def column_squares(self, squares: Tensor, scales: Tensor) -> Tensor:
        """Squared norm of each column, of the layer scaled thus. Shape ``(in,)``."""
        rows, columns = scales[self.rows].square(), scales[self.columns].square()
        return ((rows[:, None] @ squares)[:, 0] / columns).flatten()

    def change(self, scales: Tensor) -> Change:
        """Multiply each row by the scale of its unit, divide each column by its own."""
        rows, columns = scales[self.rows], scales[self.columns]
        if isinstance(self.module, CPLayer):
            return canonical_change(self.module, rows, columns)
        if isinstance(self.module, LowRankLayer):
            return low_rank_change(self.module, rows, columns)
        weight, bias = self.module.weight, self.module.bias
        factor = (rows[:, :, None] / columns[:, None]).flatten(0, 1)
        spare = weight.ndim - 2  # a norm has no axis of inputs
        factor = factor[:, 0] if spare < 0 else factor[(..., *[None] * spare)]
        if bias is None:
            return Change([weight], [factor])
        return Change([weight, bias], [factor, rows.flatten()])

    def cancel_(self, scales: Tensor) -> None:
        """Let the running statistics of a batch norm follow the scale of its input."""
        norm = self.module
        if self.cancelled is None or norm.running_var is None:
            return
        scale = scales[self.cancelled]
        norm.running_mean.mul_(scale)
        # So that √(variance + eps) is multiplied by the scale exactly.
        norm.running_var.add_(norm.eps).mul_(scale * scale).sub_(norm.eps)

    def train_error(self, scales: Tensor) -> float:
        """What batch norm does not cancel in training, ``½·eps·|1 − 1/d²| / var``."""
        norm = self.module
        if self.cancelled is None or norm.running_var is None:
            return 0.0
        uncancelled = norm.eps / 2 * (1 - scales[self.cancelled].pow(-2)).abs()
        return (uncancelled / (norm.running_var + norm.eps)).max().item()


def unfit(module: nn.Module) -> str | None:
    """Why a layer cannot be scaled, or None."""
    if is_parametrized(module) or getattr(module, "equilibration", None):
        return (
            "is normalised, and its weight would be computed anew; expected plain "
            "parameters. Call cpnb.remove_normalizer first."
        )
    if type(module) not in WEIGHTED and type(module) not in NORMS:
        kinds = ", ".join(kind.__name__ for kind in (*WEIGHTED, *NORMS))
        return f"cannot be rescaled, expected one of {kinds}."
    return None


def layer_sizes(module: nn.Module) -> tuple[int, int, int]:
    """Inputs, outputs and groups of a layer or norm."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features, 1
    if hasattr(module, "in_channels"):
        return module.in_channels, module.out_channels, module.groups
    grouped = isinstance(module, nn.GroupNorm)
    count = module.num_channels if grouped else module.num_features
    return count, count, count
