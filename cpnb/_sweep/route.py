"""Which way a sweep takes through a network: what is shared and where ranks fan out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from cpnb._sweep.graph import CannotShare, NetworkGraph, Node, Profile
from cpnb.base import CPLayer
from cpnb.conv import CPConv1d, CPConv2d, CPConv3d
from cpnb.linear import CPLinear

Ranks = Mapping[str, int]

CONVOLUTIONS = (CPConv1d, CPConv2d, CPConv3d)
_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", nn.ReLU)
_POOL_FUNCTIONS = (
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
)
_OPTIONS = (
    *("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "return_indices",
)
_POOL_MODULES = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


@dataclass(frozen=True)
class Route:
    """A way through a network.

    Attributes:
        graph: The network.
        fan: The value that is computed at many ranks at once; None to evaluate one
            truncation after the other.
        layer: Name of the CP layer that computes it.
        free: Names of the layers whose ranks may differ within a segment.
        window: Max pooling that is computed together with the layer, if any.
        pooled: The value of that pooling.
        reason: Why there is no fan.
    """

    graph: NetworkGraph
    fan: Node | None = None
    layer: str = ""
    free: frozenset[str] = frozenset()
    window: tuple[int, ...] = ()
    pooled: Node | None = None
    reason: str = ""
    shared: list[Node] = field(init=False)
    batched: list[Node] = field(init=False)
    edges: list[Node] = field(init=False)

    def __post_init__(self) -> None:
        """Part the values into those before the fan and those after it."""
        after = {self.fan} if self.fan else set()
        for node in self.graph.nodes:
            if not after.isdisjoint(node.all_input_nodes):
                after.add(node)
        batched = [node for node in self.graph.nodes if node in after - {self.fan}]
        shared = [node for node in self.graph.nodes if node not in after]
        sources = {source for node in batched for source in node.all_input_nodes}
        for name, value in (
            ("batched", batched),
            ("shared", shared),
            ("edges", [n for n in (self.graph.input, *shared) if n in sources]),
        ):
            object.__setattr__(self, name, value)

    def segments(self, points: Sequence[Ranks]) -> list[list[Ranks]]:
        """Part truncations into runs that differ only where they may."""
        if self.fan is None:
            return [[point] for point in points]

        def fixed(point: Ranks) -> list[int]:
            return [rank for name, rank in point.items() if name not in self.free]

        return [list(run) for _, run in groupby(points, fixed)]


def fan_route(
    graph: NetworkGraph, profile: Profile, layers: Mapping[str, CPLayer], name: str
) -> Route:
    """The route on which one layer fans out, and all others keep their ranks.

    Args:
        graph: The network.
        profile: Shapes of its values.
        layers: Its CP layers.
        name: One of them.

    Returns:
        The route.

    Raises:
        CannotShare: If the layer or what follows it is not of a kind that is known.
    """
    return _checked(graph, profile, layers, name, frozenset([name]))


def global_route(
    graph: NetworkGraph, profile: Profile, layers: Mapping[str, CPLayer]
) -> Route:
    """The route on which one layer fans out and all linear layers after it follow.

    Raises:
        CannotShare: If there is no such layer.
    """
    for name in graph.named.values():
        after = {
            other
            for node, other in graph.named.items()
            if name in graph.above[node] and other != name
        }
        if all(_is_plain(layers[other], (CPLinear,)) for other in after):
            return _checked(graph, profile, layers, name, frozenset({name, *after}))
    raise CannotShare("no layer has only linear layers after it")


def _checked(
    graph: NetworkGraph,
    profile: Profile,
    layers: Mapping[str, CPLayer],
    name: str,
    free: frozenset[str],
) -> Route:
    layer = layers[name]
    calls = [node for node, other in graph.named.items() if other == name]
    if len(calls) != 1:
        raise CannotShare(f"layer {name!r} is used {len(calls)} times")
    if not _is_plain(layer, (*CONVOLUTIONS, CPLinear)):
        raise CannotShare(f"layer {name!r} has hooks or a forward of its own")
    if layer.lam.dtype not in (torch.float32, torch.float64):
        raise CannotShare(f"sums of components in {layer.lam.dtype} are not exact")
    (fan,) = calls
    source, *others = (*fan.args, *fan.kwargs.values())
    shape = profile.shapes.get(source, ())
    wanted = len(layer.kernel_shape) - 1
    matches = len(shape) == wanted or (isinstance(layer, CPLinear) and shape)
    if others or not matches:
        raise CannotShare(f"layer {name!r} does not take one batch of inputs")
    window, pooled = _pooling(graph, fan, wanted - 1) if wanted > 1 else ((), None)
    route = Route(graph, fan, name, free, window, pooled)
    if graph.output not in route.batched and graph.output is not fan:
        raise CannotShare(f"the scores do not depend on layer {name!r}")
    for edge in route.edges:
        if edge in graph.varying and edge not in profile.shapes:
            raise CannotShare(
                f"what follows layer {name!r} depends on the number of images"
            )
    return route


def _is_plain(layer: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    return type(layer) in kinds and not _has_hooks(layer)


def _has_hooks(module: nn.Module | None) -> bool:
    return bool(module and (module._forward_hooks or module._forward_pre_hooks))


def _pooling(
    graph: NetworkGraph, node: Node, axes: int
) -> tuple[tuple[int, ...], Node | None]:
    """Window of the max pooling that alone uses a value, but for ReLUs between."""
    while len(node.users) == 1:
        (node,) = node.users
        module = graph.module(node)
        kind = type(module) if module else node.target
        if _has_hooks(module):
            break
        if kind in _POOL_MODULES:
            options = {name: getattr(module, name) for name in _OPTIONS}
            window = _window(axes, **options)
        elif kind in _POOL_FUNCTIONS:
            options = dict(zip(("input", *_OPTIONS), node.args, strict=False))
            options |= node.kwargs
            del options["input"]
            window = _window(axes, **options)
        elif kind in _RELU:
            continue
        else:
            break
        return window, node if window else None
    return (), None


def _window(
    axes: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[int, ...]:
    """Window of a pooling whose windows lie side by side; empty for any other."""

    def each(value: int | Sequence[int]) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, Sequence) else (value,) * axes

    window = each(kernel_size)
    plain = (
        each(kernel_size if stride is None else stride) == window
        and each(padding) == (0,) * axes
        and each(dilation) == (1,) * axes
        and not ceil_mode
        and not return_indices
        and all(isinstance(size, int) for size in window)
    )
    return window if plain and len(window) == axes else ()
