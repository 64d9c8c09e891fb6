"""Factorized layers: low-rank layers, where they start, and decay of their product.

Source: Khodak et al. 2021, arXiv:2105.01029; the decay of CP layers is re-derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cpnb.convert import (
    Ranks,
    Skip,
    converted,
    cp_layers,
    layers_to_convert,
    named_ranks,
    replace_layers,
)
from cpnb.convolution import ConvGeometry, convolve
from cpnb.cp import Rank, component_gram, resolve_rank
from cpnb.initializers import dense_start, draw
from cpnb.layers import CPLayer, FactoredLayer
from cpnb.methods.ranks import low_rank_at, unfolded_shape

if TYPE_CHECKING:
    import pandas as pd

Pair = tuple[Tensor, Tensor]


def unfold(kernel: Tensor, groups: int = 1) -> Tensor:
    """Write a kernel as one matrix per group, rows (out, height), columns (in, width).

    The released code of the paper reshapes without moving the axes, which mixes them.
    """
    out, channels, height, width = (*kernel.shape, 1, 1)[:4]
    tall = kernel.reshape(groups, out // groups, channels, height, width)
    return tall.transpose(2, 3).reshape(groups, *unfolded_shape(kernel.shape, groups))


def spectral(
    shape: Sequence[int],
    rank: int,
    *,
    groups: int = 1,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Pair:
    """Spectral initialisation: the nearest product to a dense kernel, split evenly.

    Arguments are as in `cpnb.initializers.unified`, shapes of the results
    ``(groups, rows, rank)`` and ``(groups, columns, rank)``.
    """
    if weight is None:
        weight = dense_start(shape, math.prod(shape[1:]), generator, like)
    matrices = unfold(weight.detach().double(), groups)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    root = values[:, None, :rank].sqrt()
    return (left[..., :rank] * root).to(like), (right.mT[..., :rank] * root).to(like)


def kaiming(
    shape: Sequence[int],
    rank: int,
    *,
    groups: int = 1,
    generator: torch.Generator | None = None,
    like: Tensor,
    **_: Any,
) -> Pair:
    """Kaiming's normal start on each matrix by itself, the baseline of the paper.

    The kernel has ``2 · height`` times Kaiming's variance: U has a gain of 2 for a ReLU
    that is not there, and does not see its window.
    """
    rows, columns = unfolded_shape(shape, groups)
    wide = torch.empty(0, dtype=torch.float64, device=like.device)
    left = draw("normal_", (groups, rows, rank), generator, wide)
    right = draw("normal_", (groups, columns, rank), generator, wide)
    left, right = left * math.sqrt(2 / rank), right * math.sqrt(2 / columns)
    return left.to(like), right.to(like)


STARTS: dict[str, Callable[..., Pair]] = {"spectral": spectral, "kaiming": kaiming}


def _start(init: str | Callable[..., Pair]) -> Callable[..., Pair]:
    if not callable(init) and init not in STARTS:
        raise ValueError(f"init is {init!r}, expected one of {sorted(STARTS)}.")
    return init if callable(init) else STARTS[init]


class LowRankLayer(FactoredLayer):
    """Base of the low-rank layers: the unfolded kernel of each group is ``U Vᵀ``.

    Attributes:
        left: U, groups below each other. Shape ``(out · height, rank)``.
        right: V. Shape ``(in · width, rank)``.
    """

    factor_names = ("left", "right")

    def _make_parameters(
        self,
        kernel_shape: Sequence[int],
        rank: Rank,
        init: str | Callable[..., Pair],
        bias: bool,
        generator: torch.Generator | None,
        like: Tensor,
    ) -> None:
        self.kernel_shape = tuple(kernel_shape)
        self.init = _start(init)
        count = matrix_rank(rank, kernel_shape, self.groups)
        rows, columns = unfolded_shape(kernel_shape, self.groups)
        self.left = nn.Parameter(like.new_empty(self.groups * rows, count))
        self.right = nn.Parameter(like.new_empty(self.groups * columns, count))
        empty = nn.Parameter(like.new_empty(kernel_shape[0])) if bias else None
        self.register_parameter("bias", empty)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw a new start; the bias as torch's own layers do."""
        options: Any = {"groups": self.groups, "generator": generator}
        left, right = self.init(self.kernel_shape, self.rank, like=self.left, **options)
        self.left.copy_(left.flatten(0, 1))
        self.right.copy_(right.flatten(0, 1))
        if self.bias is not None:
            fan_in = math.prod(self.kernel_shape[1:])
            self.bias.copy_(dense_start(self.bias.shape, fan_in, generator, self.bias))

    @property
    def rank(self) -> int:
        """Columns of U and V."""
        return self.left.shape[1]

    @property
    def break_even_rank(self) -> int:
        """Rank with as many parameters as the dense layer."""
        return low_rank_at(1.0, self.kernel_shape, self.groups)

    @property
    def pair(self) -> Pair:
        """U and V of each group. Shapes ``(groups, size, rank)``."""
        shape = (self.groups, -1, self.rank)
        return self.left.view(shape), self.right.view(shape)

    @property
    def weight(self) -> Tensor:
        """The full kernel, multiplied out and differentiable; no forward forms it."""
        left, right = self.pair
        _, channels, height, width = (*self.kernel_shape, 1, 1)[:4]
        tall = (left @ right.mT).view(self.groups, -1, height, channels, width)
        return tall.transpose(2, 3).reshape(self.kernel_shape)


