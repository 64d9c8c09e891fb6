"""The CP linear layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpnb.base import CPLayer
from cpnb.costs import ForwardCost
from cpnb.execution import pad_factors
from cpnb.initializers import CPForm


class CPLinear(CPLayer):
    """Linear layer with a CP weight, ``σ Σ_r λ_r â_r∘b̂_r``.

    Args:
        in_features: Input features.
        out_features: Output features.
        bias: Whether to add a bias.
        rank: As in `CPConv2d`, like every argument that follows.
        init: See `CPConv2d`.
        forward_mode: See `CPConv2d`.
        signed: See `CPConv2d`.
        device: Of the parameters.
        dtype: Of the parameters.
        generator: Source of the random start.

    Raises:
        TypeError: If ``rank`` or ``dtype`` is of the wrong kind.
        ValueError: If an argument is out of range or a name unknown.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509.

    >>> CPLinear(20, 10, rank=3).weight.shape
    torch.Size([10, 20])
    """

    _stock = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int | float | str = "same",
        init: str | Callable[..., CPForm] = "unified",
        forward_mode: str = "auto",
        signed: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise ValueError(
                f"in_features={in_features}, out_features={out_features}, expected "
                "both >= 1."
            )
        self.in_features, self.out_features = in_features, out_features
        self._build(
            (out_features, in_features),
            rank=rank,
            init=init,
            forward_mode=forward_mode,
            signed=signed,
            bias=bias,
            device=device,
            dtype=dtype,
            generator=generator,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        if self._choose(input.shape) == "dense":
            return F.linear(input, self._kernel(), self.bias)
        lam, factors = self._folded()
        output, source = pad_factors(lam, factors, self.kernel_shape)
        hidden = F.linear(input, (source * lam).T)
        return F.linear(hidden, output, self.bias)

    def cost(self, shape: Sequence[int] | None) -> ForwardCost:
        """Estimated cost of both forwards for an input of this shape."""
        if shape is None:
            return replace(self._cost(1, 1), rebuild=0.0)
        rows = math.prod(shape[:-1])
        return self._cost(rows, rows)

    @staticmethod
    def _arguments(layer: nn.Module) -> tuple:
        return layer.in_features, layer.out_features, layer.bias is not None

    def extra_repr(self) -> str:
        """Sizes, then the text of `CPLayer`."""
        bias = "" if self.bias is not None else "bias=False, "
        return f"{self.in_features}, {self.out_features}, {bias}{super().extra_repr()}"
