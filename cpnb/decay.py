"""Weight decay where it makes sense: on kernels and directions, not on scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from cpnb._checks import check_module, check_strength
from cpnb.base import CPLayer
from cpnb.lowrank_base import LowRankLayer

NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def param_groups(
    model: nn.Module, weight_decay: float, *, factors: bool = True
) -> list[dict[str, Any]]:
    """Split the parameters of a model into those with and those without weight decay.

    Decay goes to dense kernels, and to what only gives a direction: the v of weight
    norm, the factor columns of CP layers, the matrices behind a centred, standardised,
    orthogonal or conditioned kernel. The function does not depend on a direction's
    length, so that there decay does not shrink the kernel; it keeps the length, and
    with it the effective learning rate lr/‖v‖², from drifting. Without decay stay
    biases, the parameters of norm layers, the σ and λ of CP layers, the g of weight
    norm, every other gain, and what a module names in an attribute ``no_decay``: its
    own parameters or submodules, as of a layer whose product decays instead.

    Args:
        model: Any module.
        weight_decay: Of the first group, at least 0.
        factors: Whether the matrices of low-rank layers and the columns of CP layers
            decay; not when `cpnb.frobenius_decay` takes the place of their decay.

    Returns:
        Groups for a torch optimizer, ``{"params": [...], "weight_decay": ...}``: first
        with, then without decay, each in the order of the model; an empty one is left
        out, and so are parameters that need no gradient.

    Raises:
        TypeError: If ``model`` is no module or ``weight_decay`` no number.
        ValueError: If ``weight_decay`` is negative or not finite.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    >>> [(len(g["params"]), g["weight_decay"]) for g in param_groups(net, 1e-4)]
    [(1, 0.0001), (3, 0.0)]
    """
    check_module(model)
    weight_decay = check_strength(weight_decay, "weight_decay")
    spared = {
        id(p) for module in model.modules() for p in _without_decay(module, factors)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if id(p) not in spared],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _without_decay(module: nn.Module, factors: bool) -> Iterator[nn.Parameter]:
    spared = {*getattr(module, "no_decay", ())}
    if isinstance(module, CPLayer):
        spared |= {"scale", "lam"} if factors else {"scale", "lam", "factors"}
    if isinstance(module, LowRankLayer) and not factors:
        spared |= {"left", "middle", "right"}
    for name, parameter in module.named_parameters():
        first, own = name.split(".")[0], "." not in name
        always = "bias" in name or isinstance(module, NORM_LAYERS)
        if first in spared or (own and always):
            yield parameter
