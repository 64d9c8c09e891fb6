"""What tells one training from another: a checkpoint belongs to one of them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from cpnb._training.networks import tensors_of

if TYPE_CHECKING:
    from cpnb._training.loop import Training

# How several networks are trained, which the file's name tells, and why so.
_NO_IDENTITY = {"members", "members_reason"}


def identity(training: Training) -> dict[str, Any]:
    """All that must be the same for the same curve, in the types of JSON."""
    recipes = [run.recipe for run in training.runs]
    found = {
        name: [recipe[name] for recipe in recipes] if len(recipes) > 1 else value
        for name, value in recipes[0].items()
        if name not in _NO_IDENTITY
    }
    model = training.networks.models[0]
    for name, tensor in tensors_of(model).items():
        found[f"shape of {name}"] = str(tuple(tensor.shape))
        found[f"dtype of {name}"] = str(tensor.dtype)
    found["hash of the modules"] = hashlib.sha256(str(model).encode()).hexdigest()
    return _in_json(found | training.source.identity | training.optimizer_settings)


def optimizer_settings(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Class, settings and parameters of an optimizer, as they are now.

    A recipe says no more of one that a function made than its name and first rate.
    """
    kind = type(optimizer)
    found: dict[str, Any] = {
        "optimizer class": f"{kind.__module__}.{kind.__qualname__}"
    }
    names = {id(tensor): name for name, tensor in tensors_of(model).items()}
    for n, group in enumerate(optimizer.param_groups):
        trained = [names.get(id(parameter)) for parameter in group["params"]]
        for name, value in {**group, "params": trained}.items():
            found[f"{name} of optimizer group {n}"] = value
    return _in_json(found)


def _in_json(found: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(found, default=_plain))


def _plain(value: Any) -> Any:
    """What JSON has no form for: the numbers of a tensor, of all else the name."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return getattr(value, "__qualname__", type(value).__qualname__)
