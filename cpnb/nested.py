"""Training that makes a network fit to be cut: nested ranks."""

from __future__ import annotations

import math

import torch
from torch import nn

from cpnb._checks import check_count
from cpnb.hooks import Hook
from cpnb.surgery import cp_layers


class NestedRank(Hook):
    """Train every CP layer so that its first components alone already work.

    Every ``period``-th step trains the whole network, as without the hook. Every other
    step trains a shorter one: each CP layer uses only its first components, their
    number drawn anew for every layer and step. A component is therefore trained
    together with those before it, and less often the later it comes: the components
    order themselves by importance, and ``truncate(net, …, key="nested")``, which keeps
    the first ones, costs little without training again.

    The draws depend on ``seed`` and the number of the step only, so that a resumed
    training draws what an uninterrupted one does.

    Args:
        smallest: Smallest share of a layer's components in a shortened step, in (0, 1].
        period: Train the whole network every so many steps; 1 never shortens it.
        seed: Seed of the draws.

    Raises:
        TypeError: If ``period`` or ``seed`` is no int, or ``smallest`` no number.
        ValueError: If ``smallest``, ``period`` or ``seed`` is out of range.

    Source: ordered prefixes as in nested dropout (Rippel et al. 2014, arXiv:1402.0915);
    for CP components our own construction.

    >>> from cpnb import CPLinear, fit
    >>> net = nn.Sequential(CPLinear(20, 10, rank=6), nn.ReLU(), CPLinear(10, 4))
    >>> data = torch.randn(64, 20), torch.arange(64) % 4
    >>> fit(net, data, epochs=2, hooks=[NestedRank()], progress=False).status
    'finished'
    """

    def __init__(
        self, smallest: float = 0.3, *, period: int = 2, seed: int = 0
    ) -> None:
        """Check and keep the arguments."""
        if isinstance(smallest, bool) or not isinstance(smallest, int | float):
            raise TypeError(f"smallest is {smallest!r}, expected a share in (0, 1].")
        if not 0 < smallest <= 1:
            raise ValueError(f"smallest is {smallest}, expected a share in (0, 1].")
        self.smallest = smallest
        self.period = check_count(period, "period")
        self.seed = check_count(seed, "seed", least=0)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a network without CP layers.

        Raises:
            ValueError: If there is none.
        """
        if not cp_layers(model):
            raise ValueError(
                f"model is a {type(model).__name__} without CP layers, whose ranks "
                "NestedRank could shorten. Call cpnb.canonicalize first."
            )

    def before_forward(self, model: nn.Module, step: int) -> None:
        """Choose how many components each layer uses in this step."""
        layers = cp_layers(model).values()
        if step % self.period == 0:
            self.stop(model)
            return
        generator = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + step) % 2**63
        )
        shares = torch.rand(len(layers), generator=generator).tolist()
        for layer, share in zip(layers, shares, strict=True):
            least = math.ceil(self.smallest * layer.rank)
            layer.active_rank = least + int(share * (layer.rank - least + 1))

    def after_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """Give every layer its full rank back."""
        self.stop(model)

    def stop(self, model: nn.Module) -> None:
        """Give every layer its full rank back."""
        for layer in cp_layers(model).values():
            layer.active_rank = None

    def __repr__(self) -> str:
        """The arguments, for the recipe of a run."""
        return f"NestedRank({self.smallest:g}, period={self.period}, seed={self.seed})"
