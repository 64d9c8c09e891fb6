"""The controls of a rank explorer, kept in line with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets

from cpnb._explorer.budget import (
    BUDGET,
    budget_at,
    budget_problem,
    budget_range,
)
from cpnb._explorer.choices import Choice
from cpnb._explorer.controls import (
    Control,
    Switches,
    budget_control,
    percent_control,
    rank_control,
)
from cpnb._explorer.history import History, Position
from cpnb._explorer.live import LiveTable
from cpnb._sweep.points import GLOBAL


class Board:
    """Sliders, number boxes and choices over a live table, and the way back.

    Callbacks come from the main thread, a kernel subshell and the worker. Each change
    is applied as a whole, and told, under the guard of the table.

    Args:
        live: The table, which is told about another key or refit.
        switches: Choices and buttons.

    Attributes:
        controls: Slider and box by axis: a layer, ``"*"`` or :data:`BUDGET`.
        axis: The axis moved last.
        layer: The layer moved last, the first before any.
        problem: What went wrong with the last change, None if nothing.
        budget_problem: Why there is no budget to slide, None if there is.
        moved: Called, under the guard, when all controls agree after a change.
    """

    def __init__(self, live: LiveTable, switches: Switches) -> None:
        """Make the controls, all at full rank."""
        self._live, self._switches = live, switches
        table = live.sweep
        self.controls = {layer.name: rank_control(layer) for layer in table.layers}
        self.controls[GLOBAL] = percent_control()
        self.controls[BUDGET] = budget_control(*budget_range(table))
        self.axis, self.layer = GLOBAL, table.layers[0].name
        self.problem: Exception | None = None
        self.moved: Callable[[], None] = lambda: None
        self._applying = False
        self._history = History(self._position())
        for axis, control in self.controls.items():
            self._listen(axis, control)
        for choice in (switches.key, switches.refit):
            choice.observe(lambda _: self._chosen(), "value")
        switches.undo.on_click(lambda _: self._go(self._history.back))
        switches.reset.on_click(lambda _: self._go(self._restart))
        switches.undo.disabled = True
        self.check_budget()

    @property
    def ranks(self) -> dict[str, int]:
        """Components of every CP layer at the present position."""
        return {name: self.value(name) for name in self._live.sweep.ranks}

    def value(self, axis: str) -> int:
        """Where the slider of an axis stands."""
        return self.controls[axis].slider.value

    def rows(self) -> list[ipywidgets.HBox]:
        """Slider and box of each axis in a row."""
        return [ipywidgets.HBox([c.slider, c.box]) for c in self.controls.values()]

    def neighbours(self) -> Iterable[dict[str, int]]:
        """Ranks along the axis moved last, the nearest first."""
        table, slider = self._live.sweep, self.controls[self.axis].slider
        steps = range(slider.min, slider.max + 1)
        nearest = sorted(steps, key=lambda step: abs(step - slider.value))
        if self.axis == GLOBAL:
            return (table.ranks_at(step / 100) for step in nearest)
        if self.axis == BUDGET:
            return () if self.budget_problem else map(self._live.allocated, nearest)
        return ({**self.ranks, self.axis: step} for step in nearest)

    def check_budget(self) -> None:
        """Let the budget slide where the table knows enough; hold the guard."""
        control = self.controls[BUDGET]
        self.budget_problem = budget_problem(self._live.sweep)
        able = self.budget_problem is None and control.slider.min < control.slider.max
        for widget in (control.slider, control.box):
            widget.disabled = not able
            widget.tooltip = self.budget_problem or (
                f"Parameters to allocate, {widget.min} to {widget.max} percent of the "
                "dense network's"
            )

    def _listen(self, axis: str, control: Control) -> None:
        def follow(changed: Any, other: Any) -> None:
            changed.observe(lambda _: self._slid(axis, changed, other), "value")

        follow(control.slider, control.box)
        follow(control.box, control.slider)

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Set several controls without hearing their events, then tell once."""
        self._applying, self.problem = True, None
        try:
            yield
        except Exception as error:  # nobody sees what a callback raises
            self.problem = error
        finally:
            self._applying = False
        self.moved()

    def _slid(self, axis: str, changed: Any, other: Any) -> None:
        with self._live.guard:
            if self._applying:
                return
            with self._change():
                # Its value now, which another thread may have set since the event.
                other.value = changed.value
                self._set_axis(axis)
                for name, value in self._consequences(axis).items():
                    self._set(name, value)
            self._remember()

    def _chosen(self) -> None:
        with self._live.guard:
            if self._applying:
                return
            with self._change():
                key, refit = self._switches.key.value, self._switches.refit.value
                self._live.choose(Choice(key, refit))
                self.check_budget()
                self._spend_again()
            self._remember()

    def _spend_again(self) -> None:
        """After another choice, the budget that was slid last buys other ranks."""
        if self.axis != BUDGET:
            return
        if self.budget_problem is not None:  # what is shown is no allocation any more
            self.axis = self.layer
            return
        for name, value in self._consequences(BUDGET).items():
            self._set(name, value)

    def _go(self, find: Callable[[], Position]) -> None:
        """Return to a position remembered."""
        with self._live.guard, self._change():
            position = find()
            self._switches.undo.disabled = not self._history
            self._set_axis(position.axis)
            for axis, value in position.values.items():
                self._set(axis, value)
            self._switches.key.value, self._switches.refit.value = position.choice
            self._live.choose(position.choice)
            self.check_budget()

    def _restart(self) -> Position:
        self._history.visit(self._history.start)
        return self._history.start

    def _set_axis(self, axis: str) -> None:
        self.axis = axis
        if axis in self._live.sweep.ranks:
            self.layer = axis

    def _set(self, axis: str, value: int) -> None:
        control = self.controls[axis]
        control.slider.value = control.box.value = value

    def _consequences(self, axis: str) -> dict[str, int]:
        """What the other sliders show after one has moved."""
        table, others = self._live.sweep, {}
        if axis == GLOBAL:
            others = table.ranks_at(self.value(GLOBAL) / 100)
        elif axis == BUDGET:
            others = self._live.allocated(self.value(BUDGET))
        ranks = {**self.ranks, **others}
        kept = sum(ranks.values()) / sum(table.ranks.values())
        follow = {GLOBAL: max(1, round(100 * kept)), BUDGET: budget_at(table, ranks)}
        follow.pop(axis, None)
        return {**others, **follow}

    def _position(self) -> Position:
        values = {axis: self.value(axis) for axis in self.controls}
        return Position(self.axis, values, self._live.choice)

    def _remember(self) -> None:
        self._history.visit(self._position())
        self._switches.undo.disabled = not self._history
