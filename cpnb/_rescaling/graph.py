"""Reads from a model which of its layers write and read which units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, NoReturn

import torch
from torch import fx, nn

from cpnb._rescaling.layers import (
    BATCH_NORMS,
    NORMS,
    WEIGHTED,
    Layer,
    layer_sizes,
    unfit,
)
from cpnb._rescaling.rules import pass_through
from cpnb._rescaling.signals import CONSTANT, Call, Signal
from cpnb._rescaling.units import FIXED, Units
from cpnb.base import CPLayer
from cpnb.evaluation import preserved_flags

_PASSING = (
    "ReLU, LeakyReLU, PReLU, pooling, dropout, zero padding, flatten(1), sums, "
    "concatenation of channels and means over pixels"
)


class Record(NamedTuple):
    """A layer by name, and the units of `Layer` as plain numbers."""

    name: str
    rows: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]
    cancelled: tuple[int, ...] | None = None


def read_layers(model: nn.Module, before_norm: bool) -> list[Layer]:
    """The layers of a model in the order of its forward, with their units.

    Unit 0 is fixed; the others are numbered in the order in which they are written.

    Args:
        model: Takes batches ``(n, features)`` or ``(n, channels, ...)``.
        before_norm: Whether the scale of what enters a batch norm is free.

    Raises:
        ValueError: If a scale cannot be followed through the model.
    """
    with preserved_flags(model):
        training, evaluation = (
            _Reading(model.train(flag), before_norm).numbered()
            for flag in (True, False)
        )
    if training != evaluation:
        raise ValueError(
            "model connects its layers in one way in training and in another in "
            "evaluation, expected one way for both. Rescale the part they share."
        )
    _check_tied(model, [record.name for record in training])
    return [_layer(model, record) for record in training]


def _layer(model: nn.Module, record: Record) -> Layer:
    module = model.get_submodule(record.name)
    device = next(module.parameters()).device
    rows, columns, cancelled = (
        None if units is None else torch.tensor(units, device=device)
        for units in record[1:]
    )
    return Layer(record.name, module, rows, columns, cancelled)


class _Tracer(fx.Tracer):
    """Stops at modules with parameters of their own, CP layers among them."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = next(module.parameters(recurse=False), None)
        return own is not None or super().is_leaf_module(module, name)


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"model is a {type(model).__name__} that torch.fx cannot trace ({error}), "
            "expected a forward without control flow that depends on the data. Pass "
            "the plain model, not a compiled or parallel one around it."
        ) from error


