"""Which components to keep: their order by a key, and λ for those that stay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cpnb._checks import check_module
from cpnb.base import CPLayer
from cpnb.probing import probe
from cpnb.ranked import RankedLayer
from cpnb.refit import finite_components, unit_gram
from cpnb.surgery import cp_layers

DATA_KEYS = ("gradient", "hessian", "activation")
KEYS = ("lam", "greedy", "nested", *DATA_KEYS, "random")
_REFITS = {False: False, True: True, "weight": True, "data": "data"}


def component_order(
    layer: CPLayer,
    key: str = "lam",
    *,
    model: nn.Module | None = None,
    data: Any = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Tensor:
    """Components of a layer, the most important first.

    Args:
        layer: A CP layer.
        key: ``"lam"``: the largest |λ|, as the paper. ``"greedy"``: the last to go when
            always the component goes that changes the kernel least. ``"nested"``: the
            first ones, after training with `cpnb.NestedRank`. On images:
            ``"gradient"``: the largest |λ_r ∂loss/∂λ_r|, the change of the mean loss to
            first order when the component goes. ``"hessian"``: the largest change to
            second order, with the diagonal of the Gauss-Newton matrix and no gradient.
            ``"activation"``: the largest mean square of what the component adds to the
            outputs. ``"random"``: drawn, as a control.
        model: The network that holds the layer, for the keys on images; None if the
            layer is all of it.
        data: For these keys: a data set, of which 1,000 training images are used, or a
            split or a pair ``(images, labels)``, used whole.
        generator: Of the draw; None gives the same order every time.
        progress: Whether to show a bar when images take more than two seconds.

    Returns:
        Indices. Shape ``(rank,)``.

    Raises:
        TypeError: If there is no data for a key that looks at it, or the layer cannot
            be cut.
        ValueError: If ``key`` is unknown, the layer is not in ``model`` or a parameter
            is not finite.

    Source: "lam" Veeramacheneni et al. 2022, arXiv:2206.01509; "gradient" Molchanov et
    al. 2017, arXiv:1611.06440; "hessian" LeCun, Denker and Solla 1990 (Optimal brain
    damage). The others, and their use for components, are our own.
    """
    if not isinstance(layer, CPLayer):
        raise TypeError(f"layer is a {type(layer).__name__}, expected a CP layer.")
    network = layer if model is None else model
    names = [name for name, other in cp_layers(network).items() if other is layer]
    if not names:
        raise ValueError(
            f"layer is no part of the {type(model).__name__} given as model, expected "
            "the network that holds it."
        )
    orders = component_orders(
        network, names, key, data=data, generator=generator, progress=progress
    )
    return orders[names[0]]


def component_orders(
    model: nn.Module,
    names: Iterable[str],
    key: str,
    *,
    data: Any = None,
    generator: torch.Generator | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The order of the components of some layers; see `component_order`, `probe`."""
    check_module(model)
    layers = {name: cp_layers(model)[name] for name in names}
    for layer in layers.values():
        if nn.utils.parametrize.is_parametrized(layer):
            raise TypeError(
                f"layer is a parametrized {type(layer).__name__}, whose parameters "
                "cannot be cut. Call cpnb.remove_normalizer(model, keep_cp=True) "
                "first."
            )
    if key not in KEYS:
        raise ValueError(f"key is {key!r}, expected one of {KEYS}.")
    parts = {name: finite_components(layer) for name, layer in layers.items()}
    if key in DATA_KEYS:
        _check_data(data, f"key {key!r}")
        scores = probe(model, layers, data, key, memory=memory, progress=progress)
        return {name: _descending(score) for name, score in scores.items()}
    if key == "lam":
        return {name: _descending(lam.abs()) for name, (lam, _) in parts.items()}
    if key == "greedy":
        return {name: _greedy(lam, units) for name, (lam, units) in parts.items()}
    if key == "nested":
        return {
            name: torch.arange(len(lam), device=lam.device)
            for name, (lam, _) in parts.items()
        }
    seed = 0
    if generator is not None:
        drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
        seed = int(drawn)
    return {name: _random(lam, seed) for name, (lam, _) in parts.items()}


def ranked_layers(
    model: nn.Module,
    names: Iterable[str],
    *,
    key: str = "lam",
    refit: bool | str = False,
    data: Any = None,
    generator: torch.Generator | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> dict[str, RankedLayer]:
    """Some CP layers of a network, ready to be cut.

    The arguments are those of `cpnb.truncate`, and ``memory`` of `probe`.
    """
    names, refit = list(names), check_refit(refit)
    if refit == "data":
        _check_data(data, "refit='data'")
    looking: dict[str, Any] = {"memory": memory, "progress": progress}
    orders = component_orders(
        model, names, key, data=data, generator=generator, **looking
    )
    layers = {name: cp_layers(model)[name] for name in names}
    grams = dict.fromkeys(names)
    if refit == "data":
        grams = probe(model, layers, data, "output", **looking)
    elif refit:
        grams = {
            name: unit_gram(*finite_components(layer)) for name, layer in layers.items()
        }
    return {
        name: RankedLayer(layer, orders[name], grams[name])
        for name, layer in layers.items()
    }


def check_refit(refit: bool | str) -> bool | str:
    """False, True (also for ``"weight"``) or ``"data"``."""
    if not isinstance(refit, bool | str) or refit not in _REFITS:
        raise ValueError(
            f"refit is {refit!r}, expected False, True or 'weight' (least squares on "
            "the kernel), or 'data' (on the outputs)."
        )
    return _REFITS[refit]


def _check_data(data: Any, what: str) -> None:
    if data is None:
        raise TypeError(
            f"data is None, expected images for {what}, which looks at them: a data "
            "set, or a pair (images, labels) of tensors. Pass data=..."
        )


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True)


def _random(lam: Tensor, seed: int) -> Tensor:
    # Seeded anew for each layer, so that the order of one does not depend on which
    # others are cut.
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(lam), generator=generator).to(lam.device)


def _greedy(lam: Tensor, units: list[Tensor]) -> Tensor:
    # M[r,s] = ⟨component r, component s⟩: removing the set S costs ‖Σ_S‖² = Σ_{S×S} M.
    overlap = lam[:, None] * unit_gram(lam, units) * lam
    cost = overlap.diagonal().clone()
    removed = []
    for _ in range(len(lam)):
        worst = cost.argmin()
        removed.append(worst)
        cost += 2 * overlap[worst]
        cost[worst] = torch.inf
    return torch.stack(removed[::-1])
