"""What a convolution does besides its kernel: stride, padding, dilation, groups."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_GEOMETRY = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
    *("dilation", "groups", "padding_mode"),
)


def adopt_geometry(
    layer: nn.Module, stock: type[nn.Module], *arguments: Any
) -> torch.Size:
    """Give a layer what torch makes of a convolution's arguments; the kernel's shape.

    Args:
        layer: The layer under construction.
        stock: Torch's class.
        arguments: Those of torch from ``in_channels`` to ``groups``, then
            ``padding_mode``.

    Raises:
        ValueError: If a size is below 1, or torch refuses an argument.
    """
    in_channels, out_channels, kernel_size, *rest, padding_mode = arguments
    sizes = kernel_size if isinstance(kernel_size, Sequence) else (kernel_size,)
    if min(in_channels, out_channels, *sizes) < 1:
        raise ValueError(
            f"in_channels={in_channels}, out_channels={out_channels}, "
            f"kernel_size={kernel_size}, expected every size >= 1."
        )
    # Torch checks and expands its own arguments; on meta that costs nothing.
    made = stock(*arguments[:3], *rest, False, padding_mode, device="meta")
    for name in _GEOMETRY:
        setattr(layer, name, getattr(made, name))
    return made.weight.shape


def conv_arguments(layer: nn.Module) -> tuple:
    """Positional arguments that rebuild a convolution, stock or of this package."""
    return (
        *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride),
        *(layer.padding, layer.dilation, layer.groups, layer.bias is not None),
        layer.padding_mode,
    )


def margins(layer: nn.Module) -> list[int]:
    """Padding before and after each axis, last axis first, as `F.pad` wants it."""
    found: list[int] = []
    for n in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[n] * (layer.kernel_size[n] - 1)
            found += [total // 2, total - total // 2]
        else:
            found += [0 if layer.padding == "valid" else layer.padding[n]] * 2
    return found


def along_axis(layer: nn.Module, axis: int) -> dict[str, Any]:
    """Stride, padding and dilation along one axis, neutral along the others; groups."""

    def along(values: Sequence[int], neutral: int) -> tuple[int, ...]:
        return tuple(v if n == axis else neutral for n, v in enumerate(values))

    padding = layer.padding
    return {
        "stride": along(layer.stride, 1),
        "padding": padding if isinstance(padding, str) else along(padding, 0),
        "dilation": along(layer.dilation, 1),
        "groups": layer.groups,
    }
