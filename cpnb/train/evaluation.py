"""Measure a classifier on labelled images, and tell two methods apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

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
            ``data.test``; or a pair of tensors, images ``(n, ...)``, scaled, or tokens,
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


@contextmanager
def every_layer() -> Iterator[None]:
    """Run without torch's fast path for transformers, which passes by their layers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def moved(model: nn.Module, images: Tensor) -> Tensor:
    """Images where a model is and in its dtype; tokens stay whole numbers."""
    device, dtype = placement(model, images)
    return standardize(images.to(device), None, None, dtype)


def check_scores(scores: Tensor, rows: int, classes: int) -> None:
    """Refuse scores without a column for each class: on CUDA that ends the process."""
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"model returned a {type(scores).__name__}, expected one tensor of scores "
            f"({rows}, n). Wrap it in a module that returns the scores to train on."
        )
    if scores.ndim != 2 or len(scores) != rows or scores.shape[1] < classes:
        raise ValueError(
            f"model returned scores of shape {tuple(scores.shape)}, expected ({rows}, "
            f"n) with n >= {classes}, as the labels go up to {classes - 1}."
        )


class Difference(NamedTuple):
    """Mean of ``n`` paired differences; its 95 % interval is ``mean ± half``."""

    mean: float
    half: float
    n: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        """In words, as ``+2.00 ± 2.48, n = 3, not told apart``."""
        words = "told apart" if self.told_apart else "not told apart"
        return f"{self.mean:+.2f} ± {self.half:.2f}, n = {self.n}, {words}"


def paired_difference(values: Any, reference: Any) -> Difference:
    """How far two methods are apart, seed by seed: Student's t, 95 %.

    Args:
        values: Numbers by seed: a series, or a sequence. Shape ``(n,)``.
        reference: The same of the other method; a seed that lacks either is left out.

    >>> paired_difference([3.0, 4.0, 6.0], [2.0, 2.0, 3.0])
    Difference(mean=2.0, half=2.484..., n=3)
    """
    import pandas as pd
    from scipy.stats import t as student

    differences = (pd.Series(values) - pd.Series(reference)).dropna().astype(float)
    n = len(differences)
    half = student.ppf(0.975, n - 1) * differences.std() / math.sqrt(n)
    return Difference(float(differences.mean()), float(half), n)
