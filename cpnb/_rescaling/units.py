"""Units: the channels of a network, tied where they must carry one common scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

FIXED = 0  # the unit of everything that keeps its scale, such as input and output
SILENT = -1  # a channel of zeros, which any scale suits


class Units:
    """Disjoint sets of channels; each set has one scale, that of `FIXED` is 1."""

    def __init__(self) -> None:
        """Start with `FIXED` alone."""
        self._parent = [FIXED]

    def fresh(self, count: int) -> tuple[int, ...]:
        """New units that nothing is tied to yet."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return tuple(range(first, first + count))

    def tie(self, first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
        """Give channels of two signals that are added one scale each."""
        tied = []
        for a, b in zip(first, second, strict=True):
            if SILENT not in (a, b):
                low, high = sorted((self.root(a), self.root(b)))
                self._parent[high] = low
            tied.append(max(a, b))
        return tuple(tied)

    def fix(self, units: Iterable[int]) -> None:
        """Let these keep their scale."""
        for unit in units:
            self.tie((unit,), (FIXED,))

    def root(self, unit: int) -> int:
        """The representative of a unit's set; a silent channel keeps its zeros."""
        if unit == SILENT:
            return FIXED
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit
