"""What a cut does to one kernel, to each class and to single images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cpnb._data.splits import Split, standardize
from cpnb._explorer.pictures import image_picture, kernel_picture
from cpnb._explorer.state import decimal, label, percentage
from cpnb.cp import relative_error
from cpnb.evaluation import check_scores, evaluation_mode, placement, split_or_pair
from cpnb.surgery import cp_layers

STRIP = 10
"""Images in the strip of those whose prediction flips."""


@dataclass(frozen=True)
class Flip:
    """An image whose predicted class the cut changes.

    Attributes:
        number: Its place in the data.
        label: Its true class.
        before: The class that the untruncated network predicts.
        after: The class that the truncated network predicts.
    """

    number: int
    label: int
    before: int
    after: int


@dataclass(frozen=True)
class Details:
    """What is shown beside the numbers of one truncated network.

    Attributes:
        layer: The layer whose kernel is shown.
        ranks: Components of every layer.
        kernels: Its kernel whole, truncated, and the first minus the second, as
            matrices with NaN where there is nothing. Shape ``(height, width)`` each.
        extract: What of the kernel is shown, in words.
        error: Relative error of the truncated kernel.
        before: Accuracy of the untruncated network for every class, NaN for a class
            without images. Shape ``(classes,)``.
        after: The same for the truncated network.
        flips: The images whose prediction changes; those that were right come first.
    """

    layer: str
    ranks: dict[str, int]
    kernels: tuple[np.ndarray, np.ndarray, np.ndarray]
    extract: str
    error: float
    before: np.ndarray
    after: np.ndarray
    flips: list[Flip]


class Observer:
    """Looks into truncated copies of one network; call it from one thread at a time.

    Args:
        network: The untruncated network.
        data: A data set, of which the validation split is used, one split, or a pair.
    """

    def __init__(self, network: nn.Module, data: Any) -> None:
        """Keep the network; its predictions are made when first needed."""
        self._network, self._data = network, split_or_pair(data)
        self._images, labels = self._data
        self._labels = labels.cpu()
        self._before: tuple[Tensor, int] | None = None

    def details(self, truncated: nn.Module, layer: str) -> Details:
        """Compare the truncated network with the untruncated one."""
        if self._before is None:
            self._before = predictions(self._network, self._data)
        before, classes = self._before
        after, _ = predictions(truncated, self._data)
        layers = cp_layers(truncated)
        with torch.no_grad():
            whole = cp_layers(self._network)[layer].weight
            cut = layers[layer].weight
            pictures = [kernel_picture(each) for each in (whole, cut, whole - cut)]
        return Details(
            layer=layer,
            ranks={name: each.rank for name, each in layers.items()},
            kernels=tuple(picture for picture, _ in pictures),
            extract=pictures[0][1],
            error=relative_error(whole, cut).item(),
            before=class_accuracy(before, self._labels, classes),
            after=class_accuracy(after, self._labels, classes),
            flips=flips(before, after, self._labels),
        )

    def strip(self, details: Details) -> list[np.ndarray]:
        """Pictures of the first flipped images, empty for data that is no images."""
        numbers = [flip.number for flip in details.flips[:STRIP]]
        images = [image_picture(self._images[number]) for number in numbers]
        return [image for image in images if image is not None]


def predictions(
    model: nn.Module, data: Split | tuple[Tensor, Tensor], batch_size: int = 1000
) -> tuple[Tensor, int]:
    """Class with the largest score for every image, as :func:`accuracy` counts it.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``.
        data: A split or a pair ``(images, labels)``.
        batch_size: Images per forward pass.

    Returns:
        Class numbers on the CPU, shape ``(n,)``, and the number of classes.
    """
    images, labels = data
    device, dtype = placement(model, images)
    found = []
    with evaluation_mode(model), torch.no_grad():
        for batch in images.split(batch_size):
            batch = batch.to(device)
            if isinstance(data, Split):
                batch = standardize(batch, data.mean, data.std, dtype)
            scores = model(batch.to(dtype))
            check_scores(scores, len(batch), int(labels.max()))
            found.append(scores.argmax(1).cpu())
    return torch.cat(found), scores.shape[1]


def class_accuracy(predicted: Tensor, labels: Tensor, classes: int) -> np.ndarray:
    """Share of the images of each class that are predicted right.

    Args:
        predicted: Class numbers. Shape ``(n,)``.
        labels: True class numbers. Shape ``(n,)``.
        classes: Number of classes.

    Returns:
        From 0 to 1, NaN for a class without images. Shape ``(classes,)``.

    >>> class_accuracy(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 3)
    array([0.5, 1. , nan])
    """
    right = labels[predicted == labels].bincount(minlength=classes).double()
    return (right / labels.bincount(minlength=classes)).numpy()


def flips(before: Tensor, after: Tensor, labels: Tensor) -> list[Flip]:
    """Images that a cut moves from one predicted class to another.

    Args:
        before: Classes that the whole network predicts. Shape ``(n,)``.
        after: Classes that the truncated network predicts. Shape ``(n,)``.
        labels: True classes. Shape ``(n,)``.

    Returns:
        The flips: those that were right first, then by number.
    """
    found = [
        Flip(number, *(int(classes[number]) for classes in (labels, before, after)))
        for number in (before != after).nonzero().flatten().tolist()
    ]
    return sorted(found, key=lambda flip: flip.before != flip.label)


def details_lines(details: Details) -> list[str]:
    """The details in words, as alternative to their picture.

    Args:
        details: What is shown.

    Returns:
        Lines of plain text, not escaped for HTML.
    """
    ranks = ", ".join(f"{label(name)} {rank}" for name, rank in details.ranks.items())
    classes = "; ".join(
        f"{number}: {percentage(before)} → {percentage(after)}"
        for number, (before, after) in enumerate(
            zip(details.before, details.after, strict=True)
        )
        if not math.isnan(before)
    )
    lines = [
        f"Details at ranks {ranks}.",
        f"Kernel of {label(details.layer)}, {details.extract}: original, truncated, "
        f"difference; relative error {decimal(details.error)}.",
        f"Accuracy by class, untruncated → truncated: {classes}.",
        flip_words(details.flips) + ".",
    ]
    if details.flips:
        shown = "; ".join(
            f"image {flip.number}: {flip.label}, {flip.before} → {flip.after}"
            for flip in details.flips[:STRIP]
        )
        lines.append(f"Flipped (true class, prediction before → after): {shown}.")
    return lines


def flip_words(flips: list[Flip]) -> str:
    """How many predictions flip, and for better or worse."""
    lost = sum(flip.before == flip.label for flip in flips)
    gained = sum(flip.after == flip.label for flip in flips)
    what = "prediction flips" if len(flips) == 1 else "predictions flip"
    return f"{len(flips)} {what}: {lost} from right to wrong, {gained} to right"
