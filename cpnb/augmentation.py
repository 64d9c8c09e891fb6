"""Random crop, flip and cut-out of whole batches, without a loop over the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpnb._checks import check_count


@dataclass(frozen=True)
class Augment:
    """Random changes of training images, drawn anew for every image of an epoch.

    The image is padded with zeros (black, for pixels) and cut to its size again at a
    random place, mirrored left to right with probability ½, and a square of it is
    blackened. The square's centre is anywhere in the image, so that part of the square
    may lie outside.

    Attributes:
        crop: Pixels to pad on every side before cropping; 0 crops nothing.
        flip: Whether half of the images are mirrored.
        cutout: Side of the square in pixels; 0 cuts out nothing.

    Raises:
        TypeError: If a size is no int or ``flip`` no bool.
        ValueError: If a size is negative.

    Example:
        >>> image = torch.tensor([[[[1, 2, 3, 4]]]])  # padded: 0 1 2 3 4 0
        >>> draws = torch.tensor([[1, 2, 1, 0, 0]])  # from column 2 on, mirrored
        >>> Augment(crop=1).apply(image, draws)
        tensor([[[[0, 4, 3, 2]]]])

    Source: T. DeVries, G. W. Taylor, Improved Regularization of Convolutional Neural
    Networks with Cutout, 2017, arXiv:1708.04552.
    """

    crop: int = 4
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_count(self.crop, "crop", least=0)
        check_count(self.cutout, "cutout", least=0)
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip is {self.flip!r}, expected True or False.")

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Change every image in its own way.

        Args:
            images: Shape ``(n, channels, height, width)``, any dtype.
            generator: Source of the randomness, of any device.

        Returns:
            New images. Shape and dtype as ``images``.

        Raises:
            ValueError: If ``images`` has another number of axes.
        """
        return self.apply(images, self.draw(len(images), images.shape, generator))

    def draw(
        self, count: int, shape: torch.Size, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw what happens to each of ``count`` images.

        Args:
            count: Number of images.
            shape: Of the images; the last two entries are height and width.
            generator: Source of the randomness; decides the device.

        Returns:
            Row and column where the crop starts in the padded image, whether it is
            mirrored, row and column of the centre of the cut-out; int32. Shape
            ``(count, 5)``.

        Raises:
            ValueError: If ``shape`` has not four axes.
        """
        if len(shape) != 4:
            raise ValueError(
                f"images have shape {tuple(shape)}, expected (n, channels, height, "
                "width) to augment. Pass augment=None for anything but images."
            )
        device = generator.device if generator is not None else None
        options = {"generator": generator, "device": device, "dtype": torch.int32}
        places = 2 * self.crop + 1
        limits = (places, places, 1 + self.flip, shape[-2], shape[-1])
        return torch.stack(
            [torch.randint(limit, (count,), **options) for limit in limits], 1
        )

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change the images as :meth:`draw` decided.

        Args:
            images: Shape ``(n, channels, height, width)``, any dtype.
            draws: Shape ``(n, 5)``.

        Returns:
            New images, their channels innermost. Shape and dtype as ``images``.
        """
        height, width = images.shape[-2:]
        top, left, mirrored, y, x = draws.to(images.device).long().T[..., None]
        down = torch.arange(height, device=images.device)
        across = torch.arange(width, device=images.device)
        rows = top - self.crop + down
        columns = torch.where(mirrored == 1, width - 1 - across, across)
        columns = left - self.crop + columns
        kept = _cross(_within(rows, 0, height), _within(columns, 0, width))
        if self.cutout:
            half = self.cutout // 2
            kept &= ~_cross(
                _within(down, y - half, self.cutout),
                _within(across, x - half, self.cutout),
            )
        number = torch.arange(len(images), device=images.device)[:, None, None]
        rows = rows.clamp(0, height - 1)[:, :, None]
        columns = columns.clamp(0, width - 1)[:, None, :]
        # With a slice between the indices torch puts the channels last.
        picked = images[number, :, rows, columns]
        return (picked * kept[..., None]).movedim(-1, 1)


def _within(values: Tensor, start: int | Tensor, size: int) -> Tensor:
    return (values >= start) & (values < start + size)


def _cross(rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels whose row and whose column are marked. Shape ``(n, height, width)``."""
    return rows[:, :, None] & columns[:, None, :]
