"""What a convolution does besides its kernel: geometry, layout, the chain's stages."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpnb.cp import columnwise_kronecker

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvGeometry:
    """What a convolution does besides its kernel, for layers of this package."""

    argument_names: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "bias",
        "padding_mode",
    )

    def set_geometry(self, stock: type[nn.Module], *arguments: Any) -> torch.Size:
        """Take torch's arguments, all of `argument_names`; returns the kernel shape."""
        # Torch checks and expands its own arguments; on meta that costs nothing.
        made: Any = stock(*arguments, device="meta")
        self.in_channels = made.in_channels
        self.out_channels = made.out_channels
        self.kernel_size = made.kernel_size
        self.stride = made.stride
        self.padding = made.padding
        self.dilation = made.dilation
        self.output_padding = made.output_padding  # for torch's text of a layer
        self.groups = made.groups
        self.padding_mode = made.padding_mode
        return made.weight.shape

    def padded(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The input to convolve, padded already unless with zeros, and how."""
        padding = self.padding
        if self.padding_mode != "zeros":
            margins = _margins(padding, self.kernel_size, self.dilation)
            images = F.pad(images, margins, mode=self.padding_mode)
            padding = 0
        return images, {
            "stride": self.stride,
            "padding": padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }


def convolve(
    images: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | str | int = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
) -> Tensor:
    """Torch's convolution, with a pointwise one subsampling first instead of striding.

    It is cheaper, and oneDNN's weight gradient of a strided 1×1 convolution corrupts
    memory on inputs stored channels_last
    (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    ndim = kernel.ndim - 2
    steps = (stride,) * ndim if isinstance(stride, int) else tuple(stride)
    if math.prod(steps) > 1 and math.prod(kernel.shape[2:]) == 1:
        images = F.pad(images, _margins(padding, (1,) * ndim, (1,) * ndim))
        for axis, step in enumerate(steps, start=-ndim):
            images = images.transpose(axis, -1)[..., ::step].transpose(axis, -1)
        steps = (1,) * ndim
        padding = 0
    return _CONV[ndim](images, kernel, bias, steps, padding, dilation, groups)


def _margins(
    padding: Sequence[int] | str | int, size: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Padding before and after each axis, last axis first, as `F.pad` wants it."""
    margins: list[int] = []
    for n in reversed(range(len(size))):
        if padding == "same":
            total = dilation[n] * (size[n] - 1)
            margins += [total // 2, total - total // 2]
        elif isinstance(padding, str):
            margins += [0, 0]
        else:
            margins += [padding if isinstance(padding, int) else padding[n]] * 2
    return margins


def conv_branches(
    images: Tensor, lam: Tensor, factors: Sequence[Tensor], groups: int, **geometry: Any
) -> Tensor:
    """First two stages of the chain; see `cpnb.layers.CPConv.branches`."""
    source, *spatial = factors
    rank = lam.numel()
    channels = source.shape[0]
    # λ scales the window, the smallest of the three weights, as in the rebuild.
    window = (columnwise_kronecker(spatial) * lam).T
    window = window.reshape(rank, 1, *(len(f) for f in spatial))
    mix = source.T.reshape(rank, channels, *(1,) * len(spatial))
    hidden = images.unflatten(1, (groups, channels)).flatten(0, 1)
    if channels == 1 or window[0].numel() == 1:  # one of the two stages is a scaling
        hidden = convolve(hidden, mix * window, **geometry)
    else:
        hidden = convolve(convolve(hidden, mix), window, groups=rank, **geometry)
    return hidden.unflatten(0, (images.shape[0], groups))


def is_channels_last(images: Tensor) -> bool:
    """Whether the layout is channels_last beyond doubt, also for a single channel."""
    return (
        images.ndim in (4, 5)
        and images.stride(1) == 1
        and math.prod(images.shape[2:]) > 1
        and images.movedim(1, -1).is_contiguous()
    )


def innermost(images: Tensor) -> Tensor:
    """Channels innermost, where the depthwise stage of two dimensions is twice as fast.

    Not ``contiguous(memory_format=torch.channels_last)``, which vmap does not know.
    """
    if images.ndim != 4:
        return images
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
