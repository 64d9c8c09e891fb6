"""Batch, group and layer norm: layers that are put in, not reparametrisations."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from cpnb._checks import check_count
from cpnb._normalizers.base import FACTORISED, chosen_layers, refuse_options
from cpnb.decay import NORM_LAYERS
from cpnb.surgery import Skip, replace_layers

_BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
# The order of the kernel before each, where that leaves a choice the one with an axis.
_ORDERS = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}

# Makes the norm for some channels behind a kernel of some order, 2 if it is linear.
Make = Callable[[int, int], nn.Module]


def batch(model: nn.Module, skip: Skip, *, output: bool = False) -> nn.Module:
    """Batch norm behind every layer."""
    return _with_norms(model, skip, output, lambda size, order: _BATCH[order](size))


def group(
    model: nn.Module, skip: Skip, *, group_size: int = 16, output: bool = False
) -> nn.Module:
    """Group norm behind every layer, of at least ``group_size`` channels each."""
    least = check_count(group_size, "group_size")

    def make(size: int, order: int) -> nn.Module:
        counts = range(max(1, size // least), 0, -1)
        return nn.GroupNorm(next(n for n in counts if size % n == 0), size)

    return _with_norms(model, skip, output, make)


def layer(model: nn.Module, skip: Skip, *, output: bool = False) -> nn.Module:
    """Layer norm behind every layer: over channels and positions together."""

    def make(size: int, order: int) -> nn.Module:
        return nn.LayerNorm(size) if order == 2 else nn.GroupNorm(1, size)

    return _with_norms(model, skip, output, make)


def _with_norms(model: nn.Module, skip: Skip, output: bool, make: Make) -> nn.Module:
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NORM_LAYERS)
    }
    if norms:
        why = "for a model with norm layers, which are exchanged where they stand"
        refuse_options(model, why, skip, output)
        return _exchanged(model, norms, make)
    layers = chosen_layers(model, skip, FACTORISED, output=output)
    return replace_layers(
        model, {name: _followed(layer, make) for name, layer in layers.items()}
    )


def _followed(layer: nn.Module, make: Make) -> nn.Sequential:
    product = isinstance(layer, FACTORISED)
    shape = layer.kernel_shape if product else layer.weight.shape
    norm = _placed(make(shape[0], len(shape)), next(layer.parameters()))
    return nn.Sequential(copy.deepcopy(layer), norm).train(layer.training)


def _exchanged(model: nn.Module, norms: dict[str, nn.Module], make: Make) -> nn.Module:
    """Put another norm in the place of every batch norm."""
    new = {}
    for name, old in norms.items():
        if type(old) not in _ORDERS:
            raise ValueError(
                f"layer {name!r} is a {type(old).__name__}, expected a model without "
                "norm layers, or with batch norm, which is exchanged. Build it without."
            )
        norm = make(old.num_features, _ORDERS[type(old)])
        if type(norm) is type(old):
            norm = copy.deepcopy(old)
        elif old.affine:
            norm = _placed(norm, old.weight)
            norm.load_state_dict({"weight": old.weight, "bias": old.bias})
        new[name] = norm.train(old.training)
    return replace_layers(model, new)


def _placed(norm: nn.Module, like: Tensor) -> nn.Module:
    return norm.to(device=like.device, dtype=like.dtype)
