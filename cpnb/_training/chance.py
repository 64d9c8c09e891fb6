"""The randomness of a training: order of the images, augmentation, dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpnb.augmentation import Augment

_NOISE = 0x2545F491  # keeps the two streams of a seed apart
_KEYS = -(2**31), 2**31


class EpochPlan(NamedTuple):
    """What chance decides of one epoch, for each of m networks."""

    order: Tensor  # indices of the images, (m, n)
    changes: Tensor | None  # of each image, see Augment.draw, (m, n, 5)
    keys: Tensor  # of each step's dropout, (m, steps, 2)


class Chance:
    """One stream of random numbers for each network, the same on every device.

    Args:
        seeds: One for each network.
        device: Where the networks train.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._order = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._noise = [torch.Generator().manual_seed(seed ^ _NOISE) for seed in seeds]

    def plan(self, shape: torch.Size, steps: int, augment: Augment | None) -> EpochPlan:
        """Draw the next epoch over images of this shape."""
        order = [torch.randperm(shape[0], generator=g) for g in self._order]
        keys = [
            torch.randint(*_KEYS, (steps, 2), generator=g, dtype=torch.int32)
            for g in self._noise
        ]
        changes = None
        if augment is not None:
            changes = self._stack(
                [augment.draw(len(order[0]), shape, g) for g in self._noise]
            )
        return EpochPlan(self._stack(order), changes, self._stack(keys))

    def _stack(self, drawn: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(drawn)).to(self._device)

    def state_dict(self) -> dict[str, Any]:
        """The states of all generators, also of those that layers may read."""
        state = {
            "order": [generator.get_state() for generator in self._order],
            "noise": [generator.get_state() for generator in self._noise],
            "torch": torch.get_rng_state(),
        }
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, generators in (("order", self._order), ("noise", self._noise)):
            for generator, kept in zip(generators, state[name], strict=True):
                generator.set_state(kept.cpu())
        torch.set_rng_state(state["torch"].cpu())
        if self._device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self._device)