class LowRankConv2d(ConvGeometry, LowRankLayer):
    """2-D convolution of low rank: one along the width, then one along the height.

    V is a ``(1, width)`` convolution into ``rank`` channels for each group and U a
    ``(height, 1)`` one out of them, which adds the bias. Arguments without a line here
    are those of `torch.nn.Conv2d`.

    Args:
        rank: Channels between the two (int, at most the rank that the unfolded kernel
            can have), fraction of the break-even rank (float in (0, 1]), or ``"same"``.
        init: ``"spectral"``, ``"kaiming"`` or a function like `spectral`.
        generator: Source of the random start; torch's default one if None.
    """

    stock = nn.Conv2d

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
        init: str | Callable[..., Pair] = "spectral",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = (in_channels, out_channels, kernel_size)
        steps = (stride, padding, dilation, groups)
        shape = self.set_geometry(self.stock, *sizes, *steps, bias, padding_mode)
        like = torch.empty(0, device=device, dtype=dtype)
        self._make_parameters(shape, rank, init, bias, generator, like)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(batch, in, height, width)``, or one image without the batch."""
        images, geometry = self.padded(input)
        left, right = self.pair
        height, width = self.kernel_size
        # (groups · rank, in / groups, 1, width), then (out, rank, height, 1). Cloned:
        # strides that look like channels_last would make the output so.
        plain: Any = {"memory_format": torch.contiguous_format}
        across = right.unflatten(1, (-1, 1, width)).movedim(4, 1).flatten(0, 1)
        down = left.reshape(self.out_channels, height, 1, -1).movedim(3, 1)
        hidden = convolve(images, across.clone(**plain), **_along(geometry, 1))
        return convolve(hidden, down.clone(**plain), self.bias, **_along(geometry, 0))


class LowRankLinear(LowRankLayer):
    """Linear layer of low rank, ``U Vᵀ``, run as two; see `LowRankConv2d`."""

    stock = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: Rank = "same",
        init: str | Callable[..., Pair] = "spectral",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        like = torch.empty(0, device=device, dtype=dtype)
        shape = (out_features, in_features)
        self._make_parameters(shape, rank, init, bias, generator, like)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        return F.linear(F.linear(input, self.right.T), self.left, self.bias)


def _along(geometry: dict[str, Any], axis: int) -> dict[str, Any]:
    """Stride, padding and dilation along one axis, neutral along the other; groups."""
    split = dict(geometry)
    for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
        if isinstance(geometry[name], tuple):
            split[name] = [neutral, neutral]
            split[name][axis] = geometry[name][axis]
    return split


def matrix_rank(
    rank: Rank, shape: Sequence[int], groups: int, kernel: Tensor | None = None
) -> int:
    """Columns of U and V for a rank as the user says it, see `factorize`."""
    size = unfolded_shape(shape, groups)
    if callable(rank) and kernel is not None:
        rank = max(rank(matrix) for matrix in unfold(kernel, groups))
    count = resolve_rank(rank, size)  # refuses what is no rank
    share = 1.0 if rank == "same" else rank
    if isinstance(share, float):
        return low_rank_at(share, shape, groups)
    return min(count, *size)  # further columns would be dead


_KINDS = {kind.stock: kind for kind in (LowRankConv2d, LowRankLinear)}


def factorize(
    model: nn.Module,
    *,
    rank: Ranks,
    init: str | Callable[..., Pair] = "spectral",
    skip: Skip | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Copy a model with its convolutions and linear layers in low-rank form.

    Args:
        model: Any module of stock layers; also a single layer, with ``skip=()``.
        rank: As in `LowRankConv2d`, or a function of a matrix such as
            ``fit_rank(0.1)``, for every layer; or a mapping from each layer's name,
            such as ``ranks_for(model, 0.1, form="low_rank", skip=skip)``.
        init: ``"spectral"`` splits the present kernels, ``"kaiming"`` forgets them.
        skip: Layers that stay dense: names, or a predicate ``(name, layer) -> bool``.
            None skips `first_and_last`, as the paper does; ``()`` skips none.
        generator: Source of randomness; torch's default one if None.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> factorize(net, rank=3)[1]
    LowRankLinear(8, 8, rank=3 (0.75 of break-even 4))
    """
    skip = first_and_last(model) if skip is None else skip
    layers: dict[str, Any] = layers_to_convert(model, skip, _KINDS)
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} with no convolution or linear layer to "
            "factorize. Without skip the first and the last layer stay dense; pass "
            "skip=() to take them in."
        )
    options: Any = {"init": _start(init), "generator": generator}
    for name, wanted in named_ranks(rank, layers).items():
        layer = layers[name]
        kernel, groups = layer.weight.detach(), getattr(layer, "groups", 1)
        count = matrix_rank(wanted, kernel.shape, groups, kernel)
        layers[name] = converted(layer, _KINDS[type(layer)], rank=count, **options)
    return replace_layers(model, layers)


