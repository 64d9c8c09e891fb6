"""Optimizers and learning-rate schedules by name, with checked settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

from cpnb.decay import param_groups

OPTIMIZERS = ("adam", "sgd", "rmsprop")
SCHEDULES = (None, "cosine", "step", "one-cycle")

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
# What one rate trains, by name, and the rate.
Share = tuple[Mapping[str, Tensor], float]
# Names of parameters and their weight decay.
Decay = tuple[Sequence[str], float]


def check_optimizer(
    name: str | MakeOptimizer, lr: float, momentum: float, weight_decay: float
) -> dict[str, Any]:
    """Refuse impossible settings, and say which of them the optimizer uses.

    Args:
        name: One of ``OPTIMIZERS``, or a function that turns a list of parameters into
            an optimizer; the settings below are then not used.
        lr: Learning rate.
        momentum: Momentum; only ``"sgd"`` uses it.
        weight_decay: Weight decay.

    Returns:
        Name and settings for a recipe, None where unused.

    Raises:
        TypeError: If a setting is no number.
        ValueError: If a name or number is impossible.
    """
    if callable(name):
        settings = dict.fromkeys(("lr", "momentum", "weight_decay"))
        return {"optimizer": getattr(name, "__name__", type(name).__name__), **settings}
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer is {name!r}, expected one of {', '.join(map(repr, OPTIMIZERS))}"
            " or a function that turns a list of parameters into an optimizer."
        )
    _check_number("lr", lr, "above 0", lambda value: value > 0)
    _check_number("momentum", momentum, "from 0 to below 1", lambda v: 0 <= v < 1)
    _check_number("weight_decay", weight_decay, "at least 0", lambda v: v >= 0)
    return {
        "optimizer": name,
        "lr": lr,
        "momentum": momentum if name == "sgd" else None,
        "weight_decay": weight_decay,
    }


def build_optimizer(
    name: str | MakeOptimizer,
    shares: Sequence[Share],
    decays: Sequence[Decay],
    momentum: float,
    *,
    capturable: bool = False,
) -> Optimizer:
    """Make an optimizer with one group for each rate and weight decay.

    Args:
        name: As in `check_optimizer`.
        shares: What to train and at which rate.
        decays: Every name of a share once, with its weight decay.
        momentum: Momentum; only ``"sgd"`` uses it.
        capturable: Whether its step is to be captured in a CUDA graph: the rates then
            are tensors, which a schedule changes in place.

    Raises:
        TypeError: If the function returns no optimizer.
    """
    if callable(name):
        made = name([tensor for tensors, _ in shares for tensor in tensors.values()])
        if not isinstance(made, Optimizer):
            raise TypeError(
                f"optimizer returned a {type(made).__name__}, expected a "
                "torch.optim.Optimizer."
            )
        return made
    groups = []
    for tensors, lr in shares:
        for names, decay in decays:
            params = [tensors[name] for name in names]
            # As a tensor it can change without a new capture.
            rate = torch.tensor(lr, device=params[0].device) if capturable else lr
            groups.append({"params": params, "lr": rate, "weight_decay": decay})
    if name == "sgd":
        # Only the fused step reads a rate on the device without waiting for it.
        return SGD(groups, momentum=momentum, fused=capturable or None)
    kind = Adam if name == "adam" else RMSprop
    return kind(groups, capturable=capturable)


def decay_groups(model: nn.Module, weight_decay: float) -> list[Decay]:
    """Names of the parameters to train, with their decay; see `cpnb.param_groups`."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not weight_decay:
        return [(list(names.values()), 0.0)]  # one group instead of two is faster
    return [
        ([names[id(p)] for p in group["params"]], group["weight_decay"])
        for group in param_groups(model, weight_decay)
    ]


def build_schedule(
    name: str | None, optimizer: Optimizer, steps: int
) -> LRScheduler | None:
    """Make a schedule that is stepped ``steps`` times, once after each optimizer step.

    Args:
        name: ``"cosine"`` anneals the rate to 0; ``"step"`` divides it by ten after a
            half and again after three quarters of the steps; ``"one-cycle"`` lets it
            rise to the given rate over the first 30 % and fall to nearly 0, at a
            constant momentum; None keeps it.
        optimizer: Whose rates to change.
        steps: Steps of the whole training.

    Raises:
        ValueError: If the name is unknown.
    """
    check_schedule(name)
    if name == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if name == "step":
        return MultiStepLR(optimizer, [-(-steps // 2), -(-3 * steps // 4)])
    if name == "one-cycle":
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        return OneCycleLR(optimizer, rates, total_steps=steps, cycle_momentum=False)
    return None


def check_schedule(name: str | None) -> None:
    """Refuse an unknown schedule."""
    if name not in SCHEDULES:
        known = ", ".join(map(repr, SCHEDULES))
        raise ValueError(f"schedule is {name!r}, expected one of {known}.")


def _check_number(
    name: str, value: float, expected: str, fits: Callable[[float], bool]
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, expected a number {expected}.")
    if not math.isfinite(value) or not fits(value):
        raise ValueError(f"{name} is {value}, expected a number {expected}.")
