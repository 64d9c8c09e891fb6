"""Classifiers with batch norm for 32×32 colour images: ResNet and a small VGG."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from cpnb._checks import check_count
from cpnb.models import initialize_


class ResNet(nn.Module):
    """The residual network for CIFAR of He et al., in three stages of equal blocks.

    The stages have 16, 32 and 64 channels times ``width``; the second and the third
    begin with a stride of 2. Shortcuts have no parameters: where a stage begins they
    take every second pixel and append channels of zeros. Convolutions have no bias,
    batch norm follows each; their weights are drawn as in He et al. 2015.

    Args:
        depth: Number of layers with weights, ``6·blocks + 2``: 20, 32, …
        width: Multiple of the 16, 32 and 64 channels.
        num_classes: Number of classes.
        generator: Source of the initial weights; torch's global one by default.

    Raises:
        TypeError: If an argument is no int.
        ValueError: If ``depth`` is not 8, 14, 20, 26, 32, …, ``width`` is below 1 or
            ``num_classes`` below 2.

    Example:
        >>> [sum(p.numel() for p in ResNet(depth).parameters()) for depth in (20, 32)]
        [269722, 464154]

    Source: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, 2015,
    arXiv:1512.03385, section 4.2, shortcuts of type A.
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 1,
        num_classes: int = 10,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build the layers and draw their weights."""
        super().__init__()
        blocks, rest = divmod(check_count(depth, "depth", least=8) - 2, 6)
        if rest:
            raise ValueError(
                f"depth is {depth}, expected 6·blocks + 2 such as 20 or 32."
            )
        channels = 16 * check_count(width, "width")
        num_classes = check_count(num_classes, "num_classes", least=2)
        self.conv1 = _conv(3, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stage1 = _stage(blocks, channels, channels)
        self.stage2 = _stage(blocks, channels, 2 * channels)
        self.stage3 = _stage(blocks, 2 * channels, 4 * channels)
        self.fc = skip_init(nn.Linear, 4 * channels, num_classes)
        initialize_(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, shape ``(n, classes)``, of images, shape ``(n, 3, 32, 32)``."""
        hidden = F.relu(self.bn1(self.conv1(images)))
        hidden = self.stage3(self.stage2(self.stage1(hidden)))
        return self.fc(F.adaptive_avg_pool2d(hidden, 1).flatten(1))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm beside a shortcut without parameters.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output; if more, height and width are halved.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        """Build the layers, their weights still to be drawn."""
        super().__init__()
        self.appended = channels_out - channels_in
        self.conv1 = _conv(channels_in, channels_out, stride=2 if self.appended else 1)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(n, channels_in, h, w)`` to ``(n, channels_out, h', w')``."""
        branch = F.relu(self.bn1(self.conv1(hidden)))
        branch = self.bn2(self.conv2(branch))
        if self.appended:
            hidden = F.pad(hidden[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.appended))
        return F.relu(branch + hidden)


class VGG(nn.Module):
    """A small VGG with batch norm: 64-64, 128-128 and 256-256 channels, then one layer.

    Convolutions are 3×3 without a bias, a 2×2 pool ends each pair.

    Args:
        num_classes: Number of classes.
        generator: Source of the initial weights; torch's global one by default.

    Raises:
        TypeError: If ``num_classes`` is no int.
        ValueError: If ``num_classes`` is below 2.

    Example:
        >>> sum(parameter.numel() for parameter in VGG().parameters())
        1187274

    Source: Simonyan, Zisserman, Very Deep Convolutional Networks for Large-Scale Image
    Recognition, 2014, arXiv:1409.1556, cut to the size of 32×32 images.
    """

    def __init__(
        self, num_classes: int = 10, *, generator: torch.Generator | None = None
    ) -> None:
        """Build the layers and draw their weights."""
        super().__init__()
        num_classes = check_count(num_classes, "num_classes", least=2)
        layers: list[nn.Module] = []
        before = 3
        for channels in (64, 128, 256):
            for size in (before, channels):
                norm = nn.BatchNorm2d(channels)
                layers += [_conv(size, channels), norm, nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            before = channels
        self.features = nn.Sequential(*layers)
        self.fc = skip_init(nn.Linear, before * 4 * 4, num_classes)
        initialize_(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, shape ``(n, classes)``, of images, shape ``(n, 3, 32, 32)``."""
        return self.fc(self.features(images).flatten(1))


def _stage(blocks: int, channels_in: int, channels_out: int) -> nn.Sequential:
    sizes = [channels_in] + [channels_out] * (blocks - 1)
    return nn.Sequential(*(ResidualBlock(size, channels_out) for size in sizes))


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Module:
    return skip_init(
        nn.Conv2d, channels_in, channels_out, 3, stride=stride, padding=1, bias=False
    )
