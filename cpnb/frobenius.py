"""Frobenius decay: shrink the kernel that the factors stand for, not the factors.

For the low-rank layers, with and without M, and the CP layers: cpnb has no others that
are factorized, such as Tucker or tensor-train layers.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from cpnb._checks import check_module, check_strength
from cpnb._normalizers.conditioned_cp import ConditionedCP
from cpnb.base import CPLayer
from cpnb.cp import component_gram, inverse_norms
from cpnb.hooks import Hook
from cpnb.lowrank_base import LowRankLayer

FactorizedLayer = LowRankLayer | CPLayer


def frobenius_decay(model: nn.Module, mu: float) -> Tensor:
    """``(μ/2) Σ ‖W‖²_F`` over the factorized layers of a model, as a term of a loss.

    W is the whole kernel, but it is never formed: ``‖UVᵀ‖² = ⟨UᵀU, VᵀV⟩``, and
    ``‖W‖² = σ² λᵀΓλ`` in CP form, take matrices of the size of the rank. Dense layers
    and biases are left to ordinary weight decay.

    Args:
        model: A module with low-rank or CP layers, or one such layer.
        mu: Strength μ, in the place of the dense recipe's weight decay.

    Returns:
        Scalar, differentiable.

    Raises:
        TypeError: If ``mu`` is no number.
        ValueError: If it is negative or there is no such layer.

    Source: Khodak et al. 2021, arXiv:2105.01029; for CP layers re-derived.

    >>> from cpnb import LowRankLinear
    >>> layer = LowRankLinear(6, 4, rank=2)
    >>> torch.allclose(frobenius_decay(layer, 1e-2), 5e-3 * layer.weight.norm() ** 2)
    True
    """
    mu = check_strength(mu, "mu")
    squares = [squared_norm(layer) for layer in factorized_layers(model).values()]
    return mu / 2 * torch.stack(squares).sum()


class FrobeniusDecay(Hook):
    """Frobenius decay of the factorized layers, in the place of ordinary decay.

    Before each step the gradient of `frobenius_decay` is added to that of the factors,
    λ and σ: ``μ(UVᵀV, VUᵀU)`` and its like, from products of the size of the rank. The
    weight decay that the optimizer is about to add for these parameters is taken off
    again, so that their own decay is zero; everything else keeps its decay.

    Args:
        mu: Strength μ; None takes over the optimizer's weight decay, and so turns a
            recipe with weight decay into one with Frobenius decay.
        scale: Whether the σ of CP layers takes part. Decay takes as much from σ² as
            from λᵀλ, which is many times larger at the start, so that σ shrinks first.
            Before a batch norm nothing brings it back, and it vanishes: there pass
            False, which leaves it without any decay.

    Raises:
        TypeError: If ``mu`` is no number.
        ValueError: If it is negative.

    Source: Khodak et al. 2021, arXiv:2105.01029; for CP layers re-derived.

    >>> FrobeniusDecay(1e-4)
    FrobeniusDecay(mu=0.0001)
    """

    def __init__(self, mu: float | None = None, *, scale: bool = True) -> None:
        """Keep the settings."""
        self.mu = None if mu is None else check_strength(mu, "mu")
        self.scale = scale

    def start(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Check that there is something to decay, and an optimizer it works with."""
        layers = factorized_layers(model).values()
        own = _own_decay(optimizer)
        self._strength(own)
        decoupled = isinstance(optimizer, AdamW) or optimizer.defaults.get(
            "decoupled_weight_decay", False
        )
        factors = [p for layer in layers for p, _ in frobenius_gradients(layer)]
        if decoupled and any(own.get(parameter) for parameter in factors):
            raise ValueError(
                f"optimizer is {type(optimizer).__name__}, which decays the factors "
                "apart from their gradients, expected no decay of their own. Build it "
                "with weight_decay=0, and FrobeniusDecay with a mu."
            )

    @torch.no_grad()
    def before_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Add the gradient; parameters without one, as frozen ones, are left alone."""
        own = _own_decay(optimizer)
        mu = self._strength(own)
        for layer in factorized_layers(model).values():
            for parameter, gradient in frobenius_gradients(layer):
                if parameter.grad is None:
                    continue
                if self.scale or parameter is not getattr(layer, "scale", None):
                    parameter.grad.add_(gradient, alpha=mu)
                if decay := own.get(parameter, 0):
                    parameter.grad.sub_(parameter, alpha=decay)

    def _strength(self, own: Mapping[Tensor, float]) -> float:
        """μ: the given one, or the one weight decay that the optimizer has."""
        if self.mu is not None:
            return self.mu
        found = {decay for decay in own.values() if decay}
        if len(found) != 1:
            raise ValueError(
                f"mu is None and the optimizer has the weight decays {sorted(found)}, "
                "expected exactly one above 0 to take over. Pass mu."
            )
        return found.pop()

    def __repr__(self) -> str:
        """With the settings that differ from the defaults, and the strength."""
        scale = "" if self.scale else ", scale=False"
        return f"FrobeniusDecay(mu={self.mu}{scale})"


def squared_norm(layer: FactorizedLayer) -> Tensor:
    """``‖W‖²_F`` of a layer's kernel from its factors. A differentiable scalar."""
    if isinstance(layer, CPLayer):
        lam, units = layer.components()
        return lam @ component_gram(units) @ lam if units else lam.sum().square()
    left, right = layer.pair
    return ((left.mT @ left) * (right.mT @ right)).sum()


