"""What a forward costs: the model that chooses between rebuilding and the chain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Moving one chain element through memory (16 bytes) costs as much time as this many
# floating-point operations: 180 GFLOP/s against 10 GB/s on the x86-64 cores it was
# measured on. It puts the crossover at 0.50-0.73 of R_flop, as measured there.
_COPY_FLOPS = 288
_STEP_FLOPS, _STEP_COPIES = 3, 5  # a training step against an inference


@dataclass(frozen=True)
class ForwardCost:
    """Estimated cost of one forward (or training step) each way, in FLOPs.

    Attributes:
        dense: The stock operation with the full kernel.
        rebuild: Building that kernel from the factors.
        chain: The factorised operation, memory traffic included.
    """

    dense: float
    rebuild: float
    chain: float

    @property
    def mode(self) -> str:
        """The cheaper of ``"dense"`` and ``"chain"``."""
        return "chain" if self.chain < self.dense + self.rebuild else "dense"

    def describe(self, layer: Any, shape: Sequence[int] | None) -> str:
        """Put the choice of a CP layer and its reasons into words."""
        where = "one output position" if shape is None else f"input {tuple(shape)}"
        step = "training step" if torch.is_grad_enabled() else "inference"
        slope = (self.chain - self.rebuild) / layer.rank
        limit = f"below rank {self.dense / slope:.0f}" if slope > 0 else "at every rank"
        return (
            f"{type(layer).__name__} of rank {layer.rank} (break-even "
            f"{layer.break_even_rank}), {where}, {step}:\n"
            f"  auto takes {self.mode!r} (forward_mode is {layer.forward_mode!r})\n"
            f"  dense {self.dense:.3g} FLOPs, plus {self.rebuild:.3g} to rebuild the "
            "kernel\n"
            f"  chain {self.chain:.3g} FLOPs, memory traffic counted as FLOPs\n"
            f"  estimate: the chain wins {limit} (constants measured on x86-64 cores, "
            "not on a GPU)"
        )


def forward_cost(
    kernel_shape: Sequence[int],
    rank: int,
    *,
    rows: int,
    rows_in: int,
    groups: int = 1,
    training: bool = False,
    cached: bool = False,
) -> ForwardCost:
    """Estimate what rebuilding and what the chain would cost.

    Args:
        kernel_shape: ``(out, in / groups, *kernel_size)``.
        rank: Number of components.
        rows: Output positions over the batch, ``batch · height_out · width_out``.
        rows_in: Input positions over the batch; more than ``rows`` with a stride.
        groups: Groups of the convolution.
        training: Whether a backward pass follows.
        cached: Whether the rebuilt kernel can be reused.

    Returns:
        `ForwardCost`.
    """
    out, channels, *size = kernel_shape
    window = math.prod(size)
    multiply_adds = out * channels * window
    flops, copies = (_STEP_FLOPS, _STEP_COPIES) if training else (1, 1)
    # One input channel has no first stage, a 1x1 window no second one.
    first = groups * channels * rows_in if channels > 1 else 0
    second = groups * window * rows if window > 1 else 0
    traffic = groups * _COPY_FLOPS * (rows + rows_in) / 2 if window > 1 else 0
    stages = first + second + out * rows
    return ForwardCost(
        dense=2.0 * flops * rows * multiply_adds,
        rebuild=0.0 if cached else 2.0 * flops * rank * multiply_adds,
        chain=rank * (2.0 * flops * stages + copies * traffic),
    )
