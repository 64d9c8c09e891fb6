"""What a step of a training reads: random batches, augmented and standardised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpnb.convolution import innermost
from cpnb.layers import evaluation_mode
from cpnb.train.data import Split, standardize
from cpnb.train.evaluation import check_scores, placement

_NOISE = 0x2545F491  # keeps the two streams of a seed apart: order and augmentation


@dataclass(frozen=True)
class Augment:
    """Random changes of training images, drawn anew for every image of an epoch.

    Attributes:
        crop: Pixels of zeros to pad on every side, before the old size is cut out.
        flip: Whether half of the images are mirrored left to right.
        cutout: Side in pixels of a square of zeros, centred anywhere, arXiv:1708.04552.

    >>> image = torch.tensor([[[[1, 2, 3, 4]]]])  # padded: 0 1 2 3 4 0
    >>> draws = torch.tensor([[1, 2, 1, 0, 0]])  # from column 2 on, mirrored
    >>> Augment(crop=1).apply(image, draws)
    tensor([[[[0, 4, 3, 2]]]])
    """

    crop: int = 4
    flip: bool = True
    cutout: int = 0

    def draw(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the changes of images ``(n, channels, height, width)``.

        Returns the row and column where the crop starts in the padded image, whether it
        is mirrored, row and column of the cut-out's centre. Shape ``(n, 5)``.
        """
        places = 2 * self.crop + 1
        ends = (places, places, 1 + self.flip, *images.shape[-2:])
        draws = [torch.randint(n, images.shape[:1], generator=generator) for n in ends]
        return torch.stack(draws, 1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change images as they were drawn; the new ones have channels innermost."""
        top, left, mirrored, y, x = draws.to(images.device).T[..., None, None]
        number = torch.arange(len(images), device=images.device)[:, None, None]
        down = torch.arange(images.shape[2], device=images.device)[:, None]
        across = torch.arange(images.shape[3], device=images.device)
        columns = left + torch.where(mirrored == 1, across.flip(0), across)
        # With a slice between the indices torch puts the channels last.
        picked = F.pad(images, (self.crop,) * 4)[number, :, top + down, columns]
        if self.cutout:
            is_row = (down - y + self.cutout // 2) // self.cutout == 0
            is_column = (across - x + self.cutout // 2) // self.cutout == 0
            picked[is_row & is_column] = 0
        return picked.movedim(-1, 1)


class Batches:
    """Training images on the model's device, handed out in the seed's random order.

    Channels lie innermost, which convolution and pooling run faster on, unless the
    network fails on it, as one that calls ``view`` does. A single image left over joins
    the batch before. A misfit of network and data shows in ``__init__``.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Split,
        held_out: Split | None,
        batch_size: int,
        seed: int,
        augment: Augment | None,
    ) -> None:
        device, self._dtype = placement(model, train.images)
        self._images = innermost(train.images.to(device))
        self.labels = train.labels.to(device, torch.long)
        self._mean, self._std = (  # on the device once, as every batch needs them
            None if v is None else torch.tensor(v, dtype=torch.float64, device=device)
            for v in (train.mean, train.std)
        )
        starts = [0, *range(batch_size, len(self.labels) - 1, batch_size)]
        self._parts = list(map(slice, starts, [*starts[1:], None]))
        self._order = torch.Generator().manual_seed(seed)
        self._noise = torch.Generator().manual_seed(seed ^ _NOISE)
        self._augment = augment
        self._is_innermost = True
        self.held_out = None
        with evaluation_mode(model), torch.no_grad():
            try:
                model(self._ready(self._images[:1]))
            except RuntimeError:
                self._is_innermost = False
            scores = model(self._ready(self._images[:1]))
            check_scores(scores, 1, int(self.labels.max()) + 1)
            if held_out is not None:
                images = held_out.to(device).standardized(self._dtype)
                images = innermost(images) if self._is_innermost else images
                self.held_out = Split(images, held_out.labels.to(device))
                check_scores(model(images[:1]), 1, int(held_out.labels.max()) + 1)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self._parts)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of each batch of one epoch, in a new random order."""
        order = torch.randperm(len(self.labels), generator=self._order)
        order = order.to(self.labels.device)
        # Version 0.1 drew two numbers per batch here: a seed still gives the same.
        shape = (len(self), 2)
        torch.randint(-(2**31), 2**31, shape, generator=self._noise, dtype=torch.int32)
        draws = torch.empty(0)
        if self._augment is not None:
            draws = self._augment.draw(self._images, self._noise).to(order.device)
        for part in self._parts:
            images = self._images[order[part]]
            if self._augment is not None:
                images = self._augment.apply(images, draws[part])
            yield self._ready(images), self.labels[order[part]]

    def _ready(self, images: Tensor) -> Tensor:
        # Flat first, as contiguous() leaves one channel innermost.
        images = images if self._is_innermost else images.flatten().view(images.shape)
        return standardize(images, self._mean, self._std, self._dtype)