def first_and_last(model: nn.Module) -> tuple[str, ...]:
    """Names of the first and the last convolution or linear layer of a model."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    names = [name for name, layer in model.named_modules() if isinstance(layer, kinds)]
    return tuple(dict.fromkeys((*names[:1], *names[-1:])))


def frobenius_decay(model: nn.Module, mu: float) -> Tensor:
    """``(μ/2) Σ ‖W‖²_F`` over the factorized layers of a model, as a term of a loss.

    The kernel W is never formed: ``‖UVᵀ‖² = ⟨UᵀU, VᵀV⟩``, and ``σ² λᵀΓλ`` in CP form.
    """
    squares = [_squared_norm(layer) for layer in factored_layers(model).values()]
    return mu / 2 * torch.stack(squares).sum()


def _squared_norm(layer: Any) -> Tensor:
    if isinstance(layer, CPLayer):
        lam, units = layer.components()
        return lam @ component_gram(units) @ lam if units else lam.sum().square()
    left, right = layer.pair
    return ((left.mT @ left) * (right.mT @ right)).sum()


@dataclass(eq=False)
class FrobeniusDecay:
    """Training hook: Frobenius decay of factorized layers instead of ordinary decay.

    Before each step the gradient of `frobenius_decay` is added to that of the factors,
    λ and σ, and the weight decay that the optimizer is about to do is taken off.

    Attributes:
        mu: Strength μ; None takes over the optimizer's weight decay.
        scale: Whether the σ of CP layers decays. Before a batch norm nothing brings σ
            back and it shrinks without end: there pass False.
    """

    mu: float | None = None
    scale: bool = field(default=True, kw_only=True)

    def before_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Add the gradient; parameters without one, as frozen ones, are left alone."""
        groups = optimizer.param_groups
        own = {p: group for group in groups for p in group["params"]}
        decays = {group["weight_decay"] for group in own.values()} - {0}
        if self.mu is None and len(decays) != 1:
            raise ValueError(
                f"mu is None and the optimizer has the weight decays {sorted(decays)}, "
                "expected exactly one above 0 to take over. Pass mu."
            )
        mu = decays.pop() if self.mu is None else self.mu
        decoupled = isinstance(optimizer, torch.optim.AdamW)
        for layer in factored_layers(model).values():
            for factor, gradient in _gradients(layer):
                total: Any = factor.grad
                if self.scale or factor is not getattr(layer, "scale", None):
                    total.add_(gradient, alpha=mu)
                group = own.get(factor, {"weight_decay": 0.0})
                if decoupled or group.get("decoupled_weight_decay"):
                    factor.data /= 1 - group["lr"] * group["weight_decay"]  # AdamW's
                else:
                    total.sub_(factor.detach(), alpha=group["weight_decay"])


