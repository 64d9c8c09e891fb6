"""Labelled pixels in splits, and what turns them into what a network reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_PART = 1000  # images that are standardised at a time


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """One split, as pixels; unpacks into ``images, labels``.

    Functions that take data standardise a split on the way.

    Attributes:
        images: Pixels, uint8. Shape ``(n, channels, height, width)``.
        labels: Class numbers. Shape ``(n,)``.
        mean: Mean pixel of each channel over the training split.
        std: Standard deviation of the same pixels.

    Raises:
        TypeError: If the images are no uint8 tensor.
        ValueError: If a shape does not fit, or a standard deviation is not positive.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        if self.images.dtype != torch.uint8:
            raise TypeError(
                f"images have dtype {self.images.dtype}, expected torch.uint8: a split "
                "holds pixels. Pass standardised images as a pair (images, labels)."
            )
        if self.images.ndim != 4 or len(self.images) != len(self.labels):
            raise ValueError(
                f"images have shape {tuple(self.images.shape)}, expected "
                f"({len(self.labels)}, channels, height, width) from the labels."
            )
        channels = self.images.shape[1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(
                    f"{name} has {len(values)} entries, expected {channels}, one per "
                    "channel."
                )
        if not min(self.std) > 0:
            raise ValueError(
                f"std is {self.std}, expected positive numbers. A channel of one value "
                "cannot be standardised."
            )

    def __iter__(self) -> Iterator[Tensor]:
        """The images, then the labels."""
        return iter((self.images, self.labels))

    def standardized(self, dtype: torch.dtype | None = None) -> Tensor:
        """Images with mean 0 and standard deviation 1 over the training split.

        Args:
            dtype: A floating dtype; float32 by default.

        Returns:
            The images on their device. Shape ``(n, channels, height, width)``.

        Raises:
            TypeError: If ``dtype`` is no floating dtype.
        """
        dtype = dtype or torch.float32
        images = torch.empty(self.images.shape, dtype=dtype, device=self.images.device)
        # In parts, because the intermediate numbers take eight times the pixels' room.
        for part, pixels in zip(
            images.split(_PART), self.images.split(_PART), strict=True
        ):
            part.copy_(standardize(pixels, self.mean, self.std, dtype))
        return images

    def to(self, device: torch.device | str | None) -> Split:
        """Copy with images and labels on ``device``."""
        images, labels = (tensor.to(device) for tensor in self)
        return replace(self, images=images, labels=labels)

    def __repr__(self) -> str:
        """Number and shape of the images instead of their pixels."""
        shape = "×".join(map(str, self.images.shape[1:]))
        return f"Split({len(self.labels)} images {shape})"


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images in a train, a validation and a test split.

    Attributes:
        name: Name under which :func:`load_data` knows the set.
        train: Images ``(n, channels, height, width)`` and labels ``(n,)``.
        validation: For choices made while training, and for rank sweeps.
        test: For the last number only; no function reads it unless it is passed.
        classes: Name of each class, in the order of the labels.
        licence: Licence and source of the images.
        seed: Seed of the split.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    licence: str
    seed: int

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean pixel of each channel over the training split."""
        return self.train.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel's pixels over the training split."""
        return self.train.std

    def to(self, device: torch.device | str | None) -> Dataset:
        """Copy with all images and labels on ``device``."""
        splits = {
            name: getattr(self, name).to(device)
            for name in ("train", "validation", "test")
        }
        return replace(self, **splits)

    def __repr__(self) -> str:
        """Name, image shape, classes and the size of each split."""
        shape = "×".join(map(str, self.train.images.shape[1:]))
        sizes = ", ".join(
            f"{name} {len(getattr(self, name).labels)}"
            for name in ("train", "validation", "test")
        )
        return (
            f"Dataset({self.name!r}: {shape} images, {len(self.classes)} classes; "
            f"{sizes}; seed {self.seed})"
        )


def standardize(
    images: Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Shift and scale pixels, each channel by its own numbers.

    Computed in float64 and rounded once, so that a pixel becomes the same number
    wherever it is standardised.

    Args:
        images: Pixels. Shape ``(..., channels, height, width)``.
        mean: Subtracted from each channel. Float64 tensors on the images' device spare
            a copy to it. Shape ``(channels,)``.
        std: Then divided by. Shape ``(channels,)``.
        dtype: Floating dtype of the result.

    Returns:
        ``(images − mean) / std``. Shape as ``images``.

    Raises:
        TypeError: If ``dtype`` is no floating dtype.

    >>> standardize(torch.tensor([[[0, 8, 16]]], dtype=torch.uint8), [8], [4])
    tensor([[[-2.,  0.,  2.]]])
    """
    if not dtype.is_floating_point:
        raise TypeError(
            f"dtype is {dtype}, expected a floating dtype such as torch.float32: "
            "standardised pixels are not whole numbers."
        )
    shift, scale = (
        torch.as_tensor(values, dtype=torch.float64, device=images.device)[
            :, None, None
        ]
        for values in (mean, std)
    )
    return images.double().sub_(shift).div_(scale).to(dtype)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, from exact counts of its pixels."""
    means, deviations = [], []
    values = torch.arange(256, dtype=torch.float64)
    for channel in images.unbind(1):
        counts = channel.flatten().bincount(minlength=256).double()
        mean = (counts @ values) / counts.sum()
        variance = (counts @ (values - mean).square()) / counts.sum()
        means.append(mean.item())
        deviations.append(variance.sqrt().item())
    return tuple(means), tuple(deviations)
