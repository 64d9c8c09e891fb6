"""Several networks at once: what is asked for, and whether one graph can train them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpnb._checks import check_count, check_module
from cpnb._training.batches import Source, batch_slices
from cpnb._training.chance import Chance
from cpnb._training.networks import (
    Networks,
    Single,
    Stacked,
    check_trainable,
    tensors_of,
)
from cpnb._training.settings import Settings
from cpnb.evaluation import placement

# Of the trial step, in float64: rounding stays far below, another function far above.
_TOLERANCE = 1e-4

Members = tuple[list[nn.Module], list[int], list[Any]]


def check_members(
    model: nn.Module | Sequence[nn.Module],
    seed: int,
    seeds: Sequence[int] | None,
    lr: float | Sequence[float],
) -> Members:
    """Networks, seeds and rates as lists of one length; refuse what does not fit."""
    if isinstance(model, nn.Module) or not isinstance(model, Sequence):
        check_module(model)
        if seeds is not None:
            raise TypeError(
                "model is a single module, expected a list of modules to go with "
                "seeds, one for each. For one module pass seed."
            )
        check_trainable(model)
        return [model], [check_count(seed, "seed", least=0)], [lr]
    models = list(model)
    if not models:
        raise ValueError("model is an empty list, expected at least one module.")
    for n, member in enumerate(models):
        check_module(member, f"model[{n}]")
        check_trainable(member)
        if any(member is other for other in models[:n]):
            raise ValueError(
                f"model[{n}] is in the list twice, expected different modules. Use "
                "copy.deepcopy."
            )
    if not hasattr(seeds, "__len__") or len(seeds) != len(models):
        got = f"{len(seeds)} long" if hasattr(seeds, "__len__") else repr(seeds)
        raise ValueError(
            f"seeds is {got}, expected one seed for each of the {len(models)} modules, "
            f"such as range({len(models)})."
        )
    seeds = [check_count(s, f"seeds[{n}]", least=0) for n, s in enumerate(seeds)]
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(models)
    if len(rates) != len(models):
        raise ValueError(
            f"lr is {len(rates)} long, expected a number, or one for each of the "
            f"{len(models)} modules."
        )
    nothing = torch.empty(0)
    places = [placement(member, nothing) for member in models]
    for n, place in enumerate(places):
        if place != places[0]:
            raise ValueError(
                f"model[{n}] is on {place[0]} in {place[1]}, expected {places[0][0]} "
                f"and {places[0][1]} as model[0]."
            )
    return models, seeds, rates


def choose_way(
    vectorise: bool | None,
    models: Sequence[nn.Module],
    seeds: Sequence[int],
    source: Source,
    settings: Settings,
    hooked: bool,
) -> dict[str, str]:
    """One graph or one network after the other, and why, for a recipe.

    Raises:
        TypeError: If ``vectorise`` is no bool and not None.
        ValueError: If it is True but one graph cannot train these networks.
    """
    if vectorise is not None and not isinstance(vectorise, bool):
        raise TypeError(f"vectorise is {vectorise!r}, expected None, True or False.")
    if vectorise is False:
        return _way("sequential", "asked for")
    default = f"the default on {source.labels.device.type}"
    if vectorise is None and source.labels.device.type == "cpu":
        return _way("sequential", default)
    reason = _obstacle(models, seeds, source, settings, hooked)
    if reason is None:
        return _way("vectorised", "asked for" if vectorise else default)
    if vectorise:
        raise ValueError(
            f"vectorise is True, but {reason}. Set vectorise=None to train one after "
            "the other."
        )
    return _way("sequential", reason)


def _way(members: str, reason: str) -> dict[str, str]:
    return {"members": members, "members_reason": reason}


def _obstacle(
    models: Sequence[nn.Module],
    seeds: Sequence[int],
    source: Source,
    settings: Settings,
    hooked: bool,
) -> str | None:
    """Why one graph cannot train these networks as each would train alone, or None.

    What the networks compute is tried on copies in the first step: in float64, where
    one graph must agree with one network after the other in scores, gradients and
    buffers; then in the precision of the training, where it must run as they do.
    """
    if hooked:
        return "hooks act on one network at a time"
    if callable(settings.optimizer):
        return "an optimizer of one's own may mix the networks"
    if settings.precision(source.labels.device) == torch.float16:
        return "the networks would share the loss scale of float16"
    for n, model in enumerate(models):
        if _form(model) != _form(models[0]):
            return f"model[{n}] is built otherwise than model[0]"
        if any(map(_is_hooked, model.modules())):
            return f"model[{n}] has forward or backward hooks"
    try:
        inputs = _first_step(seeds, source, settings)
        return _disagreement(models, source, *inputs) or _imprecision(
            models, source, *inputs, settings.precision(source.labels.device)
        )
    except Exception as error:
        # Whatever it is: it either goes away in a network of its own or shows there.
        said = f"{error}" or type(error).__name__
        return f"torch.vmap fails: {said.splitlines()[0].rstrip(' .')}"


def _first_step(
    seeds: Sequence[int], source: Source, settings: Settings
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `Step` gets first: indices, changes and keys for each network."""
    chance = Chance(seeds, source.labels.device)
    plan = chance.plan(source.images.shape, 1, source.augment)
    first = batch_slices(len(source.labels), settings.batch_size)[0]
    changes = None if plan.changes is None else plan.changes[:, first]
    return plan.order[:, first], changes, plan.keys[:, 0]


