"""What each component of a CP layer does to images and to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpnb._components import Components
from cpnb._data.splits import Split
from cpnb._sweep.memory import MIB, PeakMemory
from cpnb.base import CPLayer
from cpnb.evaluation import (
    check_scores,
    evaluation_mode,
    images_and_labels,
    placement,
    split_or_pair,
)

IMAGES, _BATCH = 1000, 64
"""Training images of a data set that are looked at, and the most at once."""


class _Call(NamedTuple):
    layer: str
    inputs: Tensor
    output: Tensor


def probe(
    model: nn.Module,
    layers: Mapping[str, CPLayer],
    data: Any,
    what: str,
    *,
    memory: int | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Measure the components of some layers of a network on images.

    Args:
        model: The network; it is run in evaluation mode and not changed.
        layers: Some of its CP layers by name.
        data: A data set, of which 1,000 training images are used, or a split or a pair
            ``(images, labels)``, used whole.
        what: ``"gradient"``: |mean over the images of λ_r ∂loss/∂λ_r|. ``"hessian"``:
            half of λ_r² times the Gauss-Newton diagonal of the mean loss.
            ``"activation"``: mean squared norm of what the component adds to the
            outputs. ``"output"``: the matrix G for which ``dᵀGd`` is the mean squared
            change of the outputs when λ changes by d.
        memory: Bytes that the tensors made on the way may take; None sets no bound.
        progress: Whether to show a bar when it takes more than two seconds.

    Returns:
        Float64 tensors of shape ``(rank,)``, for ``"output"`` ``(rank, rank)``; zero
        for a layer that is not used.

    Raises:
        ValueError: If the scores do not fit the labels, or ``memory`` is too small.
    """
    from tqdm import tqdm

    images, labels = calibration_images(data)
    device, dtype = placement(model, images)
    parts = {name: Components(name, layer) for name, layer in layers.items()}
    totals, largest = dict.fromkeys(layers, 0), int(labels.max())

    def look(rows: slice) -> list[tuple[str, Tensor]]:
        calls.clear()
        batch, target = images[rows], labels[rows].to(device, torch.long)
        # The images need a gradient for the outputs to have one in any network, and
        # the network gets a copy, which it may change.
        scores = model(batch.to(device, dtype).detach().requires_grad_().clone())
        check_scores(scores, len(target), largest)
        return list(_measured(what, parts, calls, scores, target))

    with evaluation_mode(model), _recorded(layers) as calls, torch.enable_grad():
        count = _BATCH
        if what == "hessian":  # squares are of images, which rows need not be
            look(slice(1))
            count = count if all(len(call.inputs) == 1 for call in calls) else 1
        if memory is not None:
            count = _fitting(look, count, memory)
        for start in tqdm(
            range(0, len(images), count),
            f"looking at data for {what}",
            disable=not progress,
            delay=2,
        ):
            for name, found in look(slice(start, start + count)):
                totals[name] = totals[name] + found
    found = {
        name: part.zero(what) + totals[name] / len(images)
        for name, part in parts.items()
    }
    return {n: f.abs() for n, f in found.items()} if what == "gradient" else found


def output_gram(layer: CPLayer, inputs: Tensor) -> Tensor:
    """How the components of a layer overlap in its outputs.

    Args:
        layer: A CP convolution or linear layer.
        inputs: A batch as the layer receives it.

    Returns:
        G, for which ``dᵀGd`` is the mean squared norm of the change of the outputs when
        λ (σ folded in) changes by d. Shape ``(rank, rank)``, float64.

    Raises:
        TypeError: If the layer is of another kind.
    """
    part = Components("", layer)
    return part.overlap(part.outputs(inputs.detach())) / len(inputs)


def received(args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Tensor:
    """The input of a layer, given by position or by keyword."""
    return (*args, *kwargs.values())[0]


def _measured(
    what: str,
    parts: Mapping[str, Components],
    calls: list[_Call],
    scores: Tensor,
    target: Tensor,
) -> Iterator[tuple[str, Tensor]]:
    """What one batch adds to the totals of each layer."""
    outputs = [parts[call.layer].outputs(call.inputs) for call in calls]
    if what in ("activation", "output"):
        for call, output in zip(calls, outputs, strict=True):
            part = parts[call.layer]
            yield (
                call.layer,
                part.energies(output) if what == "activation" else part.overlap(output),
            )
        return
    if what == "gradient":
        loss = F.cross_entropy(scores, target, reduction="sum")
        for name, found in _by_layer(parts, calls, outputs, loss, 1):
            yield name, found[0]
        return
    # Σ_c p_c (s_c - s̄)² with s̄ = Σ_c p_c s_c is the loss to second order in the scores.
    likely = scores.detach().softmax(1)
    for column, share in enumerate(likely.unbind(1)):
        toward = -likely * share.sqrt()[:, None]
        toward[:, column] += share.sqrt()
        value = (scores * toward).sum()
        for name, found in _by_layer(parts, calls, outputs, value, len(target)):
            yield name, found.square().sum(0) / 2


def _by_layer(
    parts: Mapping[str, Components],
    calls: list[_Call],
    outputs: list[Tensor],
    value: Tensor,
    images: int,
) -> Iterator[tuple[str, Tensor]]:
    """λ_r ∂value/∂λ_r over all uses of each layer; a row for each image, or for all.

    What is computed without gradients has none, and counts nothing.
    """
    if not value.requires_grad:
        return
    pairs = zip(calls, outputs, strict=True)
    used = [(call, output) for call, output in pairs if call.output.requires_grad]
    if not used:
        return
    gradients = torch.autograd.grad(
        value, [call.output for call, _ in used], retain_graph=True, allow_unused=True
    )
    found: dict[str, Tensor] = {}
    for (call, output), gradient in zip(used, gradients, strict=True):
        if gradient is not None:
            one = parts[call.layer].contributions(output, gradient)
            if images == 1:  # also for other uses, with any number of rows
                one = one.sum(0, keepdim=True)
            found[call.layer] = found.get(call.layer, 0) + one
    yield from found.items()


def _fitting(look: Callable[[slice], object], most: int, memory: int) -> int:
    """Images, ``most`` or fewer, of which what is made on the way fits the memory."""

    def taken(count: int) -> int:
        with PeakMemory() as peak:
            look(slice(count))
        return peak.bytes

    one = taken(1)
    if one > memory:
        raise ValueError(
            f"memory is {memory / MIB:.3g} MiB, expected at least {one / MIB:.3g} MiB "
            "for what the key or the refit looks at in one image."
        )
    if most == 1 or 2 * one > memory:
        return 1
    return min(most, 1 + (memory - one) // max(taken(2) - one, 1))


@contextmanager
def _recorded(layers: Mapping[str, CPLayer]) -> Iterator[list[_Call]]:
    """Inputs and outputs of the layers, call by call."""
    calls: list[_Call] = []

    def hook(name: str) -> Any:
        def record(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            calls.append(_Call(name, received(args, kwargs).detach(), output))
            return output.clone()  # what follows may change it in place

        return record

    handles = [
        layer.register_forward_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def calibration_images(data: Any) -> tuple[Tensor, Tensor]:
    """Images to look at: 1,000 for training, evenly spaced, or what is given."""
    given = split_or_pair(data, "train")
    if isinstance(data, Split | tuple | list):
        return images_and_labels(given)
    images, labels = given
    count = min(len(labels), IMAGES)
    places = torch.arange(count) * len(labels) // count  # the classes may be sorted
    images, labels = images[places], labels[places]
    if isinstance(given, Split):
        return images_and_labels(replace(given, images=images, labels=labels))
    return images, labels
