"""Ranks: the break-even rank and the ways to say a rank.

Rules that find a rank have their base classes here and live above: those that look at a
kernel in `rules.py`, those that share out a whole model's budget in `budgets.py`.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class KernelRule(ABC):
    """A rank that depends on the kernel, as `cpnb.FitRank`."""

    @abstractmethod
    def count(self, kernel: Tensor, *, generator: torch.Generator | None = None) -> int:
        """Number of components for a kernel.

        Args:
            kernel: Any order ≥ 1.
            generator: What the decomposition that follows will draw from. It is read
                ahead, not used up.

        Returns:
            Number of components, at least 1.

        Raises:
            ValueError: If the kernel is not finite or the rule cannot be met.
        """


class ModelRule(ABC):
    """Ranks that share out a budget over a model, as `cpnb.ParameterRatio`."""

    @abstractmethod
    def counts(self, model: nn.Module, names: Iterable[str]) -> dict[str, int]:
        """Number of components for each of the layers named.

        Args:
            model: A module of stock layers; not changed.
            names: Its layers to put into CP form.

        Returns:
            A rank by name.

        Raises:
            ValueError: If the budget is too small even for rank 1 in each layer.
        """


Rank = int | float | str | KernelRule


def break_even_rank(shape: Sequence[int]) -> int:
    """Rank at which the CP form holds as many parameters as the dense kernel.

    ``⌈Π size_n / (Σ size_n + 1)⌉``, the +1 for λ. Modes of size 1 carry no factor and
    do not count.

    Args:
        shape: Kernel shape, all sizes ≥ 1.

    Returns:
        R_same, at least 1.

    Raises:
        ValueError: If a size is not a positive integer.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509 (ranks of its networks).

    >>> break_even_rank((64, 32, 3, 3))
    179
    """
    sizes = [operator.index(size) for size in shape]
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"shape is {tuple(sizes)}, expected at least one size, all of them >= 1."
        )
    return math.ceil(math.prod(sizes) / (sum(n for n in sizes if n > 1) + 1))


def cp_parameters(shape: Sequence[int], rank: int) -> int:
    """Parameters of a CP kernel: λ, one factor per mode of size > 1, and σ."""
    return rank * (sum(n for n in shape if n > 1) + 1) + 1


def resolve_rank(
    rank: Rank,
    shape: Sequence[int],
    weight: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> int:
    """Turn a rank as the user says it into a number of components.

    Args:
        rank: An int ≥ 1, a float in (0, 1] as fraction of the break-even rank
            (rounded, at least 1), ``"same"`` for the break-even rank, or a rule such as
            ``FitRank(0.1)``.
        shape: Kernel shape.
        weight: The kernel, for a rule to look at.
        generator: What the kernel's decomposition will draw from; see `KernelRule`.

    Returns:
        Number of components.

    Raises:
        TypeError: If ``rank`` is none of these types.
        ValueError: If it is out of range, or a rule without a kernel.

    >>> resolve_rank("same", (64, 32, 3, 3)), resolve_rank(0.5, (64, 32, 3, 3))
    (179, 90)
    """
    meaning = 'an int >= 1, a float in (0, 1] (fraction of break-even), or "same"'
    if isinstance(rank, KernelRule):
        if weight is None:
            raise ValueError(
                f"rank is {rank}, which needs a kernel to look at, expected {meaning}. "
                "Use the rule with cpnb.from_layer, or with cpnb.canonicalize."
            )
        return rank.count(weight, generator=generator)
    if isinstance(rank, ModelRule):
        raise TypeError(
            f"rank is {rank}, which spends a budget over whole layers, expected "
            f"{meaning}. Use the rule with cpnb.canonicalize or cpnb.from_layer."
        )
    if isinstance(rank, str):
        if rank == "same":
            return break_even_rank(shape)
        raise ValueError(f"rank is {rank!r}, expected {meaning}.")
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(
                f"rank is {rank}, expected {meaning}. For a number of components "
                "pass an int."
            )
        return max(1, round(rank * break_even_rank(shape)))
    try:
        count = operator.index(rank)
    except TypeError:
        count = None
    if count is None or isinstance(rank, bool):
        raise TypeError(f"rank is {rank!r}, expected {meaning}, or a rule.")
    if count < 1:
        raise ValueError(f"rank is {count}, expected {meaning}.")
    return count


def adopt_rank(
    layer: Any, state: Mapping[str, Tensor], prefix: str, errors: list[str]
) -> None:
    """Give a CP layer the rank a checkpoint holds for it, if all else fits.

    Args:
        layer: A CP layer; its values are left for the caller to fill.
        state: The checkpoint.
        prefix: Of the layer's entries in it.
        errors: Gets a line if the checkpoint is one of the dense layer.
    """
    lam = state.get(f"{prefix}lam")
    if lam is None and f"{prefix}weight" in state:
        errors.append(
            f"{prefix or 'this layer'} is a {type(layer).__name__}, but the checkpoint "
            "holds a dense weight for it. Load it into the dense model, then call "
            "cpnb.canonicalize."
        )
    elif lam is not None and lam.ndim == 1 and lam.numel() not in (0, layer.rank):
        wanted = [(len(factor), lam.numel()) for factor in layer.factors]
        found = [state.get(f"{prefix}factors.{n}") for n in range(len(wanted))]
        if [None if f is None else tuple(f.shape) for f in found] == wanted:
            layer._resize(lam.numel())
