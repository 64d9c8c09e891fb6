"""Weight conditioning: kernels whose rows, or columns, have equal norms.

A layer with the kernel W uses ``gain · E W`` with ``E = diag(1/‖W_o‖)`` in its place.

Source: Saratchandran, Wang, Lucey 2024, arXiv:2409.03424. How kernels of convolutions
are unfolded, one row per output and by group, is re-derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cpnb.cp import component_gram, normalize_columns
from cpnb.layers import CPLayer, pad_factors

# Rows come last, so that their norms are exact where both are scaled in turn.
SWEEPS = {"row": "r", "column": "c", "row-column": "crcrcr"}
RELU_GAIN = math.sqrt(2)  # for rows of norm 1: ReLU halves the power of the signal


def condition_(layer: Any, *, mode: str = "row", gain: float = RELU_GAIN) -> None:
    """Let a layer use its equilibrated kernel, whose rows have norm ``gain`` (in RMS).

    Args:
        layer: A stock convolution or linear layer; or a CP layer, by rows only. It
            keeps its rank, and σ is its gain.
        mode: ``"row"``, ``"column"`` or ``"row-column"``, of each group's matrix.
            By rows a layer is that of weight norm with lengths that stay at the gain.
        gain: Factor of the equilibrated kernel.
    """
    canonical = issubclass(type(layer), CPLayer)
    modes = ("row",) if canonical else tuple(SWEEPS)
    if mode not in modes:
        raise ValueError(
            f"mode is {mode!r}, expected one of {modes} for a {type(layer).__name__}."
        )
    if not canonical:
        reparametrize_(layer, gain, partial(_equilibrated, mode=mode))
        return
    register = parametrize.register_parametrization
    with torch.no_grad():
        layer.scale.fill_(-gain if layer.scale < 0 else gain)
        layer.unit.fill_(1.0)
    layer.scale.requires_grad_(False)
    register(layer, "lam", ConditionedCP(layer, "lam"))
    if layer.kernel_shape[0] > 1:
        register(layer.factors, "0", ConditionedCP(layer, "rows"))


def reparametrize_(
    layer: Any, gain: float, constrain: Callable[[Tensor], Tensor]
) -> None:
    """Let a stock layer use ``gain · constrain(matrices)`` in place of its kernel.

    The matrices, one for each group, have shape ``(groups, out / groups, fan_in)``.
    """
    module = Reparametrization(getattr(layer, "groups", 1), gain, constrain)
    parametrize.register_parametrization(layer, "weight", module)


class Reparametrization(nn.Module):
    """A kernel computed from another one; see `reparametrize_`."""

    def __init__(
        self, groups: int, gain: float, constrain: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.groups = groups
        self.gain = gain
        self.constrain = constrain

    def forward(self, kernel: Tensor) -> Tensor:
        """The constrained kernel, in full precision also under autocast."""
        with torch.autocast(kernel.device.type, enabled=False):
            matrix = kernel.reshape(self.groups, len(kernel) // self.groups, -1)
            return (self.gain * self.constrain(matrix)).reshape(kernel.shape)


def _equilibrated(matrix: Tensor, mode: str) -> Tensor:
    """Rows of norm 1; columns alone ``√(rows / columns)``; both in turn."""
    squares = matrix.square()
    rows = torch.ones_like(squares[:, :, :1])
    columns = torch.ones_like(squares[:, :1])
    for side in SWEEPS[mode]:
        if side == "r":
            rows = _inverse_root(squares @ columns.square().mT)
        else:
            columns = _inverse_root(rows.square().mT @ squares)
    if mode == "column":
        columns = columns * math.sqrt(matrix.shape[1] / matrix.shape[2])
    return matrix * rows * columns


class ConditionedCP(nn.Module):
    """λ, or the factor of the outputs, of an equilibrated CP kernel.

    ``E W = Σ_r λ_r (E â_r)∘b̂_r∘…``: the rows of the factor take the scales, and λ the
    length that its columns have then. The part is ``"lam"`` or ``"rows"``.
    """

    def __init__(self, layer: CPLayer, part: str) -> None:
        super().__init__()
        self._layer = (layer,)  # not a submodule: it would be one of its own
        self.part = part

    def forward(self, stored: Tensor) -> Tensor:
        """What takes the place of the stored parameter."""
        (layer,) = self._layer
        lam = _stored(layer, "lam")
        factors = [_stored(layer.factors, str(n)) for n in range(len(layer.factors))]
        with torch.autocast(stored.device.type, enabled=False):
            units = normalize_columns(factors)[0] if factors else []
            output, *others = pad_factors(lam, units, layer.kernel_shape)
            active = slice(layer.active_rank)
            rows, used = output[:, active], (lam if layer.signed else lam.abs())[active]
            # ‖W_o‖² = a_o Λ (BᵀB * CᵀC * DᵀD) Λ a_oᵀ, without the kernel.
            gram = component_gram([used[None], *(unit[:, active] for unit in others)])
            scales = _inverse_root(((rows @ gram) * rows).sum(1, keepdim=True))
            (rows,), (lengths,) = normalize_columns([output * scales])
            return rows if self.part == "rows" else lam * lengths


def _stored(module: Any, name: str) -> Any:
    """A parameter as it is stored, behind its parametrization if it has one."""
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original
    return getattr(module, name)


def _inverse_root(squares: Tensor) -> Tensor:
    """``1/√x``; 0 with zero gradient where x is too small, so that zeros stay put."""
    alive = squares >= torch.finfo(squares.dtype).tiny
    return torch.where(alive, squares, 1).rsqrt() * alive
