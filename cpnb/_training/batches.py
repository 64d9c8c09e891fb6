"""What a training reads: images on the model's device, and how a step gets them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cpnb._data.splits import Split, standardize
from cpnb.augmentation import Augment
from cpnb.evaluation import (
    check_scores,
    evaluation_mode,
    innermost,
    place,
    placement,
    split_or_pair,
)
from cpnb.randomness import seeded

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """Images and labels of a training, on its device.

    Attributes:
        images: As they are stored: pixels or standardised. Shape ``(n, ...)``.
        labels: Shape ``(n,)``.
        statistics: Mean and standard deviation of each channel of pixels, float64 of
            shape ``(channels,)``; None if the images are standardised.
        dtype: Of the images that a network gets.
        validation: Pair to evaluate after each epoch, or None.
        channels_last: Whether the channels of an image lie innermost.
        augment: Random changes of the training images.
    """

    images: Tensor
    labels: Tensor
    statistics: Pair | None
    dtype: torch.dtype
    validation: Pair | None
    channels_last: bool
    augment: Augment | None

    @property
    def counts(self) -> list[int]:
        """Numbers of training and, if there are any, of validation images."""
        held_out = [] if self.validation is None else [len(self.validation[1])]
        return [len(self.labels), *held_out]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells it from another source, in the types of JSON; hashed once."""
        found: dict[str, Any] = {
            "hash of the training data": _digest(self.images, self.labels)
        }
        if self.statistics is not None:
            for name, values in zip(("mean", "std"), self.statistics, strict=True):
                found[f"{name} of the training data"] = values.tolist()
        if self.validation is not None:
            found["hash of the validation data"] = _digest(*self.validation)
        return found

    def batch(self, index: Tensor, changes: Tensor | None) -> Pair:
        """Images and labels of one step for each of m networks.

        Args:
            index: Which images. Shape ``(m, batch)``.
            changes: What happens to each, see `Augment.draw`. Shape ``(m, batch, 5)``.

        Returns:
            Images, shape ``(m, batch, ...)``, and labels, shape ``(m, batch)``.
        """
        images = self.images[index]
        if self.augment is not None:
            flat = self.augment.apply(images.flatten(0, 1), changes.flatten(0, 1))
            # Unflattened with the channels last, or the layout of one channel is lost.
            innermost = flat.movedim(1, -1).unflatten(0, index.shape)
            images = innermost.movedim(-1, 2)
            if not self.channels_last:
                # contiguous() takes one channel innermost for contiguous already.
                images = images.clone(memory_format=torch.contiguous_format)
        if self.statistics is not None:
            images = standardize(images, *self.statistics, self.dtype)
        return images, self.labels[index]


def batch_slices(count: int, batch_size: int) -> list[slice]:
    """Slices of an epoch's order; a single image left over joins the batch before."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and starts[-1] == count - 1:
        starts.pop()
    return [slice(*bounds) for bounds in zip(starts, [*starts[1:], count], strict=True)]


def training_source(
    models: Sequence[nn.Module],
    data: Any,
    validation: Any,
    channels_last: bool,
    augment: Augment | None,
) -> Source:
    """Put everything where the models are, in a layout they take; check it fits."""
    given = split_or_pair(data, "train")
    if augment is not None:
        images, _ = given
        augment.draw(0, images.shape)  # refuses what are no images
    if validation is None and hasattr(data, "validation"):
        validation = data.validation
    held_out = None if validation is None else split_or_pair(validation)
    for layout in (True, False) if channels_last else (False,):
        source = _place(models[0], given, held_out, layout, augment)
        try:
            for model in models:
                _check_fit(model, source)
        except RuntimeError:
            if not layout:
                raise
        else:
            break
    return source


def _place(
    model: nn.Module,
    given: Split | Pair,
    held_out: Split | Pair | None,
    channels_last: bool,
    augment: Augment | None,
) -> Source:
    images, labels = given
    device, dtype = placement(model, images)
    pixels = isinstance(given, Split)
    images = images.to(device, None if pixels else dtype)
    statistics = None
    if pixels:
        values = given.mean, given.std
        statistics = torch.tensor(values, dtype=torch.float64, device=device).unbind()
    if held_out is not None:
        held_out = place(held_out, model, channels_last=channels_last)
    return Source(
        images=innermost(images) if channels_last else images,
        labels=labels.to(device, torch.long),
        statistics=statistics,
        dtype=dtype,
        validation=held_out,
        channels_last=channels_last,
        augment=augment,
    )


def _check_fit(model: nn.Module, source: Source) -> None:
    """Score one image of each kind, so that a misfit shows before anything changes."""
    index = source.labels.new_zeros((1, 1))
    # Augmented as in a step, though not at random: that may change the layout.
    changes = None if source.augment is None else index.new_zeros((1, 1, 5))
    (image,), _ = source.batch(index, changes)
    samples, largest = [image], int(source.labels.max())
    if source.validation is not None:
        images, labels = source.validation
        samples.append(images[:1])
        largest = max(largest, int(labels.max()))
    apart = seeded(0, source.labels.device)  # the global state stays as it is
    with apart, evaluation_mode(model), torch.no_grad():
        for image in samples:
            check_scores(model(image), 1, largest)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        # The bytes are viewed as integers because numpy has no bfloat16.
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()
