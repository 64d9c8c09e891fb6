"""What CP and low-rank layers share: arguments, geometry, the stages of a chain."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpnb.cp import columnwise_kronecker

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class FactoredLayer(nn.Module):
    """A layer whose kernel is made of factors and stands for one of torch's layers.

    Attributes:
        stock: The torch class this layer stands for.
        kernel_shape: Shape of the full kernel, ``(out, in / groups, *kernel_size)``.
        groups: Groups of the convolution; 1 for a linear layer.
        bias: Shape ``(out,)``, or None.
        factor_names: Parameters whose product is the kernel: Frobenius decay of the
            kernel takes the place of theirs.
        no_decay: Parameters that no weight decay presses on.
    """

    stock: type[nn.Module]
    argument_names: tuple[str, ...] = ("in_features", "out_features", "bias")
    factor_names: tuple[str, ...] = ()
    no_decay: tuple[str, ...] = ()
    kernel_shape: tuple[int, ...]
    groups: int = 1
    rank: Any
    break_even_rank: Any
    bias: nn.Parameter | None

    @classmethod
    def arguments(cls, layer: Any) -> list[Any]:
        """Positional arguments that rebuild ``layer``, stock or of this class."""
        values = [getattr(layer, name) for name in cls.argument_names]
        where = cls.argument_names.index("bias")
        return [*values[:where], layer.bias is not None, *values[where + 1 :]]

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense layer, bias included."""
        bias = 0 if self.bias is None else self.bias.numel()
        return math.prod(self.kernel_shape) + bias

    def extra_repr(self) -> str:
        """Torch's own text, then the rank against break-even."""
        # Not of a stock layer made for it: vmap prints layers, and allows no draws.
        stock = self.stock.extra_repr(self)
        stock = stock.replace("in_features=", "").replace("out_features=", "")
        share = self.rank / self.break_even_rank
        return (
            f"{stock.removesuffix(', bias=True')}, rank={self.rank} ({share:.2f} of "
            f"break-even {self.break_even_rank})"
        )

    def __repr__(self) -> str:
        """One line: the factors are sizes the reader can work out."""
        return f"{type(self).__name__}({self.extra_repr()})"


class ConvGeometry:
    """What a convolution does besides its kernel, for layers of this package."""

    argument_names: tuple[str, ...] = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
        "groups", "bias", "padding_mode",
    )  # fmt: skip

    def set_geometry(self, stock: Any, *arguments: Any, **named: Any) -> torch.Size:
        """Take torch's arguments, `argument_names`; returns the kernel shape."""
        # Torch checks and expands its own arguments; on meta that costs nothing.
        made = stock(*arguments, **named, device="meta")
        self.in_channels = made.in_channels
        self.out_channels = made.out_channels
        self.kernel_size = made.kernel_size
        self.stride = made.stride
        self.padding = made.padding
        self.dilation = made.dilation
        self.output_padding = made.output_padding
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
    window = _weighted_window(lam, spatial)
    mix = source.T.reshape(rank, channels, *(1,) * len(spatial))
    hidden = images.unflatten(1, (groups, -1)).flatten(0, 1)
    if channels == 1 or window[0].numel() == 1:  # one of the two stages is a scaling
        hidden = convolve(hidden, mix * window, **geometry)
    else:
        hidden = convolve(convolve(hidden, mix), window, groups=rank, **geometry)
    return hidden.unflatten(0, (images.shape[0], groups))


def transposed_branches(
    images: Tensor, lam: Tensor, factors: Sequence[Tensor], groups: int, **geometry: Any
) -> Tensor:
    """The same for a transposed convolution, whose input factor the groups slice."""
    source, *spatial = factors
    ones = (1,) * len(spatial)
    mix = source.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    hidden = convolve(images, mix.reshape(*mix.shape, *ones), groups=groups)
    window = _weighted_window(lam, spatial).repeat(groups, 1, *ones)
    hidden = convolve_transposed(hidden, window, groups=len(window), **geometry)
    return hidden.unflatten(1, (groups, -1))


def _weighted_window(lam: Tensor, spatial: Sequence[Tensor]) -> Tensor:
    """λ scales the smallest of the three weights, as in the rebuild."""
    window = (columnwise_kronecker(spatial) * lam).T
    return window.reshape(lam.numel(), 1, *(len(f) for f in spatial))


def convolve_transposed(
    images: Tensor, kernel: Tensor, bias: Tensor | None = None, **geometry: Any
) -> Tensor:
    """Torch's transposed convolution in one, two or three dimensions."""
    function = getattr(F, f"conv_transpose{kernel.ndim - 2}d")
    return function(images, kernel, bias, **geometry)


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
    if images.shape[1] == 1:  # contiguous as it is, whatever stride the channel has
        return images.contiguous()[:, 0, :, :, None].permute(0, 3, 1, 2)
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
