"""Which operations a positive scale passes through, and what they do to channels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from cpnb._rescaling.signals import BATCH, CONSTANT, SHAPE, Call, Signal
from cpnb._rescaling.units import SILENT

Rule = Callable[[Call], Signal | None]


def pass_through(call: Call) -> Signal | None:
    """The signal that leaves an operation; None if a positive scale cannot pass it."""
    if call.kind is operator.getitem and call.signals[call.node.args[0]] is SHAPE:
        return BATCH if call.node.args[1] == 0 else CONSTANT
    if not call.scaled:  # what only the input and constants reach keeps its scale
        return CONSTANT
    rule = _RULES.get(call.kind)
    if rule is None or getattr(call.module, "return_indices", False):
        return None
    return None if call.node.kwargs.get("return_indices") else rule(call)


def _channelwise(call: Call) -> Signal | None:
    return call.scaled[0] if len(call.scaled) == 1 else None


def _spatial(ndim: int) -> Rule:
    """Works along the axes behind the channels, of which there are ``ndim - 2``."""

    def rule(call: Call) -> Signal | None:
        signal = _channelwise(call)
        return signal if signal and signal.ndim == ndim and not signal.flat else None

    return rule


def _resize(call: Call) -> Signal | None:
    signal = _channelwise(call)
    return signal if signal and signal.ndim > 2 else None


def _flatten(call: Call) -> Signal | None:
    start, end = call.argument(1, "start_dim", 0), call.argument(2, "end_dim", -1)
    if call.module is not None:
        start, end = call.module.start_dim, call.module.end_dim
    signal = call.scaled[0]
    return _flat(signal) if start == 1 and end in (-1, signal.ndim - 1) else None


def _view(call: Call) -> Signal | None:
    """Only ``view(batch, -1)`` is known to be a flatten, whatever the image size."""
    sizes = call.node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    batch = isinstance(sizes[0], fx.Node) and call.signals[sizes[0]] is BATCH
    return _flat(call.scaled[0]) if batch and sizes[1:] == (-1,) else None


def _flat(signal: Signal) -> Signal:
    return replace(signal, ndim=2, flat=signal.flat or signal.ndim != 2)


def _add(call: Call) -> Signal | None:
    """Signals that meet share one scale; one that meets a constant keeps its own."""
    operands = call.argument(0, "input"), call.argument(1, "other")
    if any(not isinstance(operand, fx.Node) and operand != 0 for operand in operands):
        return None
    if len(call.node.all_input_nodes) == 1:  # plus 0, or plus itself
        return call.scaled[0]
    first, second = (call.signals[operand] for operand in operands)
    if first.units is None or second.units is None:
        signal = call.scaled[0]
        call.units.fix(signal.units)
        # A single channel may have been added to each of several.
        return signal if len(signal.units) > 1 else CONSTANT
    if replace(first, units=()) != replace(second, units=()) or (
        len(first.units) != len(second.units)
    ):
        return None
    return replace(first, units=call.units.tie(first.units, second.units))


def _times_number(call: Call) -> Signal | None:
    numbers = [argument for argument in call.node.args if isinstance(argument, Real)]
    divisor = call.kind is operator.truediv and numbers == [call.node.args[0]]
    return None if not numbers or divisor else call.scaled[0]


def _concatenate(call: Call) -> Signal | None:
    sources = call.argument(0, "tensors")
    if isinstance(sources, fx.Node):
        return None
    parts = [call.signals[source] for source in sources]
    first = parts[0]
    if call.argument(1, "dim", 0) not in (1, 1 - first.ndim) or any(
        part.units is None or part.flat or part.ndim != first.ndim for part in parts
    ):
        return None
    return replace(first, units=sum((part.units for part in parts), ()))


def _reduce(call: Call) -> Signal | None:
    """Mean, sum or maximum over some axes behind the channels."""
    signal, axes = call.scaled[0], call.argument(1, "dim")
    axes = axes if isinstance(axes, tuple | list) else [axes]
    if any(not isinstance(axis, int) for axis in axes):
        return None
    if signal.ndim < 3 or any(axis % signal.ndim < 2 for axis in axes):
        return None
    kept = call.argument(2, "keepdim", False)
    return signal if kept else replace(signal, ndim=signal.ndim - len(axes))


def _slice(call: Call) -> Signal | None:
    """Some of the channels, or of what lies behind them, of all images."""
    signal, index = call.scaled[0], call.node.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if index[0] != slice(None) or not all(isinstance(axis, slice) for axis in index):
        return None
    channels = index[1] if len(index) > 1 else slice(None)
    if channels == slice(None):
        return signal
    bounds = (channels.start, channels.stop, channels.step)
    if signal.flat or any(isinstance(bound, fx.Node) for bound in bounds):
        return None
    return replace(signal, units=signal.units[channels])


def _pad(call: Call) -> Signal | None:
    """Padding with zeros, also by whole channels; any kind of it behind them."""
    signal, margins = call.scaled[0], call.argument(1, "pad")
    mode, value = call.argument(2, "mode", "constant"), call.argument(3, "value")
    if mode == "constant" and value not in (None, 0):
        return None
    if not all(isinstance(margin, int) for margin in margins):
        return None
    spatial = 2 * (signal.ndim - 2)  # the margins begin with the last axis
    before, after = (*margins[spatial : spatial + 2], 0, 0)[:2]
    batch = margins[spatial + 2 :]
    if not any((before, after, *batch)):
        return signal
    if mode != "constant" or signal.flat or min(before, after) < 0 or any(batch):
        return None
    units = (SILENT,) * before + signal.units + (SILENT,) * after
    return replace(signal, units=units)


def _size(call: Call) -> Signal:
    axis = call.argument(1, "dim")
    return SHAPE if axis is None else BATCH if axis == 0 else CONSTANT


def _attribute(call: Call) -> Signal | None:
    known = {"shape": SHAPE, "device": CONSTANT, "dtype": CONSTANT, "ndim": CONSTANT}
    return known.get(call.node.args[1])


_POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "dropout")
_SPATIAL_LAYERS = (
    *("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "Dropout"),
    *("ZeroPad", "ReflectionPad", "ReplicationPad"),
)
_KINDS: dict[Rule, tuple[Any, ...]] = {
    _channelwise: (
        *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout),
        *(F.relu, F.relu_, F.leaky_relu, F.leaky_relu_, F.dropout),
        *(torch.relu, torch.relu_, torch.clone, operator.neg),
        *("relu", "relu_", "contiguous", "clone"),
    ),
    **{
        _spatial(n + 2): (
            *(getattr(nn, f"{name}{n}d") for name in _SPATIAL_LAYERS),
            *(getattr(F, f"{name}{n}d") for name in _POOLS),
        )
        for n in (1, 2, 3)
    },
    _resize: (nn.Upsample, F.interpolate),
    _flatten: (nn.Flatten, torch.flatten, "flatten"),
    _view: (torch.reshape, "view", "reshape"),
    _add: (operator.add, operator.iadd, operator.sub, torch.add, "add", "add_"),
    _times_number: (operator.mul, operator.truediv),
    _concatenate: (torch.cat, torch.concat),
    _reduce: (torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"),
    _slice: (operator.getitem,),
    _pad: (F.pad,),
    _size: ("size",),
    _attribute: (getattr,),
}
_RULES = {kind: rule for rule, kinds in _KINDS.items() for kind in kinds}
