"""The starts that the initialization experiments compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

from cpnb.initializers import INITIALIZERS, CPForm, unified


def unified_small(shape: Sequence[int], rank: int, **options: Any) -> CPForm:
    """Directions of `cpnb.unified`, variance of torch's dense default, Kaiming's / 6.

    The control for ``"power"`` and ``"als"``, which fit torch's default kernels: it has
    their variance and nothing else of them.

    Args: see `cpnb.unified`.
    """
    lam, factors = unified(shape, rank, **options)
    return lam / sqrt(6), factors


STARTS: dict[str, Callable[..., CPForm]] = {
    **INITIALIZERS,
    "unified_small": unified_small,
}
