"""What orders the components and how λ is re-solved, as a reader chooses it."""

from __future__ import annotations

from typing import NamedTuple

from cpnb.importance import DATA_KEYS, KEYS

REFITS = {"no": False, "kernel": True, "outputs": "data"}
"""What λ is solved anew on, by the word for it."""

__all__ = ["KEYS", "REFITS", "Choice", "refit_words"]


class Choice(NamedTuple):
    """How a network is cut, apart from its ranks."""

    key: str
    refit: bool | str

    @property
    def looks_at_data(self) -> bool:
        """Whether the cut depends on images."""
        return self.key in DATA_KEYS or self.refit == "data"


def refit_words(refit: bool | str) -> str:
    """The word for a refit."""
    return next(word for word, value in REFITS.items() if value == refit)
