"""The data-dependent start of weight norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cpnb._checks import check_floating
from cpnb._normalizers.base import chosen_layers
from cpnb._normalizers.stock import weight
from cpnb.evaluation import evaluation_mode, placement
from cpnb.surgery import Skip

_EPSILON = 1e-8


@torch.no_grad()
def weight_data_init(
    model: nn.Module,
    skip: Skip,
    *,
    data: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Weight norm whose outputs on a batch have mean 0 and variance 1 at the start."""
    _check_images(data)
    names = chosen_layers(model, skip)
    new = weight(model, skip)
    layers = {name: new.get_submodule(name) for name in names}
    waiting = set(layers)
    handles = []
    for name, layer in layers.items():
        _restart(layer, generator)
        handles.append(layer.register_forward_hook(_standardizing(name, waiting)))
    try:
        with evaluation_mode(new):  # no dropout, and batch norm as it is stored
            new(data.to(*placement(new, data)))
    finally:
        for handle in handles:
            handle.remove()
    if waiting:
        raise ValueError(
            f"layers {sorted(waiting)} were not called on data, expected every one to "
            "be. Pass them in skip."
        )
    return new


def _restart(layer: nn.Module, generator: torch.Generator | None) -> None:
    """Draw v from N(0, 0.05²), and leave g = 1 and no bias."""
    kernel = layer.parametrizations["weight"]
    v = kernel.original1
    device = v.device if generator is None else generator.device
    noise = torch.randn(v.shape, generator=generator, device=device, dtype=v.dtype)
    v.copy_(0.05 * noise)
    kernel.original0.fill_(1)
    if layer.bias is not None:
        layer.bias.zero_()


def _standardizing(name: str, waiting: set[str]) -> Callable:
    """A hook that sets g and the bias from the first output, and standardises that."""

    def hook(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if name not in waiting:
            raise ValueError(
                f"layer {name!r} was called twice on data, expected once: the second "
                "output has statistics of its own. Pass it in skip."
            )
        waiting.remove(name)
        axis = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
        others = [n for n in range(output.ndim) if n != axis]
        variance, mean = torch.var_mean(output, others, correction=0, keepdim=True)
        if not (variance > _EPSILON).all():
            raise ValueError(
                f"layer {name!r} has an output of variance {variance.min().item():.1e} "
                f"on data, expected above {_EPSILON}. Take more images, standardised, "
                "that differ."
            )
        g = (variance + _EPSILON).rsqrt()
        layer.parametrizations["weight"].original0.mul_(
            g.reshape(-1, *[1] * (layer.weight.ndim - 1))
        )
        if layer.bias is None:
            return output * g
        layer.bias.copy_((-mean * g).flatten())
        return (output - mean) * g

    return hook


def _check_images(data: Tensor | None) -> None:
    hint = " Pass a batch of images, such as data.train.standardized()[:256]."
    if not isinstance(data, Tensor):
        raise TypeError(f"data is a {type(data).__name__}, expected a tensor.{hint}")
    check_floating(data, "data")
    if len(data) < 2:
        raise ValueError(f"data holds {len(data)} images, expected at least 2.{hint}")