def _disagreement(
    models: Sequence[nn.Module],
    source: Source,
    index: Tensor,
    changes: Tensor | None,
    keys: Tensor,
) -> str | None:
    """What one graph computes otherwise than a network alone, in float64."""
    twins = [deepcopy(model).double().train() for model in models]
    images, labels = replace(source, dtype=torch.float64).batch(index, changes)
    inputs = images.double(), labels, keys
    _, together = _trial(Stacked(twins), *inputs)
    for n, twin in enumerate(twins):
        _, alone = _trial(Single(twin), *(given[n : n + 1] for given in inputs))
        whole = torch.stack([expected.norm() for expected in alone.values()]).norm()
        for name, expected in alone.items():
            error = (together[name][n] - expected[0]).norm()
            scale = torch.maximum(expected.norm(), 1e-3 * whole)
            if not error <= _TOLERANCE * scale:
                return f"in one graph model[{n}] has another {name}"
    return None


def _imprecision(
    models: Sequence[nn.Module],
    source: Source,
    index: Tensor,
    changes: Tensor | None,
    keys: Tensor,
    precision: torch.dtype | None,
) -> str | None:
    """Whether one graph, as it would be trained, scores in another dtype."""
    twins = [deepcopy(model).train() for model in models]
    inputs = *source.batch(index, changes), keys
    together, _ = _trial(Stacked(twins), *inputs, precision)
    alone, _ = _trial(Single(twins[0]), *(given[:1] for given in inputs), precision)
    if together == alone:
        return None
    return f"in one graph the scores are in {together}, expected {alone}"


def _trial(
    networks: Networks,
    images: Tensor,
    labels: Tensor,
    keys: Tensor,
    precision: torch.dtype | None = None,
) -> tuple[torch.dtype, dict[str, Tensor]]:
    """Forward and backward: dtype of the scores, all that comes of it in float64.

    Shapes ``(m, ...)``.
    """
    with torch.autocast(images.device.type, precision, enabled=precision is not None):
        scores = networks(images, keys)
    wide = scores.flatten(0, 1).double()
    losses = F.cross_entropy(wide, labels.flatten(), reduction="none")
    losses.view(labels.shape).mean(1).sum().backward()
    found = {"score": scores.detach(), **networks.outcome()}
    return scores.dtype, {name: tensor.double() for name, tensor in found.items()}


def _form(model: nn.Module) -> tuple[Any, ...]:
    """Modules with their settings, tensors with their shapes, and what is trained."""
    tensors = tensors_of(model).items()
    shapes = [(name, t.shape, t.dtype, t.requires_grad) for name, t in tensors]
    return str(model), shapes


def _is_hooked(module: nn.Module) -> bool:
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )
