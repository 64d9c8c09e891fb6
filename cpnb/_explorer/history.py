"""Positions of an explorer's controls, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

from cpnb._explorer.choices import Choice

LONGEST = 1000
"""Positions that are remembered; older ones are forgotten."""


@dataclass(frozen=True)
class Position:
    """Where all controls stand.

    Attributes:
        axis: The slider moved last.
        values: Value of every slider, by axis.
        choice: The key and the refit.
    """

    axis: str
    values: dict[str, int]
    choice: Choice


class History:
    """The present position and those before it.

    Args:
        start: The first position, which :attr:`start` keeps.
    """

    def __init__(self, start: Position) -> None:
        """Begin with one position."""
        self.start = start
        self._past = [start]

    def __bool__(self) -> bool:
        """Whether there is a way back."""
        return len(self._past) > 1

    def visit(self, position: Position) -> None:
        """Remember a new position; the present one again changes nothing."""
        if position != self._past[-1]:
            self._past = [*self._past[1 - LONGEST :], position]

    def back(self) -> Position:
        """Forget the present position and return to the one before it, if any."""
        if self:
            self._past.pop()
        return self._past[-1]
