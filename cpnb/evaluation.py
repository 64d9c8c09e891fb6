"""Measure a classifier: mean loss and accuracy on labelled images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpnb._checks import check_count, check_module
from cpnb._data.splits import Split, standardize

SPLITS = ("train", "validation", "test")
# On a CPU a small batch runs twice as fast: what a layer makes of it fits a cache.
_CPU_BATCH, _BATCH = 100, 1000


def images_and_labels(data: Any, split: str = "validation") -> tuple[Tensor, Tensor]:
    """Read images and labels from a data set or from a plain pair, and check them.

    Args:
        data: A data set with the attributes ``train``, ``validation`` and ``test``,
            each a split or a pair; or one split; or one pair ``(images, labels)`` of
            tensors. Images of a pair have shape ``(n, ...)`` and a floating dtype,
            labels have shape ``(n,)``.
        split: The split taken from a data set. A split or pair is returned whatever
            ``split`` says.

    Returns:
        The images, shape ``(n, ...)``, those of a split standardised in float32, those
        of a pair not copied; and the labels, shape ``(n,)``.

    Raises:
        TypeError: If ``data`` is neither, or holds the wrong kind of tensor.
        ValueError: If ``split`` is unknown, the lengths differ, a shape is wrong,
            there are no images, or a label is negative.

    Example:
        >>> images, labels = images_and_labels((torch.zeros(3, 8), torch.arange(3)))
        >>> images.shape, labels.tolist()
        (torch.Size([3, 8]), [0, 1, 2])
    """
    given = split_or_pair(data, split)
    if isinstance(given, Split):
        return given.standardized(), given.labels
    return given


def split_or_pair(
    data: Any, split: str = "validation"
) -> Split | tuple[Tensor, Tensor]:
    """Read a split, still as pixels, or a plain pair; see :func:`images_and_labels`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}.")
    given = data
    if all(hasattr(data, name) for name in SPLITS):
        given = getattr(data, split)
    if isinstance(given, Split):
        _check_labels(given.labels)
        return given
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        size = f" of length {len(given)}" if isinstance(given, (tuple, list)) else ""
        raise TypeError(
            f"data is a {type(given).__name__}{size}, expected a data set with train, "
            "validation and test, one of these, or a pair (images, labels) of tensors. "
            'Start with load_data("digits").'
        )
    images, labels = given
    _check_pair(images, labels)
    return images, labels


def accuracy(model: nn.Module, data: Any, *, batch_size: int | None = None) -> float:
    """Share of images whose largest score is the right class.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``.
        data: A data set, of which the validation split is used, or one split, or a
            pair ``(images, labels)``. Pass ``data.test`` to touch the test split.
        batch_size: Images per forward pass, by device if None; changes no result.

    Returns:
        A number from 0 to 1.

    Raises:
        TypeError, ValueError: As :func:`evaluate`.
    """
    return evaluate(model, data, batch_size=batch_size)["accuracy"]


def evaluate(
    model: nn.Module, data: Any, *, batch_size: int | None = None
) -> dict[str, float]:
    """Mean cross entropy and accuracy of a model, without gradients.

    The model runs in evaluation mode; each submodule's ``training`` flag is put back
    afterwards, also after an error. Batches go to the model's device and dtype.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``.
        data: A data set, of which the validation split is used, or one split, or a
            pair ``(images, labels)``. Pass ``data.test`` to touch the test split.
        batch_size: Images per forward pass, by device if None; changes no result.

    Returns:
        ``{"loss": mean cross entropy in nats, "accuracy": from 0 to 1}``.

    Raises:
        TypeError: If ``model``, ``data`` or ``batch_size`` has the wrong type.
        ValueError: If ``data`` is malformed, ``batch_size`` is below 1, or the scores
            do not fit the labels.

    Example:
        >>> pair = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
        >>> evaluate(nn.Identity(), pair)["accuracy"]
        0.5
    """
    check_module(model)
    given = split_or_pair(data)
    images, labels = given
    device, dtype = placement(model, images)
    if batch_size is None:
        batch_size = _CPU_BATCH if device.type == "cpu" else _BATCH
    batch_size = check_count(batch_size, "batch_size")
    largest, loss, correct = int(labels.max()), 0.0, 0
    # no_grad, not inference_mode: a tensor that a layer caches here must stay usable
    # in a later training step.
    with evaluation_mode(model), torch.no_grad():
        for batch, target in zip(
            images.split(batch_size), labels.split(batch_size), strict=True
        ):
            # In a copy, as a network may change what it is given.
            batch = batch.to(device, copy=True)
            if isinstance(given, Split):
                batch = standardize(batch, given.mean, given.std, dtype)
            scores = model(batch.to(dtype))
            target = target.to(device, torch.long)
            check_scores(scores, len(target), largest)
            loss += F.cross_entropy(scores.double(), target, reduction="sum").item()
            correct += int((scores.argmax(1) == target).sum())
    return {"loss": loss / len(labels), "accuracy": correct / len(labels)}


