"""Evaluate many truncations of a network together, sharing what they share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from cpnb._sweep.fan import ConvFan, LinearFan
from cpnb._sweep.graph import Node, Values
from cpnb._sweep.route import Ranks, Route
from cpnb.base import CPLayer
from cpnb.evaluation import innermost
from cpnb.linear import CPLinear
from cpnb.ranked import RankedLayer


@dataclass(frozen=True)
class Sizes:
    """How much is computed at once.

    Attributes:
        chunk: Images that go through the shared part together.
        images: Of these, images that go through the layers after it together.
        group: Truncations that do so.
        kept: Images for which what is shared can be kept, to be used again.
    """

    chunk: int
    images: int
    group: int
    kept: int = 0


class SharedEvaluation:
    """Scores of truncations of a network, along one route through its graph.

    Args:
        route: What is shared, and where the ranks fan out.
        ranked: The CP layers by name.
        packed: Whether to compute images with the channels innermost, which is
            faster, but unknown to networks that call ``view``.

    Attributes:
        route: The route.
        fan: What computes the layer that fans out; None without one.
    """

    def __init__(
        self,
        route: Route,
        ranked: Mapping[str, RankedLayer],
        *,
        packed: bool = False,
    ) -> None:
        """Prepare the layer that fans out."""
        self._packed = packed
        self.route, self._graph, self._ranked = route, route.graph, ranked
        self._linear = {
            name: LinearFan(ranked[name])
            for name in route.free
            if isinstance(ranked[name].layer, CPLinear)
        }
        self.fan = None
        if route.fan is not None:
            self.fan = self._linear.get(route.layer)
            self.fan = self.fan or ConvFan(ranked[route.layer], route.window)
        self._layers: dict[tuple[str, int, bool], nn.Module] = {}
        constant = [n for n in self._graph.nodes if n not in self._graph.varying]
        self._always = {*route.edges, *constant}
        if route.fan is None:
            self._always.add(self._graph.output)
        else:
            self._always.update(route.fan.all_input_nodes)

    def scores(
        self,
        images: Tensor,
        segments: Sequence[Sequence[Ranks]],
        sizes: Sizes,
        known: Values | None = None,
    ) -> Iterator[tuple[Sequence[Ranks], slice, Tensor]]:
        """Scores of truncations on a chunk of images.

        Args:
            images: The chunk.
            segments: Truncations, as `Route.segments` parts them.
            sizes: How much to compute at once.
            known: Empty, gets what is shared; or what an earlier call has put there
                for the same chunk and other truncations of the same, only, segment.

        Yields:
            Truncations, which images, and the scores. Shape
            ``(truncations, images, classes)``.
        """
        values = {} if known is None else known
        before: Ranks | None = segments[0][0] if values else None
        if before is None:
            values.update(self.values(images))
        keep = self.kept(segments)
        for segment in segments:
            self.share(values, segment[0], keep, before)
            before = segment[0]
            if self.fan is None:
                yield segment, slice(None), values[self._graph.output][None]
                continue
            for start in range(0, len(images), sizes.images):
                rows = slice(start, start + sizes.images)
                self.start(values, rows, segment)
                for first in range(0, len(segment), sizes.group):
                    group = segment[first : first + sizes.group]
                    yield group, rows, self.finish(values, rows, group)

    def values(self, images: Tensor) -> Values:
        """The values to start from: a copy, which the network may change."""
        copy = innermost(images) if self._packed else images
        return {self._graph.input: images.clone() if copy is images else copy}

    def share(
        self,
        values: Values,
        ranks: Ranks,
        keep: Collection[Node],
        before: Ranks | None = None,
    ) -> None:
        """Bring the shared values to new ranks.

        Args:
            values: What is known; gets what was not, or not at these ranks.
            ranks: The new ranks.
            keep: Values not to forget, see `kept`.
            before: The ranks of what is known; None if that is only the images.
        """
        changed = {n for n in ranks if before is None or ranks[n] != before[n]}
        stale = [
            node
            for node in self.route.shared
            if before is None or not changed.isdisjoint(self._graph.above[node])
        ]
        named = self._graph.named
        replaced = {
            node: self._layer(named[node], ranks[named[node]])
            for node in stale
            if node in named
        }
        self._graph.run(stale, values, replaced=replaced, keep=keep)

    def start(self, values: Values, rows: slice, segment: Sequence[Ranks]) -> None:
        """Take some of the images to the layer that fans out."""
        top = max(point[self.route.layer] for point in segment)
        (source,) = self.route.fan.all_input_nodes
        self.fan.start(values[source][rows], top)

    def finish(self, values: Values, rows: slice, group: Sequence[Ranks]) -> Tensor:
        """Scores of some truncations on the images taken with `start`."""
        route, graph, count = self.route, self._graph, len(group)
        outputs = self.fan.outputs([point[route.layer] for point in group])
        after = {route.fan: outputs if self._packed else outputs.contiguous()}
        for edge in route.edges:
            value = values[edge]
            if edge in graph.varying:
                value = value[rows].repeat(count, *(1,) * (value.ndim - 1))
            after[edge] = value
        replaced = {
            node: self._after(name, [point[name] for point in group])
            for node, name in graph.named.items()
            if node in self.route.batched
        }
        if route.pooled is not None:
            replaced[route.pooled] = lambda input, *_, **__: input
        graph.run(route.batched, after, replaced=replaced, keep={graph.output})
        return after[graph.output].unflatten(0, (count, -1))

    def kept(self, segments: Sequence[Sequence[Ranks]]) -> set[Node]:
        """Shared values that what follows needs, now or in a later segment."""
        kept, above = set(self._always), self._graph.above
        for (one, *_), (other, *_) in pairwise(segments):
            changed = {name for name in one if one[name] != other[name]}
            for node in self.route.shared:
                if not changed.isdisjoint(above[node]):
                    kept.update(
                        source
                        for source in node.all_input_nodes
                        if changed.isdisjoint(above[source])
                    )
        return kept

    def _after(self, name: str, ranks: Sequence[int]) -> Callable[..., Tensor]:
        """The layer for values after the fan: at one rank, or at one for each."""
        if name in self._linear:
            return functools.partial(self._linear[name].each, ranks=ranks)
        return self._layer(name, ranks[0], settled=True)

    def _layer(self, name: str, rank: int, settled: bool = False) -> nn.Module:
        """The layer at a rank; the last one is kept, as is what is made of it."""
        if (name, rank, settled) not in self._layers:
            for old in [key for key in self._layers if key[::2] == (name, settled)]:
                del self._layers[old]
            ranked = self._ranked[name]
            full = rank == ranked.layer.rank
            layer = ranked.layer if full else ranked.cut(rank).eval()
            self._layers[name, rank, settled] = _settled(layer) if settled else layer
        return self._layers[name, rank, settled]


def _settled(layer: CPLayer) -> nn.Module:
    """A layer to be used many times: with its kernel built, unless a chain is faster.

    The kernel that a CP layer keeps is compared with its parameters at every use.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    if hooks or layer.cost(None).mode == "chain":
        return layer
    dense = layer.to_dense()
    if len(layer.kernel_shape) == 4:
        dense = dense.to(memory_format=torch.channels_last)
    return dense
