"""Weight conditioning: kernels whose rows, or columns, have equal norms."""

from __future__ import annotations

from torch import Tensor, nn

from cpnb._normalizers.base import (
    RELU_GAIN,
    Gain,
    Reparametrization,
    per_layer,
    reparametrized,
)
from cpnb._normalizers.conditioned_cp import conditioned_cp
from cpnb._normalizers.equilibration import SWEEPS, equilibrate
from cpnb.base import CPLayer
from cpnb.surgery import Skip


class Conditioned(Reparametrization):
    """See `equilibrate`."""

    def __init__(self, layer: nn.Module, mode: str, detach: bool) -> None:
        super().__init__(layer)
        self.mode, self.detach = mode, detach

    def constrain(self, matrix: Tensor) -> Tensor:
        """Equilibrated matrix."""
        return equilibrate(matrix, self.mode, self.detach)


def conditioned(
    model: nn.Module,
    skip: Skip,
    *,
    mode: str = "row",
    detach: bool = False,
    gain: Gain = RELU_GAIN,
) -> nn.Module:
    """Weight conditioning."""
    if mode not in SWEEPS:
        raise ValueError(f"mode is {mode!r}, expected one of {tuple(SWEEPS)}.")
    if not isinstance(detach, bool):
        raise TypeError(f"detach is {detach!r}, expected True or False.")

    def normalise(layer: nn.Module) -> nn.Module:
        if isinstance(layer, CPLayer):
            return conditioned_cp(layer, mode, detach, gain)
        return reparametrized(layer, Conditioned(layer, mode, detach), gain)

    return per_layer(model, skip, normalise, factorised=(CPLayer,))
