"""Ranks: the break-even rank and the ways to say a rank."""

import math
import operator
from collections.abc import Sequence


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


def resolve_rank(rank: int | float | str, shape: Sequence[int]) -> int:
    """Turn a rank as the user says it into a number of components.

    Args:
        rank: An int ≥ 1, a float in (0, 1] as fraction of the break-even rank
            (rounded, at least 1), or ``"same"`` for the break-even rank.
        shape: Kernel shape.

    Returns:
        Number of components.

    Raises:
        TypeError: If ``rank`` is none of these types.
        ValueError: If it is out of range.

    >>> resolve_rank("same", (64, 32, 3, 3)), resolve_rank(0.5, (64, 32, 3, 3))
    (179, 90)
    """
    meaning = 'an int >= 1, a float in (0, 1] (fraction of break-even), or "same"'
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
        raise TypeError(f"rank is {rank!r}, expected {meaning}.")
    if count < 1:
        raise ValueError(f"rank is {count}, expected {meaning}.")
    return count
