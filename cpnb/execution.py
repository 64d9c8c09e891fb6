"""The two forwards of a CP layer: the kept dense kernel and the factorised chain."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpnb.cp import inverse_norms, khatri_rao, rebuild

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class KernelCache:
    """Keeps a rebuilt kernel for as long as its parameters keep their values.

    Only without gradients, on a CPU, outside transforms, autocast and compilers. It
    compares values, not version counters, which an edit through ``.data`` does not
    move; on a GPU that comparison would cost a synchronisation.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._kept: tuple[bool, list[Tensor], Tensor] | None = None

    @staticmethod
    def usable(parameter: Tensor) -> bool:
        """Whether a kernel made of this parameter may be kept, here and now."""
        return not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or type(parameter) is not nn.Parameter  # replaced by functional_call
            or parameter.device.type != "cpu"
        )

    def get(
        self, parameters: Sequence[Tensor], layout: bool, build: Callable[[], Tensor]
    ) -> Tensor:
        """Return the kept kernel if nothing has changed, else ``build()`` and keep."""
        if self._kept is not None:
            kept_layout, values, kernel = self._kept
            if kept_layout == layout and all(map(_same, values, parameters)):
                return kernel
        kernel = build()
        self._kept = (layout, [p.detach().clone() for p in parameters], kernel)
        return kernel

    def __reduce__(self) -> tuple:
        """Copies and pickles start empty."""
        return KernelCache, ()


def _same(value: Tensor, parameter: Tensor) -> bool:
    return value.dtype == parameter.dtype and torch.equal(value, parameter)


def fold_norms(lam: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """λ over all column norms, which then goes with the columns as they are.

    Args:
        lam: Component weights. Shape ``(rank,)``.
        factors: One per mode of size > 1. Shapes ``(size_n, rank)``.

    Returns:
        Shape ``(rank,)``.
    """
    for inverse in inverse_norms(factors).unbind() if factors else ():
        lam = lam * inverse
    return lam


def pad_factors(
    lam: Tensor, factors: Sequence[Tensor], shape: Sequence[int]
) -> list[Tensor]:
    """Factors of all modes: a row of ones for every mode of size 1."""
    stored, ones = iter(factors), lam.new_ones(1, lam.numel())
    return [next(stored) if n > 1 else ones for n in shape]


def build_kernel(
    lam: Tensor, factors: Sequence[Tensor], shape: Sequence[int], channels_last: bool
) -> Tensor:
    """Rebuild the kernel of a layer, for the memory layout of its input.

    Args:
        lam: Component weights with every scale folded in. Shape ``(rank,)``.
        factors: One per mode of size > 1. Shapes ``(size_n, rank)``.
        shape: Of the kernel.
        channels_last: Whether the channels are to run fastest.

    Returns:
        Shape ``shape``.
    """
    if not factors:
        return lam.sum().view(shape)
    if not channels_last:
        return rebuild(lam, factors).view(shape)
    out, channels, *size = shape
    if channels > 1:  # its factor last: the product then is laid out channels_last
        channel = 1 if out > 1 else 0
        factors = [*factors[:channel], *factors[channel + 1 :], factors[channel]]
    return rebuild(lam, factors).view(out, *size, channels).movedim(-1, 1)


def conv_chain(
    images: Tensor,
    lam: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve through the components: 1x1 → depthwise → 1x1, never the full kernel.

    Groups share the input factor and the window; the output factor is sliced.

    Args:
        images: Shape ``(batch, in, *size)``.
        lam: Component weights with every scale folded in. Shape ``(rank,)``.
        factors: One per mode, also of size 1. Shapes ``(size_n, rank)``.
        bias: Shape ``(out,)``, or None.
        stride: One per spatial axis.
        padding: One per spatial axis, or ``"same"`` or ``"valid"``.
        dilation: One per spatial axis.
        groups: Groups of the convolution.

    Returns:
        Shape ``(batch, out, *size_out)``.
    """
    output, *others = factors
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    hidden = conv_branches(images, lam, others, groups=groups, **geometry)
    mix = output.reshape(-1, lam.numel(), *(1,) * (len(others) - 1))
    return CONV[len(others) - 1](hidden.flatten(1, 2), mix, bias, groups=groups)


def conv_branches(
    images: Tensor,
    lam: Tensor,
    factors: Sequence[Tensor],
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The first two stages of `conv_chain`: what each component sends to its outputs.

    Args:
        images: As in `conv_chain`, like all that follow.
        lam: Component weights.
        factors: One per mode but the output's, also of size 1.
        stride: One per spatial axis.
        padding: One per spatial axis, or a word.
        dilation: One per spatial axis.
        groups: Groups of the convolution.

    Returns:
        Shape ``(batch, groups, rank, *size_out)``.
    """
    source, *spatial = factors
    rank, ndim = lam.numel(), len(spatial)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    conv = CONV[ndim]
    batch, channels = images.shape[0], source.shape[0]
    # λ scales the window, the smallest of the three weights, as in the rebuild.
    window = (khatri_rao(spatial) * lam).T.reshape(rank, 1, *(len(f) for f in spatial))
    mix = source.T.reshape(rank, channels, *(1,) * ndim)
    hidden = images.reshape(batch * groups, channels, *images.shape[2:])
    if channels == 1 or window[0].numel() == 1:  # one of the two stages is a scaling
        hidden = conv(hidden, mix * window, **geometry)
    else:
        hidden = conv(conv(hidden, mix), window, groups=rank, **geometry)
    return hidden.reshape(batch, groups, rank, *hidden.shape[2:])
