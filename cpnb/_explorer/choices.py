"""What orders the components and how λ is re-solved, as a reader chooses it."""

from __future__ import annotations

from typing import NamedTuple

from cpnb.importance import KEYS

REFITS = {"no": False, "weights": True, "outputs": "data"}
"""What λ is solved anew on, by the words for it."""

__all__ = ["KEYS", "REFITS", "Choice"]


class Choice(NamedTuple):
    """How a network is cut, apart from its ranks."""

    key: str
    refit: bool | str


def refit_words(refit: bool | str) -> str:
    """The words for a refit."""
    return next(words for words, value in REFITS.items() if value == refit)