def frobenius_gradients(layer: FactorizedLayer) -> list[tuple[Tensor, Tensor]]:
    """Parameters of a layer with the gradient of ``½‖W‖²_F`` for each, in closed form.

    For ``U M Vᵀ`` it is ``UMVᵀVMᵀ``, ``UᵀUMVᵀV`` and ``VMᵀUᵀUM``.
    """
    if isinstance(layer, ConditionedCP):
        return _conditioned_gradients(layer)
    if isinstance(layer, CPLayer):
        return _cp_gradients(layer)
    left, middle, right = layer.matrices
    inner, outer = left.mT @ left, right.mT @ right
    if middle is None:
        found = [(layer.left, left @ outer), (layer.right, right @ inner)]
    else:
        found = [
            (layer.left, left @ (middle @ outer @ middle.mT)),
            (layer.middle, inner @ middle @ outer),
            (layer.right, right @ (middle.mT @ inner @ middle)),
        ]
    return [(parameter, g.reshape(parameter.shape)) for parameter, g in found]


def _cp_gradients(layer: CPLayer) -> list[tuple[Tensor, Tensor]]:
    """Gradients of ``½ σ² λᵀΓλ``; those of the factors through the unit columns."""
    lam, units = layer.components()  # λ here is σλ, or σ|λ|
    grams = [unit.T @ unit for unit in units]
    gram = math.prod(grams, start=lam.new_ones(len(lam), len(lam)))
    pull = gram @ lam
    sign = 1 if layer.signed else layer.lam.sign()
    found = [(layer.scale, layer.lam * sign @ pull)]
    found.append((layer.lam, layer.scale * sign * pull))
    if not units:
        return found
    inverses = inverse_norms(layer.factors)
    for n, (factor, unit) in enumerate(zip(layer.factors, units, strict=True)):
        others = math.prod([*grams[:n], *grams[n + 1 :]], start=lam[:, None] * lam)
        # The gradient by the unit column, less what would only change its length.
        across = unit @ others - unit * (lam * pull)
        found.append((factor, across * inverses[n]))
    return found


@torch.enable_grad()
def _conditioned_gradients(layer: ConditionedCP) -> list[tuple[Tensor, Tensor]]:
    """By autograd: the row scales depend on all factors."""
    parameters = [
        p for p in (layer.scale, layer.lam, *layer.factors) if p.requires_grad
    ]
    half = squared_norm(layer) / 2
    return list(zip(parameters, torch.autograd.grad(half, parameters), strict=True))


def factorized_layers(model: nn.Module) -> dict[str, FactorizedLayer]:
    """The low-rank and CP layers of a model by name; at least one.

    Raises:
        ValueError: If there is none.
    """
    check_module(model)
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, FactorizedLayer)
    }
    if not found:
        raise ValueError(
            f"model is a {type(model).__name__} without low-rank or CP layers. Call "
            "cpnb.factorize or cpnb.canonicalize first."
        )
    return found


def _own_decay(optimizer: Optimizer) -> dict[Tensor, float]:
    """The weight decay that the optimizer applies to each of its parameters."""
    return {
        parameter: group.get("weight_decay", 0.0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
