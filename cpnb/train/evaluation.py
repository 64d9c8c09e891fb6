"""Measure a classifier: mean loss and accuracy on labelled images."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpnb.layers import evaluation_mode
from cpnb.train.data import Split, as_split, standardize

# On a CPU a small batch runs twice as fast: what a layer makes of it fits a cache.
_CPU_BATCH = 100
_BATCH = 1000


def images_and_labels(data: Any, split: str = "validation") -> tuple[Tensor, Tensor]:
    """Read images, as a network takes them, and labels, from what `evaluate` takes.

    Of a data set that ``split`` is read; pixels are standardised in float32.
    """
    chosen = as_split(data, split)
    is_pixels = chosen.mean is not None
    return chosen.standardized() if is_pixels else chosen.images, chosen.labels


def accuracy(model: nn.Module, data: Any, *, batch_size: int | None = None) -> float:
    """Share of images scored highest in their class, from 0 to 1; see `evaluate`."""
    return evaluate(model, data, batch_size=batch_size)["accuracy"]


def evaluate(
    model: nn.Module, data: Any, *, batch_size: int | None = None
) -> dict[str, float]:
    """Mean cross entropy and accuracy of a model in evaluation mode.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``.
        data: A data set, of which the validation split is used; one split, such as
            ``data.test``; or a pair of tensors, images ``(n, ...)`` in a floating dtype
            and labels ``(n,)``.
        batch_size: Images per forward pass, by device if None; changes no result.

    Returns:
        ``{"loss": mean cross entropy in nats, "accuracy": from 0 to 1}``.

    Raises:
        ValueError: If scores are NaN, which are not a class.

    >>> pair = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
    >>> evaluate(nn.Identity(), pair)["accuracy"]
    0.5
    """
    split = as_split(data)
    loss, correct, broken = measure(model, split, batch_size)
    if broken:
        raise ValueError(
            f"model gives NaN scores for {broken} of {len(split.labels)} images, "
            "expected numbers. Look for NaN in its parameters; if its training "
            "diverged, build it anew and train it at a smaller lr."
        )
    return {"loss": loss, "accuracy": correct / len(split.labels)}


def measure(
    model: nn.Module, split: Split, batch_size: int | None = None
) -> tuple[float, int, int]:
    """Mean loss, right answers, and number of images whose scores hold NaN."""
    device, dtype = placement(model, split.images)
    size = batch_size or (_CPU_BATCH if device.type == "cpu" else _BATCH)
    classes = int(split.labels.max()) + 1
    loss = 0.0
    correct = 0
    broken = 0
    # no_grad, not inference_mode: what a layer keeps here must stay usable in training.
    with evaluation_mode(model), torch.no_grad():
        for images, labels in zip(*(part.split(size) for part in split), strict=True):
            copy = images.to(device, copy=True)  # which a network may change
            scores = model(standardize(copy, split.mean, split.std, dtype))
            labels = labels.to(device, torch.long)
            check_scores(scores, len(labels), classes)
            loss += F.cross_entropy(scores.double(), labels, reduction="sum").item()
            correct += int((scores.argmax(1) == labels).sum())
            broken += int(scores.isnan().any(1).sum())
    return loss / len(split.labels), correct, broken


def placement(model: nn.Module, images: Tensor) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the model, else of the images, where pixels are float32."""
    tensors = chain(model.parameters(), model.buffers())
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), images)
    return first.device, first.dtype if first.is_floating_point() else torch.float32


def check_scores(scores: Tensor, rows: int, classes: int) -> None:
    """Refuse scores without a column for each class: on CUDA that ends the process."""
    if scores.ndim != 2 or len(scores) != rows or scores.shape[1] < classes:
        raise ValueError(
            f"model returned scores of shape {tuple(scores.shape)}, expected ({rows}, "
            f"n) with n >= {classes}, as the labels go up to {classes - 1}."
        )
