"""Exact-or-refuse conversion of one layer between stock torch and CP form."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cpnb._checks import check_kernel
from cpnb.initializers import CPForm, resolve_init
from cpnb.ranks import ModelRule, Rank, resolve_rank

if TYPE_CHECKING:
    from cpnb.base import CPLayer
    from cpnb.lowrank_base import LowRankLayer

CONVERTIBLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_RELATED = (nn.modules.conv._ConvNd, nn.Linear, nn.LazyLinear, nn.Bilinear)


def is_weighted(module: nn.Module) -> bool:
    """Whether this is a convolution or linear layer of some kind."""
    return isinstance(module, _RELATED)


def refusal(layer: nn.Module) -> str | None:
    """Why this layer cannot be converted exactly, or None if it can."""
    kinds = ", ".join(kind.__name__ for kind in CONVERTIBLE)
    if nn.utils.parametrize.is_parametrized(layer):
        return (
            "it is parametrized; call cpnb.remove_normalizer first, which gives the "
            "same function with stock layers"
        )
    if type(layer) not in CONVERTIBLE:
        return f"expected exactly one of {kinds}"
    return _lost_hooks(layer)


def _lost_hooks(layer: nn.Module) -> str | None:
    hooks = (
        *(layer._forward_hooks, layer._forward_pre_hooks),
        *(layer._backward_hooks, layer._backward_pre_hooks),
        *(parameter._backward_hooks for parameter in layer.parameters()),
    )
    return (
        "it has hooks, which would be lost; remove them first" if any(hooks) else None
    )


def convert_layer(
    kind: type["CPLayer"],
    layer: nn.Module,
    *,
    rank: Rank | ModelRule,
    init: str | Callable[..., CPForm],
    generator: torch.Generator | None,
) -> "CPLayer":
    """Build the CP layer of class ``kind`` that stands for ``layer``."""
    reason = refusal(layer)
    if reason is None and type(layer) is not kind._stock:
        reason = f"expected a {kind._stock.__name__} for {kind.__name__}"
    if reason:
        raise TypeError(f"layer is a {type(layer).__name__}: {reason}.")
    check_kernel(layer.weight, "layer.weight")
    start = resolve_init(init)
    if isinstance(rank, ModelRule):
        rank = rank.counts(layer, [""])[""]
    # As the fits see it: without modes of size 1.
    kernel = layer.weight.reshape([n for n in layer.weight.shape if n > 1] or [1])
    new = kind(
        *kind._arguments(layer),
        rank=resolve_rank(rank, kernel.shape, kernel, generator=generator),
        init=functools.partial(start, weight=layer.weight),
        device=layer.weight.device,
        dtype=layer.weight.dtype,
        generator=generator,
    )
    new._init = start
    for parameter in (new.scale, new.lam, *new.factors):
        parameter.requires_grad_(layer.weight.requires_grad)
    copy_bias(layer.bias, new.bias)
    return new.train(layer.training)


def stock_layer(layer: "CPLayer | LowRankLayer") -> nn.Module:
    """Build the stock torch layer with the kernel of a CP or low-rank layer."""
    reason = _lost_hooks(layer)
    if reason:
        raise TypeError(f"layer is a {type(layer).__name__}: {reason}.")
    with torch.enable_grad():  # to see whether any part of it is trained
        weight = layer.weight
    stock = nn.utils.skip_init(
        layer._stock, *layer._arguments(layer), device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        stock.weight.copy_(weight)
    stock.weight.requires_grad_(weight.requires_grad)
    copy_bias(layer.bias, stock.bias)
    return stock.train(layer.training)


@torch.no_grad()
def copy_bias(source: Tensor | None, target: Tensor | None) -> None:
    """Give ``target`` the values of ``source``, and its ``requires_grad``."""
    if source is not None:
        target.copy_(source)
        target.requires_grad_(source.requires_grad)
