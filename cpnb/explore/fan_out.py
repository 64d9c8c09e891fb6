"""Right answers of many truncations of one network, in far fewer passes than networks.

Truncations that differ in one layer go through the network together: a stand-in for the
layer adds its components to its outputs one after the other and hands on those at all
ranks, stacked along the batch. What comes before the layer is computed once for them
all, what comes after it in large batches. Linear layers after it may differ as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpnb.convert import replace_layers, to_dense
from cpnb.layers import CPLinear
from cpnb.train.evaluation import evaluate, moved, placement

if TYPE_CHECKING:
    from cpnb.truncation import RankedLayer

__all__ = ["Meter"]

# Bytes of a layer's outputs: at one rank they stay in the second-level cache while
# components are added, those of a group of ranks and what is made of them below 32 MiB,
# see `Meter`. On a GPU a call costs more than memory does.
ONE_RANK, GROUP, GPU_FACTOR = 2**20, 2**23, 16
# Images at once at most; truncations that Ctrl-C may cost; images that are run both
# together and one by one to see whether the scores agree.
BATCH, BAND, CHECKED = 100, 128, 8

Ranks = dict[str, int]


class Meter:
    """Counts right answers of truncations, together where possible, else one by one."""

    def __init__(
        self,
        model: nn.Module,
        ranked: Mapping[str, RankedLayer],
        images: Tensor,
        labels: Tensor,
    ) -> None:
        self._model = model
        self._ranked = ranked
        self._images = images
        self._labels = labels
        self._device = placement(model, images)[0]
        self._network = model
        self._fans: dict[str, _Fan] = {}
        self._channels_last = True
        # Once it has freed 32 MiB, glibc keeps that much instead of giving memory back
        # and faulting every page in again at each call, which can cost five times.
        torch.empty(2**25 - 2**16, dtype=torch.uint8)

    @torch.no_grad()
    def prepare(self, points: Sequence[Ranks]) -> str:
        """Find out how truncations, ascending along one axis, can be measured.

        Running together is tried on a few images, in the faster layout first, and taken
        if it gives the scores that one by one gives. Returns ``"together"``, or ``"one
        by one: "`` and why.
        """
        self._fans = {}
        runs = self._runs(points)
        if 2 * len(runs) > len(points):
            return "one by one: a single cut, or several convolutions at every step"
        # From end to end, as neighbours may cut the other layers to the same ranks.
        run = max(runs, key=len)
        some = [run[n] for n in sorted({k * (len(run) - 1) // 3 for k in range(4)})]
        few = moved(self._model, self._images[:CHECKED])
        expected = torch.stack([self._cut(p).eval()(few.clone()) for p in some])
        reason = "ranks that go together have other scores"
        for last in (True, False):
            self._channels_last = last
            self._fans = {name: _Fan(x, last) for name, x in self._ranked.items()}
            self._network = replace_layers(self._model, self._fans).eval()
            self._begin(some, few)
            try:
                # In two steps, as the second goes on where the first has ended.
                halves = [self._scores(x, few) for x in (some[:2], some[2:]) if x]
            except Exception as error:  # whatever a network does with several ranks
                reason = f"{type(error).__name__}, {error}".partition("\n")[0]
                continue
            if _agree(torch.cat(halves), expected):
                return "together"
        self._fans = {}
        return f"one by one: {reason}"

    def measure(
        self, points: Sequence[Ranks], advance: Callable[[int], Any]
    ) -> Iterator[tuple[Ranks, int]]:
        """Yield what `prepare` got with right answers; ``advance`` counts images."""
        if not self._fans:
            for point in points:
                yield point, self.one_by_one(point)
                advance(len(self._images))
            return
        for run in self._runs(points):
            for first in range(0, len(run), BAND):
                band = run[first : first + BAND]
                yield from zip(band, self._together(band, advance), strict=True)

    def one_by_one(self, ranks: Ranks) -> int:
        """Count the right answers of one truncation, as `cpnb.truncate` gives it."""
        found = evaluate(self._cut(ranks), (self._images, self._labels))
        return round(found["accuracy"] * len(self._images))

    def _cut(self, ranks: Ranks) -> nn.Module:
        cut = {name: self._ranked[name].cut(rank) for name, rank in ranks.items()}
        return replace_layers(self._model, cut)

    def _runs(self, points: Sequence[Ranks]) -> list[list[Ranks]]:
        """Part truncations into those that can go together.

        They may differ in linear layers and in the last convolution that changes at
        all: after it, another one would be computed for each of them by itself.
        """
        changing = [
            name
            for name, found in self._ranked.items()
            if not isinstance(found.layer, CPLinear)
            and len({point[name] for point in points}) > 1
        ]
        alike = groupby(points, lambda point: [point[name] for name in changing[:-1]])
        return [list(run) for _, run in alike]

    @torch.no_grad()
    def _together(
        self, points: Sequence[Ranks], advance: Callable[[int], Any]
    ) -> list[int]:
        scale = GPU_FACTOR if self._device.type == "cuda" else 1
        one_rank = max(1, *(fan.image_bytes for fan in self._fans.values()))
        block = min(scale * BATCH, max(1, scale * ONE_RANK // one_rank))
        group = max(1, scale * GROUP // (block * one_rank))
        right = torch.zeros(len(points), dtype=torch.long)
        pairs = zip(self._images.split(block), self._labels.split(block), strict=True)
        for images, labels in pairs:
            images = moved(self._model, images)
            self._begin(points, images)
            for first in range(0, len(points), group):
                some = points[first : first + group]
                hits = self._scores(some, images).argmax(2) == labels.to(self._device)
                right[first : first + group] += hits.sum(1).cpu()
                advance(len(some) * len(images))
        return right.tolist()

    def _begin(self, points: Sequence[Ranks], images: Tensor) -> None:
        for name, fan in self._fans.items():
            fan.begin(len(images), top=max(point[name] for point in points))

    def _scores(self, points: Sequence[Ranks], images: Tensor) -> Tensor:
        """Scores of truncations, shape ``(truncations, images, classes)``."""
        for name, fan in self._fans.items():
            fan.ranks = [point[name] for point in points]
        # A copy, as a network may change what it is given.
        if self._channels_last and images.ndim == 4:
            last = images.movedim(1, -1).clone(memory_format=torch.contiguous_format)
            images = last.movedim(-1, 1)
        else:
            images = images.clone()
        return self._network(images).unflatten(0, (len(points), -1))


def _agree(scores: Tensor, expected: Tensor) -> bool:
    """Whether scores differ by rounding at most, measured against each class."""
    if scores.shape != expected.shape:
        return False
    # One scale for all would let a masked class, of -1e9 or less, hide the others.
    size = expected.abs().nan_to_num(posinf=0.0).amax((0, 1))
    near = (scores == expected) | ((scores - expected).abs() <= 1e-3 * size)
    return bool(near.all())


class _Fan(nn.Module):
    """Stands in for a CP layer while several truncations of a network run together.

    The first layer in which they differ hands on its outputs at all their ranks,
    stacked along the batch; the layers after it get such a stack. ``ranks`` are those
    of the networks, ascending, ``image_bytes`` the size of an output once known.
    """

    def __init__(self, ranked: RankedLayer, channels_last: bool) -> None:
        super().__init__()
        self._ranked = ranked
        self._channels_last = channels_last
        self._at: tuple[int, nn.Module] | None = None
        self._sum = _RunningSum(ranked)
        self.ranks = [ranked.layer.rank]
        self.image_bytes = 0

    def begin(self, images: int, top: int) -> None:
        """Expect new images, at ascending ranks up to ``top``."""
        self._images = images
        self._top = top
        self._begun = False

    def forward(self, input: Tensor) -> Tensor:
        """The layer at ``ranks``, shape ``(ranks · images, ...)`` if they differ."""
        if len(set(self.ranks)) == 1:
            return self._cut(self.ranks[0])(input)
        if isinstance(self._ranked.layer, CPLinear):
            return self._linear(input)
        if len(input) != self._images:  # the layer, or one before it, has fanned out
            parts = zip(self.ranks, input.split(self._images), strict=True)
            return torch.cat([self._cut(rank)(part) for rank, part in parts])
        if not self._begun:
            self._sum.begin(input, self._top)
            self._begun = True
        output = self._sum.outputs(self.ranks)
        self.image_bytes = output[0].nbytes
        return output if self._channels_last else output.contiguous()

    def _cut(self, rank: int) -> nn.Module:
        """The layer at one rank, kept until another is asked for."""
        if self._at is None or self._at[0] != rank:
            layer: Any = self._ranked.cut(rank).eval()
            if not layer._takes_chain():  # it would build its kernel at every call
                layer = to_dense(layer)
                if layer.weight.ndim == 4 and self._channels_last:
                    layer = layer.to(memory_format=torch.channels_last)
            self._at = rank, layer
        return self._at[1]

    def _linear(self, input: Tensor) -> Tensor:
        """``((x·B) ∘ λ_k)·Aᵀ``, one product for all ranks k: λ past a rank are zero."""
        top = max(self.ranks)
        output, source = (factor[:, :top] for factor in self._ranked.factors)
        hidden = (input @ source).unflatten(0, (-1, self._images))
        lam = hidden.new_zeros(len(self.ranks), *(1,) * (hidden.ndim - 2), top)
        for row, rank in zip(lam, self.ranks, strict=True):
            row[..., :rank] = self._ranked.lam(rank)
        mixed = (hidden * lam).flatten(0, 1)
        scores = F.linear(mixed, output, self._ranked.layer.bias)
        self.image_bytes = max(mixed[0].nbytes, scores[0].nbytes)
        return scores


class _RunningSum:
    """Outputs of a CP convolution at ascending ranks: only new components are added.

    They are kept as a matrix of positions by channels for each group, so that one
    component more is an update of rank one.
    """

    def __init__(self, ranked: RankedLayer) -> None:
        layer: Any = ranked.layer
        output, self._others = layer.by_role(ranked.factors)
        self._ranked = ranked
        # What a component adds to the channels. Shape (groups, rank, channels).
        self._mix = output.unflatten(0, (layer.groups, -1)).mT.contiguous()
        self._weighted = self._mix * self._lam(layer.rank)
        bias = output.new_zeros(len(output)) if layer.bias is None else layer.bias
        self._bias = bias.detach().view(layer.groups, 1, -1)

    def begin(self, input: Tensor, top: int) -> None:
        """Take inputs, shape ``(batch, in, *size)``, for ranks up to ``top``."""
        layer: Any = self._ranked.layer
        others = [factor[:, :top] for factor in self._others]
        branches = layer.branches(input, others)
        self._size = (len(input), *branches.shape[3:])
        # What a component sends there. Shape (groups, rank, positions).
        self._branches = branches.movedim(0, 2).flatten(2)
        self._start = self._bias.expand(-1, self._branches.shape[2], -1)
        self._sum = self._start
        self._rank = 0

    def outputs(self, ranks: Sequence[int]) -> Tensor:
        """The layer at ranks from those of the last call upwards, ranks outermost."""
        sums = self._start.new_empty(len(ranks), *self._start.shape)
        for rank, out in zip(ranks, sums, strict=True):
            new = slice(self._rank, rank)
            weighted = self._weighted
            if self._ranked.refit:  # every λ is another one
                new = slice(rank)
                self._sum = self._start
                weighted = self._mix[:, new] * self._lam(rank)
            branches = self._branches[:, new].mT
            # A product of a column and a row is no matter for a matrix product.
            add = torch.addcmul if branches.shape[2] == 1 else torch.baddbmm
            add(self._sum, branches, weighted[:, new], out=out)
            self._sum = out
            self._rank = rank
        self._sum = self._sum.clone()  # as what follows may change its input
        stacked = sums.unflatten(2, self._size)
        return stacked.movedim(1, -2).flatten(-2).flatten(0, 1).movedim(-1, 1)

    def _lam(self, rank: int) -> Tensor:
        return self._ranked.lam(rank)[:, None].to(self._mix.dtype)
