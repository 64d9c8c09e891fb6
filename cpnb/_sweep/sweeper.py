"""Measure many truncations of a network: together where possible, else one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cpnb._sweep.graph import CannotShare, NetworkGraph, Profile, Values
from cpnb._sweep.meter import Measurement, RankMeter
from cpnb._sweep.points import GLOBAL
from cpnb._sweep.route import Ranks, Route, fan_route, global_route
from cpnb._sweep.shared import SharedEvaluation, Sizes
from cpnb._sweep.sizes import fitting, fitting_sizes
from cpnb.evaluation import check_scores, placement

BAND = 64
"""Truncations that are finished together: what Ctrl-C can cost."""

# Images on which sharing is compared with evaluating one by one, and ranks at once.
_CHECKED, _TOGETHER = 8, 4


class Sweeper:
    """Measures the truncations along the axes of a sweep.

    Args:
        meter: Of the network.
        memory: Bytes that activations may take at once.

    Attributes:
        methods: By axis, how it was measured: ``"together"``, or what else and why.

    Raises:
        ValueError: If ``memory`` is too small for a single image.
    """

    def __init__(self, meter: RankMeter, memory: int) -> None:
        """Trace the network and see how much memory an image takes."""
        self.methods: dict[str, str] = {}
        self._meter, self._memory = meter, memory
        self._device, _ = placement(meter.model, meter.images)
        self._few = meter.images[:_CHECKED].to(self._device)
        self._layers = {name: ranked.layer for name, ranked in meter.ranked.items()}
        fits = fitting(meter.model, self._few, self._layers.values(), memory)
        meter.batch_size = min(meter.batch_size, fits)
        self._few = self._few[: max(1, fits // _TOGETHER)]
        self._graph, self._reason = None, ""
        with torch.no_grad():
            try:
                if fits < _TOGETHER:
                    raise CannotShare(f"the memory holds {fits} of {_TOGETHER} images")
                self._graph = NetworkGraph(meter.model)
                self._profile = Profile(self._graph, self._few)
            except CannotShare as error:
                self._graph, self._reason = None, str(error)

    def measure(
        self, axis: str, points: Sequence[Ranks], advance: Callable[[int], object]
    ) -> Iterator[tuple[Ranks, Measurement]]:
        """Measure truncations along one axis.

        Args:
            axis: Name of a layer, or ``"*"``.
            points: Components of every layer, ascending along the axis.
            advance: Told how many evaluations of an image were done.

        Yields:
            The truncations, in order, and what was found.
        """
        evaluation, sizes = self._evaluation(axis, points)
        if evaluation is None:
            for point in points:
                yield point, self._meter.measure(point)
                advance(len(self._meter.images))
            return
        segments = evaluation.route.segments(points)
        # Before a linear layer, what is shared may cost as much as all of its ranks.
        again = len(segments) == 1 and BAND < len(points)
        again = again and len(self._meter.images) <= sizes.kept
        known = [{} if again else None for _ in self._meter.labels.split(sizes.chunk)]
        for band in _bands(segments, BAND):
            yield from self._measure_band(evaluation, band, sizes, known, advance)

    @torch.no_grad()
    def _measure_band(
        self,
        evaluation: SharedEvaluation,
        band: Sequence[Sequence[Ranks]],
        sizes: Sizes,
        known: Sequence[Values | None],
        advance: Callable[[int], object],
    ) -> list[tuple[Ranks, Measurement]]:
        meter, largest = self._meter, int(self._meter.labels.max())
        points = [point for segment in band for point in segment]
        totals = {id(point): torch.zeros(2, dtype=torch.float64) for point in points}
        chunks = (part.split(sizes.chunk) for part in (meter.images, meter.labels))
        for images, labels, values in zip(*chunks, known, strict=True):
            images = images.to(self._device)
            labels = labels.to(self._device, torch.long)
            for group, rows, scores in evaluation.scores(images, band, sizes, values):
                target = labels[rows]
                check_scores(scores.flatten(0, 1), len(group) * len(target), largest)
                for point, total in zip(group, _totals(scores, target), strict=True):
                    totals[id(point)] += total
                advance(len(group) * len(target))
        means = [(totals[id(point)] / len(meter.images)).tolist() for point in points]
        return [
            (point, Measurement(*mean, meter.errors(point)))
            for point, mean in zip(points, means, strict=True)
        ]

    def _evaluation(
        self, axis: str, points: Sequence[Ranks]
    ) -> tuple[SharedEvaluation | None, Sizes | None]:
        """The fastest way that gives the right scores; None to go one by one."""
        if self._graph is None:
            self.methods[axis] = f"one by one: {self._reason}"
            return None, None
        try:
            found = self._checked(self._route(axis, points), points)
            self.methods[axis] = "together"
            return found
        except CannotShare as error:
            self.methods[axis] = f"one by one after what they share: {error}"
        try:
            return self._checked(Route(self._graph), points)
        except CannotShare as error:
            self.methods[axis] = f"one by one: {error}"
            return None, None

    def _checked(
        self, route: Route, points: Sequence[Ranks]
    ) -> tuple[SharedEvaluation, Sizes]:
        """The way to evaluate along a route, in the faster layout if that works."""

        def checked(packed: bool) -> tuple[SharedEvaluation, Sizes]:
            evaluation = SharedEvaluation(route, self._meter.ranked, packed=packed)
            try:
                sizes = fitting_sizes(
                    *(evaluation, points, self._few, self._layers.values()),
                    *(self._memory, self._meter.batch_size),
                )
            except Exception as error:  # too little memory, or whatever a model does
                raise CannotShare(f"{type(error).__name__}: {error}") from error
            self._check(evaluation, points)
            return evaluation, sizes

        try:
            return checked(packed=True)
        except CannotShare:
            return checked(packed=False)

    def _route(self, axis: str, points: Sequence[Ranks]) -> Route:
        given = (self._graph, self._profile, self._layers)
        if axis != GLOBAL:
            return fan_route(*given, axis)
        route = global_route(*given)
        if 2 * len(route.segments(points)) > len(points) > 1:
            raise CannotShare("other layers change with nearly every step")
        return route

    @torch.no_grad()
    def _check(self, evaluation: SharedEvaluation, points: Sequence[Ranks]) -> None:
        """Compare with evaluating one by one, on a few images."""
        longest = max(evaluation.route.segments(points), key=len)
        some = [points[0], longest[0], longest[-1], points[-1]]
        segments, count = evaluation.route.segments(some), len(self._few)
        largest = int(self._meter.labels.max())
        expected = []
        for point in some:
            expected.append(self._meter.truncated(point)(self._few.clone()))
            check_scores(expected[-1], count, largest)
        expected = torch.stack(expected)
        try:
            # First one rank after the other, as it may change what they share.
            found = [
                torch.cat([s for *_, s in evaluation.scores(self._few, segments, size)])
                for size in (Sizes(count, count, 1), Sizes(count, count, _TOGETHER))
            ]
        except Exception as error:  # whatever a model does with several ranks at once
            raise CannotShare(f"{type(error).__name__}: {error}") from error
        if not all(_same(scores, expected) for scores in found):
            raise CannotShare("ranks evaluated together have other scores")


def _same(scores: Tensor, expected: Tensor) -> bool:
    """Whether scores differ by rounding at most, measured against each class."""
    if scores.shape != expected.shape:
        return False
    # One scale for all would let a masked class, of -1e9 or less, hide the others.
    sizes = torch.where(expected.isfinite(), expected.abs(), 0)
    allowed = 1e-3 * sizes.reshape(-1, sizes.shape[-1]).amax(0)
    equal = (scores == expected) | (scores.isnan() & expected.isnan())
    return bool((equal | ((scores - expected).abs() <= allowed)).all())


def _totals(scores: Tensor, target: Tensor) -> Tensor:
    """Right answers and cross entropy, summed over images. Shape ``(ranks, 2)``."""
    correct = (scores.argmax(2) == target).sum(1)
    losses = F.cross_entropy(
        scores.double().flatten(0, 1), target.repeat(len(scores)), reduction="none"
    )
    return torch.stack([correct, losses.view(len(scores), -1).sum(1)], 1).cpu()


def _bands(
    segments: Sequence[Sequence[Ranks]], size: int
) -> Iterator[list[Sequence[Ranks]]]:
    """Segments, cut where they are long, in bands of about ``size`` truncations."""
    band: list[Sequence[Ranks]] = []
    for segment in segments:
        for first in range(0, len(segment), size):
            band.append(segment[first : first + size])
            if sum(map(len, band)) >= size:
                yield band
                band = []
    if band:
        yield band
