"""Optimizers and learning-rate schedules by name, weight decay where it makes sense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import SGD, Adam, Optimizer, RMSprop, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

OPTIMIZERS: dict[str, Any] = {"adam": Adam, "sgd": SGD, "rmsprop": RMSprop}
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


def param_groups(
    model: nn.Module, weight_decay: float, *, factors: bool = True
) -> list[dict[str, Any]]:
    """Split the trained parameters into those with and those without weight decay.

    Decay goes to dense kernels, and to what only gives a direction: the v of weight
    norm, the factor columns of CP layers, the matrices behind a standardised,
    orthogonal or conditioned kernel. There it does not shrink the kernel, but keeps the
    effective learning rate lr/‖v‖² from falling, in the step gauge as well. Biases, all
    else with fewer than two axes, norm layers, the g of weight norm, and what a module
    names in ``no_decay``, such as the σ and λ of CP layers, stay without decay.

    Args:
        model: Any module.
        weight_decay: Of the first group.
        factors: Whether what a layer names in ``factor_names``, as CP and low-rank
            layers do, decays; not when `FrobeniusDecay` takes the place of its decay.

    Returns:
        Groups for a torch optimizer, first with, then without decay, each in the order
        of the model; an empty one is left out.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    >>> [(len(g["params"]), g["weight_decay"]) for g in param_groups(net, 1e-4)]
    [(1, 0.0001), (3, 0.0)]
    """
    spared = {id(p) for m in model.modules() for p in _without_decay(m, factors)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in trained if id(p) not in spared]
    others = [p for p in trained if id(p) in spared]
    return [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decaying, weight_decay), (others, 0.0))
        if params
    ]


def _without_decay(module: nn.Module, factors: bool) -> Iterator[nn.Parameter]:
    names = {*getattr(module, "no_decay", ())}
    if not factors:
        names |= {*getattr(module, "factor_names", ())}
    if isinstance(module, ParametrizationList) and isinstance(module[0], _WeightNorm):
        names.add("original0")  # g
    for name, parameter in module.named_parameters():
        own = "." not in name
        always = "bias" in name or isinstance(module, nn.LayerNorm | nn.RMSNorm)
        if name.split(".")[0] in names or parameter.ndim < 2 or (own and always):
            yield parameter


def make_optimizer(
    optimizer: str | MakeOptimizer,
    model: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Optimizer:
    """Make the optimizer of `cpnb.fit`, over the parameters that need a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if callable(optimizer):
        return optimizer(trained)
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer is {optimizer!r}, expected one of "
            f"{', '.join(map(repr, OPTIMIZERS))} or a function that makes one, as "
            "lambda parameters: torch.optim.Adam(parameters, lr=0.001)."
        )
    # One group instead of two is faster.
    groups = param_groups(model, weight_decay) if weight_decay else trained
    options = {"momentum": momentum} if optimizer == "sgd" else {}
    return OPTIMIZERS[optimizer](groups, lr=lr, **options)


# How the rate goes over so many steps.
SCHEDULES: dict[str | None, Callable[[Optimizer, int], LRScheduler]] = {
    None: lambda optimizer, _: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
    "cosine": lr_scheduler.CosineAnnealingLR,
    "step": lambda optimizer, steps: lr_scheduler.MultiStepLR(
        optimizer, [ceil(steps / 2), ceil(3 * steps / 4)]
    ),
}


def make_schedule(name: str | None, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Make a schedule that is stepped after each of ``steps`` optimizer steps.

    ``"cosine"`` anneals the rate to 0; ``"step"`` divides it by ten after a half and
    again after three quarters of the steps; None keeps it.
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"schedule is {name!r}, expected one of {', '.join(map(repr, SCHEDULES))}."
        )
    return SCHEDULES[name](optimizer, steps)