def _gradients(layer: Any) -> list[tuple[Tensor, Tensor]]:
    """Factors, λ and σ that are trained, with their gradients of ``½‖W‖²``."""
    if isinstance(layer, CPLayer):
        parameters = [p for p in layer.parameters() if p is not layer.bias]
        trained = [p for p in parameters if p.requires_grad and p.grad is not None]
        half = _squared_norm(layer) / 2
        gradients = torch.autograd.grad(half, trained) if trained else ()
        return [*zip(trained, gradients, strict=True)]
    left, right = (matrix.detach() for matrix in layer.pair)
    gradients = (left @ (right.mT @ right), right @ (left.mT @ left))
    both = zip((layer.left, layer.right), gradients, strict=True)
    return [(p, g.reshape(p.shape)) for p, g in both if p.grad is not None]


@torch.no_grad()
def factor_norms(model: nn.Module, lr: float = 1.0) -> pd.DataFrame:
    """Norms of factorized kernels, and what ordinary weight decay would press on.

    Returns:
        One line per layer, by name: ``frobenius``; ``nuclear``, the sum of the singular
        values of the unfolded kernel, in CP form the one of shape (out, all the rest);
        its upper ``bound``, ``½(‖U‖² + ‖V‖²)``, on which weight decay presses, or
        ``Σ|σλ|``; ``effective_step``, ``lr / ‖W‖²_F``: how far a step turns a kernel
        before a norm layer. NaN for a kernel that is not finite.
    """
    import pandas as pd

    lines = {name: _norms(layer, lr) for name, layer in factored_layers(model).items()}
    columns = ["frobenius", "nuclear", "bound", "effective_step"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns)


def _norms(layer: Any, lr: float) -> tuple[float, ...]:
    if isinstance(layer, CPLayer):
        core = layer.weight.double().flatten(1)
        bound = layer.components(torch.float64)[0].abs().sum()
    else:
        left, right = (matrix.double() for matrix in layer.pair)
        # UVᵀ has the singular values of R_U R_Vᵀ of the QR decompositions.
        core = torch.linalg.qr(left).R @ torch.linalg.qr(right).R.mT
        bound = (left.square().sum() + right.square().sum()) / 2
    if not core.isfinite().all():  # a log must not end a training
        return (math.nan,) * 4
    values = torch.linalg.svdvals(core)
    square = values.square().sum().item()
    step = lr / square if square else math.inf
    return square**0.5, values.sum().item(), bound.item(), step


@dataclass(eq=False)
class ProximalL1:
    """Training hook: the penalty ``μ Σ_r |σ λ_r|`` on CP layers, as a proximal step.

    After each optimizer step |σλ| falls by ``lr · μ``, whatever the units of σ and λ,
    and stays at zero when it arrives (soft thresholding). The zeros are exact:
    a truncation to the other components does not change the output.

    Source: Parikh & Boyd 2014, Proximal Algorithms, doi:10.1561/2400000003.
    """

    mu: float

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Soft-threshold the λ that the optimizer trains."""
        rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        for layer in cp_layers(model).values():
            if layer.lam in rates:
                threshold = rates[layer.lam] * self.mu / layer.sigma.abs()
                shrunk = (layer.lam.abs() - threshold).clamp_min(0)
                layer.lam.copy_(shrunk * layer.lam.sign())


def factored_layers(model: nn.Module) -> dict[str, FactoredLayer]:
    """The low-rank and CP layers of a model by name; at least one."""
    modules = model.named_modules()
    layers = {name: m for name, m in modules if isinstance(m, FactoredLayer)}
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} without low-rank or CP layers. Call "
            "cpnb.factorize or cpnb.canonicalize first."
        )
    return layers