class _Reading:
    """One walk through the graph of a model, from input to output."""

    def __init__(self, model: nn.Module, before_norm: bool) -> None:
        self.model, self.before_norm = model, before_norm
        self.units, self.records = Units(), dict[str, Record]()
        self.signals: dict[fx.Node, Signal] = {}
        graph = _trace(model)
        self.leading = set[fx.Node]()  # to a layer
        for node in reversed(graph.nodes):
            if any(user in self.leading or self._is_layer(user) for user in node.users):
                self.leading.add(node)
        for node in graph.nodes:
            self.signals[node] = self._read(node)
        self._check_direct_use(graph)

    def _module(self, node: fx.Node) -> nn.Module | None:
        called = node.op == "call_module"
        return self.model.get_submodule(node.target) if called else None

    def _is_layer(self, node: fx.Node) -> bool:
        module = self._module(node)
        if module is None or type(module) is nn.PReLU:
            return False
        return type(module) in NORMS or any(True for _ in module.parameters())

    def _read(self, node: fx.Node) -> Signal:
        if node.op in ("placeholder", "get_attr"):
            return CONSTANT
        layer, module = self._is_layer(node), self._module(node)
        if not layer and node not in self.leading:  # what follows may do what it likes
            for source in node.all_input_nodes:
                self.units.fix(self.signals[source].units or ())
            return CONSTANT
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            self._refuse(
                node, "has forward hooks, which may change what it does; remove them."
            )
        if layer:
            return self._read_layer(node, module)
        kind = node.target if module is None else type(module)
        call = Call(node, kind, module, self.signals, self.units)
        signal = pass_through(call)
        if signal is None:
            hint = " Write flatten(1)." if kind in ("view", "reshape") else ""
            self._refuse(
                node,
                "stands between two layers, and is not known to let a positive scale "
                f"pass; expected {_PASSING}.{hint}",
            )
        return signal

    def _read_layer(self, node: fx.Node, module: nn.Module) -> Signal:
        name, kind = node.target, type(module)
        if reason := unfit(module):
            self._refuse(node, reason)
        if name in self.records:
            self._refuse(
                node,
                "is called twice, and its weights cannot follow two scales; expected "
                "one call. Give each call a layer of its own.",
            )
        if node.args != tuple(node.all_input_nodes) or len(node.args) != 1:
            self._refuse(node, "is called with more than one positional input.")
        signal = self.signals[node.args[0]]
        axes = WEIGHTED[kind] if kind in WEIGHTED else NORMS[kind]
        if signal.ndim and signal.ndim not in axes:
            self._refuse(
                node,
                f"reads {signal.ndim} axes, expected {' or '.join(map(str, axes))}.",
            )
        count, out, groups = layer_sizes(module)
        inputs = self._inputs(node, signal, count)
        if kind in WEIGHTED:
            columns = _split(inputs, groups)
            if isinstance(module, CPLayer) and count > groups:
                for group in columns[1:]:  # which share the factor of the inputs
                    self.units.tie(columns[0], group)
            written = self.units.fresh(out)
            self.records[name] = Record(name, _split(written, groups), columns)
            return Signal(written, axes[0])
        ndim = signal.ndim or (axes[0] if len(axes) == 1 else 0)
        if module.weight is None:
            self.units.fix(inputs)
            return Signal((FIXED,) * count, ndim)
        free = self.before_norm and kind in BATCH_NORMS
        if not free:
            self.units.fix(inputs)
        written = self.units.fresh(count)
        self.records[name] = Record(
            *(name, _split(written, count), ((FIXED,),) * count),
            inputs if free else None,
        )
        return Signal(written, ndim)

    def _inputs(self, node: fx.Node, signal: Signal, count: int) -> tuple[int, ...]:
        """The unit of each channel that a layer reads."""
        if signal.units is None:
            return (FIXED,) * count
        pixels, rest = divmod(count, len(signal.units))
        if rest or (pixels != 1 and not signal.flat):
            self._refuse(
                node,
                f"reads {count} channels where {len(signal.units)} arrive, expected "
                "batches (n, features) or (n, channels, ...) as the input.",
            )
        return tuple(unit for unit in signal.units for _ in range(pixels))

    def _check_direct_use(self, graph: fx.Graph) -> None:
        """Refuse a layer whose weight an operation reads past the layer."""
        for node in graph.nodes:
            for name in self.records if node.op == "get_attr" else ():
                if node.target.startswith(f"{name}."):
                    self._refuse(node, f"reads what layer {name!r} is to scale.")

    def numbered(self) -> list[Record]:
        """The records, with units numbered by the first layer that writes them."""
        numbers = {FIXED: FIXED}

        def number(units: Iterable[int]) -> tuple[int, ...]:
            roots = map(self.units.root, units)
            return tuple(numbers.setdefault(root, len(numbers)) for root in roots)

        return [
            Record(
                record.name,
                tuple(map(number, record.rows)),
                tuple(map(number, record.columns)),
                record.cancelled and number(record.cancelled),
            )
            for record in self.records.values()
        ]

    def _refuse(self, node: fx.Node, reason: str) -> NoReturn:
        module = self._module(node)
        name = node.name if node.op.startswith("call_f") else node.target
        what = f"operation {name!r}"
        if module is not None:
            what = f"layer {name!r} ({type(module).__name__})"
        elif stack := node.meta.get("nn_module_stack"):
            what += f" in {list(stack.values())[-1][0]!r}"
        raise ValueError(f"{what} {reason}")


def _split(units: tuple[int, ...], groups: int) -> tuple[tuple[int, ...], ...]:
    size = len(units) // groups
    return tuple(units[n * size : (n + 1) * size] for n in range(groups))


def _check_tied(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a layer that shares a parameter with another one."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            shared = owners[id(parameter)]
            if len(shared) > 1:
                raise ValueError(
                    f"layer {name!r} shares a parameter: {' and '.join(shared)} are "
                    "the same tensor, which cannot follow two scales. Untie them first."
                )
