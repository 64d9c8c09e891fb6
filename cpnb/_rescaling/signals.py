"""What flows through a network: the unit of each channel of each value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from cpnb._rescaling.units import Units


@dataclass(frozen=True)
class Signal:
    """A value inside a network: the unit of each of its channels.

    Attributes:
        units: One per channel; None if the value has no scale to carry: the input, a
            constant, a size.
        ndim: Axes, the batch first and the channels second; 0 if not known.
        flat: Whether each channel has become several neighbouring features.
    """

    units: tuple[int, ...] | None = None
    ndim: int = 0
    flat: bool = False


CONSTANT = Signal()
SHAPE = Signal(ndim=-1)  # the sizes of a value that carries a scale, and
BATCH = Signal(ndim=-2)  # the first of them


@dataclass(frozen=True)
class Call:
    """One operation of the graph, with the signals that reach it.

    Attributes:
        node: In the graph.
        kind: Function, name of the method, or class of the module.
        module: If it is one.
        signals: Of all nodes so far.
        units: To be tied where signals meet.
    """

    node: fx.Node
    kind: Any
    module: nn.Module | None
    signals: Mapping[fx.Node, Signal]
    units: Units

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    @property
    def scaled(self) -> list[Signal]:
        """The inputs that carry a scale."""
        found = (self.signals[source] for source in self.node.all_input_nodes)
        return [signal for signal in found if signal.units is not None]
