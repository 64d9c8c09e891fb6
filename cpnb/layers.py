"""CP layers: drop-in replacements for torch's convolutions and linear layer.

A layer holds σ, λ and factor matrices, and has two forwards with one result: "dense"
rebuilds the kernel and calls torch, "chain" runs through the components, 1×1 →
depthwise → 1×1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpnb.convolution import (
    ConvGeometry,
    FactoredLayer,
    conv_branches,
    convolve,
    convolve_transposed,
    innermost,
    is_channels_last,
    transposed_branches,
)
from cpnb.cp import (
    CPForm,
    Rank,
    break_even_rank,
    component_gram,
    cp_parameters,
    exact_rank,
    normalize_columns,
    rebuild,
    resolve_rank,
    with_unit_columns,
)
from cpnb.initializers import dense_start, resolve_init

__all__ = [
    "CPConv1d", "CPConv2d", "CPConv3d", "CPConvTranspose1d", "CPConvTranspose2d",
    "CPConvTranspose3d", "CPLayer", "CPLinear", "FactoredLayer",
]  # fmt: skip

FORWARD_MODES = ("auto", "dense", "chain")
# For a convolution "auto" takes the chain below this share of the rank at which both do
# the same work: x86-64 cores cross at 0.50 (64 channels) to 0.73 (256 channels) of it.
CHAIN_SHARE = 0.5
# The step gauge, chosen by measuring (benchmarks/defaults.py): a column of the largest
# mode has the length COLUMN · |σλ_r|, one of n entries √(largest/n) times that.
COLUMN = 0.7
SLOW = 4.0  # units of σ and λ: both have 1/SLOW² in J Jᵀ, see explore.step_spectrum
SHORTEST = 0.1  # as a share of the RMS of σλ: a shorter column would turn too fast


class CPLayer(FactoredLayer):
    """Base of the CP layers: ``weight = σ Σ_r λ_r â_r∘b̂_r∘…`` with unit columns.

    Attributes:
        scale: Global scale: ``σ = scale · unit``. Scalar parameter.
        unit: The unit of σ, a constant that the start chooses. Scalar buffer.
        lam: Component weights λ, any sign. Shape ``(rank,)``.
        factors: One factor matrix per mode of size > 1, columns of any length, which
            the forward normalises. Shapes ``(size_n, rank)``.
        signed: If False, |λ| is used, as the paper's released code does.
        forward_mode: ``"dense"``, ``"chain"`` or ``"auto"``, see `CHAIN_SHARE`.
        active_rank: Number of leading components in use, all if None; `cpnb.NestedRank`
            sets it for one training step at a time.
    """

    factor_names = ("factors",)
    no_decay = ("scale", "lam")

    def _make_parameters(
        self,
        kernel_shape: Sequence[int],
        bias: bool,
        *,
        rank: Rank = "same",
        init: str | Callable[..., CPForm] = "unified",
        forward_mode: str = "auto",
        signed: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.kernel_shape = tuple(kernel_shape)
        self.init = resolve_init(init)
        self.forward_mode = forward_mode
        self.signed = signed
        self.active_rank: int | None = None
        count = resolve_rank(rank, self.kernel_shape)
        exact = exact_rank(self.kernel_shape)
        if count > 2 * exact:  # the paper's LeNet has 11 components where 9 are exact
            raise ValueError(
                f"rank is {count} for a kernel of shape {self.kernel_shape}, expected "
                f"at most {2 * exact}: with {exact} components every such kernel is "
                f"exact. Pass rank={exact} or less."
            )
        like = torch.empty(0, device=device, dtype=dtype)
        sizes = [n for n in self.kernel_shape if n > 1]
        self.scale = nn.Parameter(like.new_empty(()))
        self.unit: Tensor
        self.register_buffer("unit", like.new_empty(()))
        self.lam = nn.Parameter(like.new_empty(count))
        self.factors = nn.ParameterList(
            [nn.Parameter(like.new_empty(n, count)) for n in sizes]
        )
        outputs = getattr(self, "out_channels", kernel_shape[0])
        empty = nn.Parameter(like.new_empty(outputs)) if bias else None
        self.register_parameter("bias", empty)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw a new start of the same rank; the bias as torch's own layers do."""
        where = {"device": self.lam.device, "dtype": self.lam.dtype}
        options = {"groups": self.groups, "generator": generator, **where}
        self.store(*self.init(self.kernel_shape, self.rank, **options))
        if self.bias is not None:
            fan_in = math.prod(self.kernel_shape[1:])
            self.bias.copy_(dense_start(self.bias.shape, fan_in, generator, self.bias))

    @torch.no_grad()
    def store(self, lam: Tensor, factors: Sequence[Tensor]) -> None:
        """Make ``Σ_r lam[r] f_r∘g_r∘…`` the kernel, and store it in the step gauge.

        The forward uses unit columns, so their stored lengths, and the units of σ and
        λ, are free. They decide how far a step of SGD moves the kernel: here, in most
        directions, about R/R_same as far as it moves a dense kernel.

        Args:
            lam: Weights with σ folded in. Shape ``(rank,)``.
            factors: Of the modes of size > 1, any lengths. Shapes ``(size_n, rank)``.
        """
        lam, factors = lam.double(), [factor.double() for factor in factors]
        square = lam.sum().square()
        if factors:
            factors, norms = normalize_columns(factors)
            lam = lam * norms.prod(0)
            square = (lam @ component_gram(factors) @ lam).clamp_min(0)
        rms = lam.square().mean().sqrt()
        norm = torch.where(square == 0, 1, square).sqrt()
        shortest = torch.where(rms == 0, 1, SHORTEST * rms)
        self.scale.copy_(SLOW * norm)
        self.unit.copy_(1 / (SLOW**2 * norm))
        if not self.signed and factors:
            factors[0] = factors[0] * torch.where(lam < 0, -1, 1)
        self.lam.copy_(lam / self.sigma)
        lengths = COLUMN * lam.abs().clamp_min(shortest)
        for parameter, factor in zip(self.factors, factors, strict=True):
            slow = max(self.kernel_shape) / len(factor)
            parameter.copy_(factor * lengths * slow**0.5)

    @property
    def sigma(self) -> Tensor:
        """The global scale σ. Scalar."""
        return self.scale * self.unit

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.lam.numel()

    @property
    def break_even_rank(self) -> int:
        """R_same: rank with as many parameters as the dense layer."""
        return break_even_rank(self.kernel_shape)

    def parameters_at(self, rank: int) -> int:
        """Parameters this layer holds at another rank, bias included."""
        bias = 0 if self.bias is None else self.bias.numel()
        return cp_parameters(self.kernel_shape, rank) + bias

    @property
    def weight(self) -> Tensor:
        """The full kernel, rebuilt and differentiable. Shape ``kernel_shape``."""
        return self._kernel(channels_last=False)

    def components(
        self, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """λ with σ folded in and the unit-column factors, of modes of size > 1.

        Returned as ``dtype``, by default that of the parameters, in which σλ is formed.
        """
        factors = [factor.to(dtype) for factor in self.factors]
        units = normalize_columns(factors)[0] if factors else []
        lam = self.lam if self.signed else self.lam.abs()
        return (lam * self.sigma).to(dtype), units

    def resize(self, rank: int) -> None:
        """Make room for another rank; the values are left for the caller to fill.

        The parameters stay the same objects, so that an optimizer keeps them; one that
        has made a step holds moments of the old shape.
        """
        for one in (self.lam, *self.factors):
            one.data, one.grad = one.data.new_empty(*one.shape[:-1], rank), None

    def _terms(self) -> CPForm:
        """λ with σ and the norms it must carry, and factors; active components only."""
        lam = self.lam[: self.active_rank]
        lam = (lam if self.signed else lam.abs()) * self.sigma
        return with_unit_columns(lam, [f[:, : self.active_rank] for f in self.factors])

    def _kernel(self, channels_last: bool) -> Tensor:
        lam, factors = self._terms()
        out, channels, *window = self.kernel_shape
        if not factors:
            return lam.sum().view(self.kernel_shape)
        # A 1×1 kernel is both layouts at once: nothing is won by the second.
        if not channels_last or channels == 1 or math.prod(window) == 1:
            return rebuild(lam, factors).view(self.kernel_shape)
        # The factor of the channels last: the product then is laid out channels_last.
        channel = 1 if out > 1 else 0
        factors = [*factors[:channel], *factors[channel + 1 :], factors[channel]]
        kernel = rebuild(lam, factors).view(out, *window, channels)
        return kernel.movedim(len(window) + 1, 1)

    def _takes_chain(self) -> bool:
        mode = self.forward_mode
        if mode not in FORWARD_MODES:
            raise ValueError(f"forward_mode is {mode!r}, expected {FORWARD_MODES}.")
        if mode != "auto":
            return mode == "chain"
        return self._is_low(self.rank if self.active_rank is None else self.active_rank)

    def _is_low(self, rank: int) -> bool:
        # A linear layer: rebuilding costs as much as rank more rows of the batch, and
        # no stage is memory-bound. With 64 rows, a step of the chain takes 0.6 of the
        # time at break-even for 400×120, 0.4 for 9216×128, 0.1 for 4096×1024.
        return rank <= self.break_even_rank

    def by_role(self, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Of factors of all modes that of the outputs, ``(out, rank)``; the others."""
        return factors[0], [*factors[1:]]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Adopt the rank of a checkpoint whose other sizes are those of this layer."""
        lam = state_dict.get(f"{prefix}lam")
        if lam is None and f"{prefix}weight" in state_dict:
            args[-1].append(
                f"{prefix or 'this layer'} is a {type(self).__name__}, but the "
                "checkpoint holds a dense weight for it. Load it into the dense model, "
                "then call cpnb.canonicalize."
            )
        elif lam is not None and lam.ndim == 1 and lam.numel() not in (0, self.rank):
            wanted = [(len(factor), lam.numel()) for factor in self.factors]
            held = [state_dict.get(f"{prefix}factors.{n}") for n in range(len(wanted))]
            if [None if f is None else tuple(f.shape) for f in held] == wanted:
                self.resize(lam.numel())
        if lam is not None:  # in version 0.1 σ had no unit
            state_dict.setdefault(f"{prefix}unit", torch.ones_like(self.unit))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Torch's text and the rank, and what differs from the defaults."""
        text = super().extra_repr()
        if self.forward_mode != "auto":
            text += f", forward_mode={self.forward_mode!r}"
        return text if self.signed else f"{text}, signed=False"


class CPConv(ConvGeometry, CPLayer):
    """Convolution with a CP kernel, in any number of spatial dimensions."""

    _convolve = staticmethod(convolve)
    _branches = staticmethod(conv_branches)

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
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = (in_channels, out_channels, kernel_size)
        steps = (stride, padding, dilation, groups)
        shape = self.set_geometry(self.stock, *sizes, *steps, bias, padding_mode)
        self._make_parameters(shape, bias, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(batch, in, *size)``, or one image without the batch axis."""
        return self._forward(*self.padded(input))

    def _forward(self, images: Tensor, geometry: dict[str, Any]) -> Tensor:
        if not self._takes_chain():
            kernel = self._kernel(is_channels_last(images))
            return self._convolve(images, kernel, self.bias, **geometry)
        batch = images if images.ndim == len(self.kernel_shape) else images[None]
        lam, stored = self._terms()
        outputs, others = self.by_role(pad_factors(lam, stored, self.kernel_shape))
        hidden = self._branches(innermost(batch), lam, others, **geometry).flatten(1, 2)
        mix = outputs.reshape(-1, lam.numel(), *(1,) * len(self.kernel_size))
        output = convolve(hidden, mix, self.bias, groups=self.groups)
        last = is_channels_last(batch)
        output = innermost(output) if last else output.contiguous()
        return output if images.ndim == batch.ndim else output[0]

    def branches(self, images: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """What each component of a kernel like this one's sends to its outputs.

        Images have shape ``(batch, in, *size)``; there is a factor ``(size_n, rank)``
        for each mode but the output's. Shape ``(batch, groups, rank, *size_out)``.
        """
        images, geometry = self.padded(images)
        lam = factors[0].new_ones(factors[0].shape[1])
        return self._branches(innermost(images), lam, factors, **geometry)

    def _is_low(self, rank: int) -> bool:
        return rank * self._chain_work() < CHAIN_SHARE * math.prod(self.kernel_shape)

    def _chain_work(self) -> int:
        """Multiplications per position and component."""
        out, channels, *window = self.kernel_shape
        # One input channel has no first stage, a 1x1 window no second one.
        first = self.groups * channels * math.prod(self.stride) if channels > 1 else 0
        second = self.groups * math.prod(window) if math.prod(window) > 1 else 0
        return first + second + out


class CPConv1d(CPConv):
    """1-D convolution with a CP kernel; arguments and errors as in `CPConv2d`."""

    stock = nn.Conv1d


class CPConv2d(CPConv):
    """2-D convolution with a CP kernel: canonical weight normalization.

    ``weight = σ Σ_r λ_r â_r∘b̂_r∘ĉ_r∘d̂_r``, hats for columns of unit 2-norm. Positional
    arguments are those of `torch.nn.Conv2d`; groups share all factors but the output
    one, which is sliced. Then, by name only, come those below.

    Args:
        rank: Number of components (int), fraction of the break-even rank (float in
            (0, 1]), or ``"same"`` for the break-even rank.
        init: A name in `cpnb.initializers.INITIALIZERS` or a function like
            `cpnb.initializers.unified`.
        forward_mode: ``"dense"`` rebuilds the kernel, ``"chain"`` convolves through the
            components, ``"auto"`` takes the chain at low ranks.
        signed: False uses |λ|, as the paper's released code does.
        device: Of the parameters.
        dtype: Of the parameters.
        generator: Source of the random start; torch's default one if None.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509.

    >>> layer = CPConv2d(32, 64, 3, padding=1, rank=0.25)
    >>> layer.rank, layer.break_even_rank, layer.weight.shape
    (45, 179, torch.Size([64, 32, 3, 3]))
    >>> layer(torch.zeros(1, 32, 8, 8)).shape
    torch.Size([1, 64, 8, 8])
    """

    stock = nn.Conv2d


class CPConv3d(CPConv):
    """3-D convolution with a CP kernel; arguments and errors as in `CPConv2d`."""

    stock = nn.Conv3d


class CPConvTranspose(CPConv):
    """Transposed convolution with a CP kernel of shape ``(in, out / groups, *size)``.

    Groups share all factors but the input one, which is sliced.
    """

    argument_names = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding",
        "output_padding", "groups", "bias", "dilation", "padding_mode",
    )  # fmt: skip
    _convolve = staticmethod(convolve_transposed)
    _branches = staticmethod(transposed_branches)
    transposed = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        nn.Module.__init__(self)
        named = {n: options.pop(n) for n in self.argument_names if n in options}
        shape = self.set_geometry(self.stock, *arguments, **named)
        given = dict(zip(self.argument_names, arguments, strict=False)) | named
        self._make_parameters(shape, given.get("bias", True), **options)

    def padded(
        self, images: Tensor, output_size: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The input, and how to convolve it, perhaps to a size of several possible."""
        axes = len(self.kernel_size)
        sizes = (self.stride, self.padding, self.kernel_size, axes, self.dilation)
        stock: Any = self.stock
        extra = stock._output_padding(self, images, output_size, *sizes)
        return images, super().padded(images)[1] | {"output_padding": extra}

    def forward(
        self, input: Tensor, output_size: Sequence[int] | None = None
    ) -> Tensor:
        """Convolve ``(batch, in, *size)``, as torch's layer does."""
        return self._forward(*self.padded(input, output_size))

    def by_role(self, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The outputs of every group have the same factor."""
        inputs, outputs, *window = factors
        return outputs.repeat(self.groups, 1), [inputs, *window]

    def _chain_work(self) -> int:
        inputs, out, *window = self.kernel_shape
        outputs = self.groups * out * math.prod(self.stride)
        return inputs + self.groups * math.prod(window) + outputs


class CPConvTranspose1d(CPConvTranspose):
    """1-D transposed convolution with a CP kernel; see `CPConvTranspose2d`."""

    stock = nn.ConvTranspose1d


class CPConvTranspose2d(CPConvTranspose):
    """2-D transposed convolution with a CP kernel.

    Args: as `torch.nn.ConvTranspose2d`, then keywords from ``rank`` on as `CPConv2d`.

    >>> layer = CPConvTranspose2d(8, 4, 2, stride=2)
    >>> layer(torch.zeros(1, 8, 5, 5)).shape
    torch.Size([1, 4, 10, 10])
    """

    stock = nn.ConvTranspose2d


class CPConvTranspose3d(CPConvTranspose):
    """3-D transposed convolution with a CP kernel; see `CPConvTranspose2d`."""

    stock = nn.ConvTranspose3d


class CPLinear(CPLayer):
    """Linear layer with a CP weight, ``σ Σ_r λ_r â_r∘b̂_r``.

    Args: as `torch.nn.Linear`, then from ``rank`` on as `CPConv2d`.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509.

    >>> CPLinear(20, 10, rank=3).weight.shape
    torch.Size([10, 20])
    """

    stock = nn.Linear

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._make_parameters((out_features, in_features), bias, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        if not self._takes_chain():
            return F.linear(input, self._kernel(channels_last=False), self.bias)
        lam, factors = self._terms()
        outputs, inputs = pad_factors(lam, factors, self.kernel_shape)
        return F.linear(F.linear(input, (inputs * lam).T), outputs, self.bias)


_KINDS: list[type[CPLayer]] = [CPConv1d, CPConv2d, CPConv3d, CPLinear]
_KINDS += [CPConvTranspose1d, CPConvTranspose2d, CPConvTranspose3d]
CP_KINDS: dict[type, type[CPLayer]] = {kind.stock: kind for kind in _KINDS}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Run a block in evaluation mode, then give each submodule its own flag back."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, flag in flags.items():
            module.training = flag


def pad_factors(
    lam: Tensor, factors: Sequence[Tensor], shape: Sequence[int]
) -> list[Tensor]:
    """Factors of all modes: a row of ones for every mode of size 1."""
    stored = iter(factors)
    ones = lam.new_ones(1, lam.numel())
    return [next(stored) if n > 1 else ones for n in shape]
