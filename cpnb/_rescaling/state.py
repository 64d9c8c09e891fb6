"""Optimizer state that follows the parameters of a rescaled layer."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from cpnb._rescaling.layers import Change

_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
# The power of the gradient in each entry. RMSprop's momentum adds up steps g/√v, which
# have none.
_POWERS: dict[type[Optimizer], dict[str, int]] = {
    SGD: {"momentum_buffer": 1},
    Adam: _ADAM,
    AdamW: _ADAM,
    RMSprop: {"square_avg": 2, "grad_avg": 1},
}


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise unless this optimizer trains the model and its state is known."""
    if type(optimizer) not in _POWERS:
        known = ", ".join(kind.__name__ for kind in _POWERS)
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, expected one of {known}, "
            "whose state is known to follow. Or rescale before it is built."
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if trained.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            "optimizer trains no parameter of model, expected the one that does. Build "
            "it from model.parameters()."
        )


def carry_state_(change: Change, optimizer: Optimizer) -> None:
    """Transform the state of a layer's parameters, before they are multiplied.

    What is linear in the gradient transforms as the gradient does, what is quadratic is
    divided by the square of the parameter's factor.
    """
    for name, power in _POWERS[type(optimizer)].items():
        entries = [optimizer.state.get(p, {}).get(name) for p in change.parameters]
        if power == 1:
            change.carry_(entries)
            continue
        for entry, factor in zip(entries, change.factors, strict=True):
            if entry is not None:
                entry.div_(factor).div_(factor)
