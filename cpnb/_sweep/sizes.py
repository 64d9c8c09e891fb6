"""How much a sweep computes at once: what fits the memory, and better the cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from cpnb._sweep.fan import ConvFan
from cpnb._sweep.graph import Node, Values
from cpnb._sweep.memory import MIB, peak_of
from cpnb._sweep.route import Ranks
from cpnb._sweep.shared import SharedEvaluation, Sizes
from cpnb.base import CPLayer

GROUP = 64
"""Most truncations that go through the layers after the cut together."""

# A running sum that stays in the second-level cache, and tensors below the 32 MiB from
# which the C library gives memory back and asks for it again on every call.
_SUM, _TENSORS = 1 * MIB, 8 * MIB
_GPU = 64  # times as much there, where a call costs more than the traffic


def fitting(
    run: Callable[[Tensor], object],
    images: Tensor,
    layers: Collection[CPLayer],
    memory: int,
    parts: int = 1,
) -> int:
    """Images that fit at once.

    Args:
        run: What they go through; measured with one and with two, with the CP layers
            as chains and as dense layers, because they may change with the rank.
        images: At least one.
        layers: The CP layers on the way.
        memory: Bytes that the tensors made on the way may take.
        parts: Equal parts of the memory, of which this may take one.

    Returns:
        A number of images, at least 1.

    Raises:
        ValueError: If a single one takes more.
    """
    modes = [layer.forward_mode for layer in layers]
    counts = []
    for mode in ("chain", "dense"):
        try:
            for layer in layers:
                layer.forward_mode = mode
            one = peak_of(lambda: run(_first(images, 1)))
            _check(parts * one, memory)
            spare, two = memory // parts - one, 2 * one
            if one <= spare:  # less, where something is made once for all images
                two = peak_of(lambda: run(_first(images, 2)))
            counts.append(1 + spare // max(two - one, 1))
        finally:
            for layer, own in zip(layers, modes, strict=True):
                layer.forward_mode = own
    return min(counts)


def fitting_sizes(
    evaluation: SharedEvaluation,
    points: Sequence[Ranks],
    images: Tensor,
    layers: Collection[CPLayer],
    memory: int,
    batch_size: int,
) -> Sizes:
    """How much to compute at once, half of the memory going to the shared part.

    A chunk takes half of that half, if it can, so that what is shared can be kept.

    Args:
        evaluation: What computes it.
        points: The truncations.
        images: At least one.
        layers: The CP layers of the network.
        memory: Bytes that the tensors made on the way may take.
        batch_size: Most images to compute at once.

    Returns:
        The sizes.

    Raises:
        ValueError: If a single image at a single rank takes more.
    """
    segments = evaluation.route.segments(points)
    keep, point = evaluation.kept(segments), points[-1]
    # What is made at the first use, as a kernel, belongs to the network.
    with torch.no_grad():
        for _ in evaluation.scores(images[:1], [[point]], Sizes(1, 1, 1)):
            pass

    def share(images: Tensor) -> dict:
        values = evaluation.values(images)
        evaluation.share(values, point, keep)
        return values

    if evaluation.fan is None:
        return Sizes(min(batch_size, fitting(share, images, layers, memory)), 1, 1)
    fits = fitting(share, images, layers, memory, 2)
    chunk = min(batch_size, max(1, fits // 2))
    values = share(_first(images, 2))
    spare = memory // 2 * (fits - chunk) // fits
    kept = chunk + 2 * spare // max(1, _bytes(values, evaluation.route.graph.varying))

    def start(count: int) -> int:
        return peak_of(lambda: evaluation.start(values, slice(count), [point]))

    def finish(count: int) -> int:
        rows, group = slice(1), [point] * count
        return peak_of(lambda: evaluation.finish(values, rows, group))

    # The larger first: `finish` needs the one image that `start` has taken last.
    two, one = start(2), start(1)
    image, once, twice = two - one, finish(1), finish(2)
    row = max(twice - once, 1)
    fixed = max(0, (one - image) + (once - row))
    _check(2 * (fixed + image + row), memory)
    left = memory // 2 - fixed
    scale = _GPU if images.is_cuda else 1
    if isinstance(evaluation.fan, ConvFan):
        count = scale * _SUM // evaluation.fan.sum_bytes
    else:
        count = scale * _TENSORS // (row * min(GROUP, len(points)))
    count = max(1, min(count, chunk, left // (image + row)))
    group = min(scale * _TENSORS // row, (left - count * image) // row) // count
    return Sizes(chunk, count, max(1, min(group, GROUP)), kept)


def _bytes(values: Values, nodes: Collection[Node]) -> int:
    """Memory that some tensors among values hold, each piece counted once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for node, value in values.items()
        if node in nodes and isinstance(value, Tensor)
    }
    return sum(storages.values())


def _first(images: Tensor, count: int) -> Tensor:
    return images[:1].repeat(count, *(1,) * (images.ndim - 1))


def _check(needed: int, memory: int) -> None:
    if needed > memory:
        raise ValueError(
            f"memory is {memory / MIB:.3g} MiB, expected at least "
            f"{needed / MIB:.3g} MiB for one image."
        )
