"""Low-rank layers: drop-in replacements for torch's, run as two layers in a row."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpnb.geometry import adopt_geometry, along_axis, conv_arguments, margins
from cpnb.lowrank_base import LowRankLayer
from cpnb.matrices import Factors
from cpnb.ranks import Rank


class LowRankConv2d(LowRankLayer):
    """2-D convolution of low rank: one along the width, then one along the height.

    The kernel, unfolded to rows (out, height) and columns (in, width), is ``U Vᵀ``.
    V is a ``(1, width)`` convolution into ``rank`` channels and U a ``(height, 1)``
    one out of them, which adds the bias; stride, padding and dilation are split by
    axis. Groups stay groups, each with ``rank`` channels of its own. Positional
    arguments are those of `torch.nn.Conv2d`.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: One size or one per axis.
        stride: One step or one per axis.
        padding: As torch: int, one per axis, ``"same"`` or ``"valid"``.
        dilation: One or one per axis.
        groups: Groups of the convolution.
        bias: Whether to add a bias.
        padding_mode: As torch: zeros, reflect, replicate or circular.
        rank: Channels between the two (int; above the rank of the unfolded kernel it is
            clipped, with a warning), fraction of the break-even rank (float in (0, 1]),
            or ``"same"`` for the break-even rank.
        init: ``"spectral"`` splits the start of the dense layer, ``"kaiming"`` starts
            each matrix by itself (see `cpnb.matrices.kaiming` for what that does); or
            a function like these.
        middle: Whether there is a square matrix M in between, ``U M Vᵀ``. It starts as
            the identity, and is multiplied into V before the convolution.
        device: Of the parameters.
        dtype: Of the parameters.
        generator: Source of the random start; torch's default one if None.

    Raises:
        TypeError: If ``rank`` or ``dtype`` is of the wrong kind.
        ValueError: If an argument is out of range or a name unknown.

    Source: Khodak et al. 2021, arXiv:2105.01029.

    >>> layer = LowRankConv2d(32, 64, 3, padding=1, rank=0.25)
    >>> layer
    LowRankConv2d(32, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), \
rank=16 (0.25 of break-even 64))
    >>> layer.left.shape, layer.right.shape, layer.weight.shape
    (torch.Size([192, 16]), torch.Size([96, 16]), torch.Size([64, 32, 3, 3]))
    """

    _stock = nn.Conv2d
    _arguments = staticmethod(conv_arguments)

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
        rank: Rank = "same",
        init: str | Callable[..., Factors] = "spectral",
        middle: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        shape = adopt_geometry(
            *(self, nn.Conv2d, in_channels, out_channels, kernel_size, stride),
            *(padding, dilation, groups, padding_mode),
        )
        self._build(
            shape,
            rank=rank,
            init=init,
            middle=middle,
            bias=bias,
            device=device,
            dtype=dtype,
            generator=generator,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(batch, in, height, width)``, or one image without the batch."""
        down, across = along_axis(self, 0), along_axis(self, 1)
        if self.padding_mode != "zeros":
            input = F.pad(input, margins(self), mode=self.padding_mode)
            down["padding"] = across["padding"] = 0
        left, right = self.pair
        height, width = self.kernel_size
        # (groups · rank, in / groups, 1, width), then (out, rank, height, 1). As they
        # are stored they would be laid out channels_last, and the output with them.
        across_kernel = right.unflatten(1, (-1, 1, width)).movedim(-1, 1).flatten(0, 1)
        down_kernel = left.reshape(self.out_channels, height, 1, -1).movedim(-1, 1)
        input = F.conv2d(input, across_kernel.contiguous(), None, **across)
        return F.conv2d(input, down_kernel.contiguous(), self.bias, **down)

    def extra_repr(self) -> str:
        """Torch's own text for the geometry, then that of `LowRankLayer`."""
        stock = nn.Conv2d(*conv_arguments(self), device="meta")
        return f"{stock.extra_repr()}, {super().extra_repr()}"


class LowRankLinear(LowRankLayer):
    """Linear layer of low rank, ``U Vᵀ``, run as two linear layers.

    Args:
        in_features: Input features.
        out_features: Output features.
        bias: Whether to add a bias.
        rank: As in `LowRankConv2d`, like every argument that follows.
        init: See `LowRankConv2d`.
        middle: See `LowRankConv2d`.
        device: Of the parameters.
        dtype: Of the parameters.
        generator: Source of the random start.

    Raises:
        TypeError: If ``rank`` or ``dtype`` is of the wrong kind.
        ValueError: If an argument is out of range or a name unknown.

    Source: Khodak et al. 2021, arXiv:2105.01029.

    >>> LowRankLinear(20, 10, rank=3, middle=True)
    LowRankLinear(20, 10, rank=3 (0.50 of break-even 6), middle=True)
    """

    _stock = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: Rank = "same",
        init: str | Callable[..., Factors] = "spectral",
        middle: bool = False,
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
            middle=middle,
            bias=bias,
            device=device,
            dtype=dtype,
            generator=generator,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        left, right = self.pair
        return F.linear(F.linear(input, right[0].T), left[0], self.bias)

    @staticmethod
    def _arguments(layer: nn.Module) -> tuple:
        return layer.in_features, layer.out_features, layer.bias is not None

    def extra_repr(self) -> str:
        """Sizes, then the text of `LowRankLayer`."""
        bias = "" if self.bias is not None else "bias=False, "
        return f"{self.in_features}, {self.out_features}, {bias}{super().extra_repr()}"
