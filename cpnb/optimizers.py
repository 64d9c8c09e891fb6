"""Optimizers by name, with checked settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

OPTIMIZERS = ("adam", "sgd", "rmsprop")


def build_optimizer(
    name: str | Callable[[list[nn.Parameter]], Optimizer],
    parameters: list[nn.Parameter],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> tuple[Optimizer, dict[str, Any]]:
    """Make an optimizer, and say which of the settings it uses.

    Args:
        name: One of ``OPTIMIZERS``, or a function that turns a list of parameters into
            an optimizer; the settings below are then not used.
        parameters: What to train.
        lr: Learning rate.
        momentum: Momentum; only ``"sgd"`` uses it.
        weight_decay: Weight decay.

    Returns:
        The optimizer, and its name and settings for a recipe, None where unused.

    Raises:
        TypeError: If the function returns no optimizer.
        ValueError: If there is nothing to train, or a name or number is impossible.
    """
    if not parameters:
        raise ValueError(
            "model has no parameters to train, expected at least one with "
            "requires_grad=True."
        )
    if callable(name):
        made = name(parameters)
        if not isinstance(made, Optimizer):
            raise TypeError(
                f"optimizer returned a {type(made).__name__}, expected a "
                "torch.optim.Optimizer."
            )
        used = {"lr": made.param_groups[0]["lr"], "momentum": None}
        return made, {"optimizer": type(made).__name__, **used, "weight_decay": None}
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer is {name!r}, expected one of {', '.join(map(repr, OPTIMIZERS))}"
            " or a function that turns a list of parameters into an optimizer."
        )
    _check_number("lr", lr, "above 0", lambda value: value > 0)
    _check_number("momentum", momentum, "from 0 to below 1", lambda v: 0 <= v < 1)
    _check_number("weight_decay", weight_decay, "at least 0", lambda v: v >= 0)
    settings = {"optimizer": name, "lr": lr, "momentum": None}
    if name == "sgd":
        made = SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay)
        settings["momentum"] = momentum
    else:
        kind = Adam if name == "adam" else RMSprop
        made = kind(parameters, lr, weight_decay=weight_decay)
    return made, {**settings, "weight_decay": weight_decay}


def _check_number(
    name: str, value: float, expected: str, fits: Callable[[float], bool]
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, expected a number {expected}.")
    if not math.isfinite(value) or not fits(value):
        raise ValueError(f"{name} is {value}, expected a number {expected}.")
