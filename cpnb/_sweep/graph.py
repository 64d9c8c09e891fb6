"""A network as a graph of values: what each depends on, and how to compute it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from cpnb.base import CPLayer
from cpnb.surgery import cp_layers

Node = fx.Node
Values = dict[Node, Any]


class CannotShare(Exception):
    """Why truncations of a network cannot be evaluated together."""


class NetworkGraph:
    """The values between the input and the scores of a network in evaluation mode.

    Args:
        model: The network, which must stay in evaluation mode.

    Attributes:
        input: The images.
        output: The scores.
        nodes: All values in the order of computation, without the images.
        named: By value, the name of the CP layer that computes it, if one does.
        above: By value, the names of the CP layers that it depends on.
        varying: The values that depend on the images.

    Raises:
        CannotShare: If torch.fx cannot trace the network.
    """

    def __init__(self, model: nn.Module) -> None:
        """Trace the network."""
        # Wrapped, so that a CP layer alone and hooks of the network are seen as well.
        self._root = nn.Sequential(model).eval()
        try:
            traced = list(_Tracer().trace(self._root).nodes)
        except Exception as error:  # whatever the code of a model may raise
            first = str(error).strip().split("\n")[0]
            raise CannotShare(
                f"torch.fx cannot trace it ({type(error).__name__}: {first})"
            ) from error
        self.input, *self.nodes, end = traced
        (self.output,) = end.args
        if not isinstance(self.output, Node):
            raise CannotShare("it does not return a tensor")
        self._modules = {
            node: self._root.get_submodule(node.target)
            for node in self.nodes
            if node.op == "call_module"
        }
        self._constants = {
            node: functools.reduce(getattr, node.target.split("."), self._root)
            for node in self.nodes
            if node.op == "get_attr"
        }
        names = {layer: name for name, layer in cp_layers(model).items()}
        self.named: dict[Node, str] = {}
        self.above: dict[Node, frozenset[str]] = {self.input: frozenset()}
        self.varying = {self.input}
        for node in self.nodes:
            above = [self.above[source] for source in node.all_input_nodes]
            if (module := self._modules.get(node)) in names:
                self.named[node] = names[module]
                above.append({names[module]})
            self.above[node] = frozenset().union(*above)
            if not self.varying.isdisjoint(node.all_input_nodes):
                self.varying.add(node)

    def module(self, node: Node) -> nn.Module | None:
        """The module that computes a value, if one does."""
        return self._modules.get(node)

    def run(
        self,
        nodes: Iterable[Node],
        values: Values,
        *,
        replaced: Mapping[Node, Callable[..., Any]] | None = None,
        keep: Collection[Node] = (),
        seen: Callable[[Node, Any], object] | None = None,
    ) -> None:
        """Compute some values, and forget those that no later one of them needs.

        Args:
            nodes: What to compute, in order.
            values: What is known of their sources; gets what is computed.
            replaced: What to call in the place of a value's own function or module.
            keep: Values not to forget.
            seen: Told each value once it is computed.
        """
        nodes = list(nodes)
        last = {source: node for node in nodes for source in node.all_input_nodes}
        for node in nodes:
            values[node] = self._compute(node, values, replaced or {})
            if seen is not None:
                seen(node, values[node])
            for source in node.all_input_nodes:
                if last[source] is node and source not in keep:
                    values.pop(source, None)

    def _compute(
        self, node: Node, values: Values, replaced: Mapping[Node, Callable[..., Any]]
    ) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node in replaced:
            return replaced[node](*args, **kwargs)
        match node.op:
            case "call_module":
                return self._modules[node](*args, **kwargs)
            case "call_function":
                return node.target(*args, **kwargs)
            case "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            case "get_attr":
                return self._constants[node]
        raise CannotShare(f"it has a value of the kind {node.op!r}")


class Profile:
    """Shapes of the values of a network, found by running it on two and three images.

    Args:
        graph: The network.
        images: At least one image, on its device.

    Attributes:
        shapes: Shape of each tensor with one row per image, for one image.
        bytes: Size of each, for one image.
    """

    def __init__(self, graph: NetworkGraph, images: Tensor) -> None:
        """Run the network."""
        two, three = (_rows(graph, images, count) for count in (2, 3))
        self.shapes: dict[Node, tuple[int, ...]] = {}
        self.bytes: dict[Node, int] = {}
        for node, (rows, shape, size) in two.items():
            if node in three and (rows, three[node][0]) == (2, 3):
                self.shapes[node] = shape
                self.bytes[node] = math.prod(shape) * size


def _rows(
    graph: NetworkGraph, images: Tensor, count: int
) -> dict[Node, tuple[int, tuple[int, ...], int]]:
    """Rows of each tensor, shape of one and bytes of an element, for some images."""
    found = {}

    def see(node: Node, value: Any) -> None:
        if isinstance(value, Tensor) and value.ndim:
            found[node] = len(value), tuple(value.shape[1:]), value.element_size()

    repeated = images[torch.arange(count, device=images.device) % len(images)]
    see(graph.input, repeated)
    graph.run(graph.nodes, {graph.input: repeated}, seen=see)
    return found


class _Tracer(fx.Tracer):
    """Keeps CP layers whole, and opens torch's own modules that hold some."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, CPLayer):
            return True
        inside = any(isinstance(part, CPLayer) for part in module.modules())
        return super().is_leaf_module(module, name) and not inside