@contextmanager
def preserved_flags(model: nn.Module) -> Iterator[nn.Module]:
    """On exit give every submodule the ``training`` flag that it had on entry.

    Unlike a closing ``model.train()`` this keeps frozen submodules frozen.
    """
    flags = {module: module.training for module in model.modules()}
    try:
        yield model
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Run the block in evaluation mode, see :func:`preserved_flags`."""
    with preserved_flags(model):
        yield model.eval()


def placement(model: nn.Module, images: Tensor) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the model, or of the images when it holds no float tensor.

    Pixels count as float32, in which they are standardised.
    """
    tensors = chain(model.parameters(), model.buffers())
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), images)
    return first.device, first.dtype if first.is_floating_point() else torch.float32


def place(
    given: Split | tuple[Tensor, Tensor], model: nn.Module, *, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Copy a pair to the model's device and dtype, images with colours innermost.

    Those of a split are standardised on the way.
    """
    images, labels = given
    device, dtype = placement(model, images)
    if isinstance(given, Split):
        images = given.to(device).standardized(dtype)
    images, labels = images.to(device, dtype), labels.to(device, torch.long)
    return innermost(images) if channels_last else images, labels


def innermost(images: Tensor) -> Tensor:
    """Copy images of shape ``(n, c, h, w)`` with the colours innermost, others not."""
    if images.ndim != 4:
        return images
    # Cloned, because torch leaves one-channel images as they are when asked for
    # memory_format=channels_last, and a convolution then computes channels first.
    moved = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    return moved.permute(0, 3, 1, 2)


def check_scores(scores: Tensor, rows: int, largest: int) -> None:
    """Refuse scores without one row per image and a column up to class ``largest``."""
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"model returned a {type(scores).__name__}, expected a tensor of scores "
            "with shape (n, classes)."
        )
    if scores.ndim != 2 or len(scores) != rows:
        raise ValueError(
            f"model returned scores of shape {tuple(scores.shape)}, expected "
            f"({rows}, classes): one row per image."
        )
    # On CUDA an unknown class would abort the process, so it is looked for first.
    if largest >= scores.shape[1]:
        raise ValueError(
            f"labels contain class {largest}, but the model scores {scores.shape[1]} "
            f"classes (0 to {scores.shape[1] - 1}). Build it with at least "
            f"{largest + 1} classes."
        )


def _check_pair(images: Tensor, labels: Tensor) -> None:
    for name, tensor in (("images", images), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} is a {type(tensor).__name__}, expected a torch.Tensor. "
                "Convert it with torch.as_tensor."
            )
    if not images.is_floating_point():
        raise TypeError(
            f"images have dtype {images.dtype}, expected a floating dtype. Convert "
            "and scale them first, for example images.float() / 255."
        )
    _check_labels(labels)
    if images.ndim < 2 or len(images) != len(labels):
        raise ValueError(
            f"images have shape {tuple(images.shape)}, expected ({len(labels)}, ...) "
            f"from the {len(labels)} labels."
        )


def _check_labels(labels: Tensor) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels have dtype {labels.dtype}, expected integer class numbers."
        )
    if labels.ndim != 1:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, expected (n,): one class number "
            "per image, not one-hot rows."
        )
    if not len(labels):
        raise ValueError("data holds no images, expected at least one.")
    if (smallest := int(labels.min())) < 0:
        raise ValueError(
            f"labels contain {smallest}, expected class numbers from 0 upward."
        )
