"""CP convolutions: drop-in replacements for torch's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpnb.base import CPLayer
from cpnb.costs import ForwardCost
from cpnb.execution import CONV, conv_branches, conv_chain, pad_factors
from cpnb.geometry import adopt_geometry, conv_arguments, margins
from cpnb.initializers import CPForm


class _CPConv(CPLayer):
    """Convolution with a CP kernel, in any number of spatial dimensions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
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
        shape = adopt_geometry(
            *(self, self._stock, in_channels, out_channels, kernel_size, stride),
            *(padding, dilation, groups, padding_mode),
        )
        self._build(
            shape,
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
        """Convolve ``(batch, in, *size)``, or one image without the batch axis."""
        input, geometry = self._padded(input)
        if self._choose(input.shape) == "dense":
            kernel = self._kernel(_is_channels_last(input))
            return CONV[len(self.kernel_size)](input, kernel, self.bias, **geometry)
        batched = input.ndim == len(self.kernel_shape)
        batch = input if batched else input[None]
        lam, stored = self._folded()
        factors = pad_factors(lam, stored, self.kernel_shape)
        if batch.shape[1] != self.in_channels:
            raise RuntimeError(
                f"input has shape {tuple(input.shape)}, expected {self.in_channels} "
                "channels."
            )
        if batch.ndim != 4:
            output = conv_chain(batch, lam, factors, self.bias, **geometry)
            return output if batched else output[0]
        # The depthwise stage runs about twice as fast in this layout.
        output = conv_chain(_innermost(batch), lam, factors, self.bias, **geometry)
        last = _is_channels_last(batch)
        output = _innermost(output) if last else output.contiguous()
        return output if batched else output[0]

    def branches(self, images: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """What each component of a kernel like this one's sends to its outputs.

        Args:
            images: Shape ``(batch, in, *size)``.
            factors: One per mode but the output's, also of size 1. Shapes
                ``(size_n, rank)`` for any rank.

        Returns:
            Shape ``(batch, groups, rank, *size_out)``.
        """
        images, geometry = self._padded(images)
        if images.ndim == 4:  # the depthwise stage runs about twice as fast so
            images = _innermost(images)
        lam = factors[0].new_ones(factors[0].shape[1])
        return conv_branches(images, lam, factors, **geometry)

    def _padded(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The input to convolve and how: padded already unless with zeros."""
        padding = self.padding
        if self.padding_mode != "zeros":
            images, padding = F.pad(images, margins(self), mode=self.padding_mode), 0
        return images, {
            "stride": self.stride,
            "padding": padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def cost(self, shape: Sequence[int] | None) -> ForwardCost:
        """Estimated cost of both forwards for an input of this shape."""
        steps = math.prod(self.stride)
        if shape is None:
            return replace(self._cost(1, steps), rebuild=0.0)
        batch = shape[0] if len(shape) == len(self.kernel_shape) else 1
        positions = batch * math.prod(shape[-len(self.kernel_size) :])
        return self._cost(max(1, positions // steps), positions)

    _arguments = staticmethod(conv_arguments)

    def extra_repr(self) -> str:
        """Torch's own text for the geometry, then that of `CPLayer`."""
        stock = self._stock(*self._arguments(self), device="meta")
        return f"{stock.extra_repr()}, {super().extra_repr()}"


class CPConv1d(_CPConv):
    """1-D convolution with a CP kernel; arguments and errors as in `CPConv2d`."""

    _stock = nn.Conv1d


class CPConv2d(_CPConv):
    """2-D convolution with a CP kernel: canonical weight normalization.

    ``weight = σ Σ_r λ_r â_r∘b̂_r∘ĉ_r∘d̂_r``, hats for columns of unit 2-norm. Positional
    arguments are those of `torch.nn.Conv2d`.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: One size or one per spatial axis.
        stride: One step or one per spatial axis.
        padding: As torch: int, one per axis, ``"same"`` or ``"valid"``.
        dilation: One or one per spatial axis.
        groups: Groups; they share all factors but the output one, which is sliced.
        bias: Whether to add a bias.
        padding_mode: As torch: zeros, reflect, replicate or circular.
        rank: Number of components (int), fraction of the break-even rank (float in
            (0, 1]), or ``"same"`` for the break-even rank.
        init: A name in `cpnb.INITIALIZERS` or a function like `cpnb.unified`.
        forward_mode: ``"dense"`` rebuilds the kernel, ``"chain"`` convolves through the
            components, ``"auto"`` takes the one estimated cheaper (see `explain`).
        signed: False uses |λ|, as the paper's released code does.
        device: Of the parameters.
        dtype: Of the parameters.
        generator: Source of the random start; torch's default one if None.

    Raises:
        TypeError: If ``rank`` or ``dtype`` is of the wrong kind.
        ValueError: If an argument is out of range or a name unknown.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509.

    >>> layer = CPConv2d(32, 64, 3, padding=1, rank=0.25)
    >>> layer.rank, layer.break_even_rank, layer.weight.shape
    (45, 179, torch.Size([64, 32, 3, 3]))
    >>> layer(torch.zeros(1, 32, 8, 8)).shape
    torch.Size([1, 64, 8, 8])
    """

    _stock = nn.Conv2d


class CPConv3d(_CPConv):
    """3-D convolution with a CP kernel; arguments and errors as in `CPConv2d`."""

    _stock = nn.Conv3d


def _is_channels_last(images: Tensor) -> bool:
    """Whether the layout is channels_last beyond doubt, also for a single channel."""
    return (
        images.ndim in (4, 5)
        and images.stride(1) == 1
        and math.prod(images.shape[2:]) > 1
        and images.movedim(1, -1).is_contiguous()
    )


def _innermost(images: Tensor) -> Tensor:
    """The images with the channels innermost, copied where they are not."""
    # contiguous(memory_format=torch.channels_last) is not there under vmap.
    return images.movedim(1, -1).contiguous().movedim(-1, 1)
