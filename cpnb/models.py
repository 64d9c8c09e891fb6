"""Classifiers of plain torch layers, to be normalised or converted from outside."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from cpnb._checks import check_count


class DigitsNet(nn.Module):
    """Small convolutional network for 8×8 images: ``conv1, conv2, fc1, fc2``.

    Args:
        num_classes: Number of classes.
        generator: Source of the initial weights; torch's global one by default.

    Raises:
        TypeError: If ``num_classes`` is no int.
        ValueError: If ``num_classes`` is below 2.

    Example:
        >>> DigitsNet()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self, num_classes: int = 10, *, generator: torch.Generator | None = None
    ) -> None:
        """Build the layers and draw their weights."""
        super().__init__()
        num_classes = check_count(num_classes, "num_classes", least=2)
        self.conv1 = skip_init(nn.Conv2d, 1, 16, 3, padding=1)
        self.conv2 = skip_init(nn.Conv2d, 16, 32, 3, padding=1)
        self.fc1 = skip_init(nn.Linear, 32 * 4 * 4, 64)
        self.fc2 = skip_init(nn.Linear, 64, num_classes)
        initialize_(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, shape ``(n, classes)``, of images, shape ``(n, 1, 8, 8)``."""
        hidden = F.relu(self.conv1(images))
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        hidden = F.relu(self.fc1(hidden.flatten(1)))
        return self.fc2(hidden)


class LeNet(nn.Module):
    """The network that the paper calls LeNet, for 28×28 images such as MNIST.

    1,199,882 parameters with ten classes.

    Args:
        num_classes: Number of classes.
        generator: Source of the initial weights; torch's global one by default.

    Raises:
        TypeError: If ``num_classes`` is no int.
        ValueError: If ``num_classes`` is below 2.

    Example:
        >>> sum(parameter.numel() for parameter in LeNet().parameters())
        1199882

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509, and its public code.
    """

    def __init__(
        self, num_classes: int = 10, *, generator: torch.Generator | None = None
    ) -> None:
        """Build the layers and draw their weights."""
        super().__init__()
        num_classes = check_count(num_classes, "num_classes", least=2)
        self.conv1 = skip_init(nn.Conv2d, 1, 32, 3)
        self.conv2 = skip_init(nn.Conv2d, 32, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = skip_init(nn.Linear, 64 * 12 * 12, 128)
        self.dropout2 = nn.Dropout(0.5)
        self.fc2 = skip_init(nn.Linear, 128, num_classes)
        initialize_(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, shape ``(n, classes)``, of images, shape ``(n, 1, 28, 28)``."""
        hidden = F.relu(self.conv1(images))
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        hidden = self.dropout1(hidden).flatten(1)
        hidden = self.dropout2(F.relu(self.fc1(hidden)))
        return self.fc2(hidden)


class AlexNet(nn.Module):
    """The network that the paper calls AlexNet, for 32×32 colour images such as CIFAR.

    6,976,842 parameters with ten classes; no batch norm.

    Args:
        num_classes: Number of classes.
        generator: Source of the initial weights; torch's global one by default.

    Raises:
        TypeError: If ``num_classes`` is no int.
        ValueError: If ``num_classes`` is below 2.

    Example:
        >>> sum(parameter.numel() for parameter in AlexNet().parameters())
        6976842

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509, and its public code.
    """

    def __init__(
        self, num_classes: int = 10, *, generator: torch.Generator | None = None
    ) -> None:
        """Build the layers and draw their weights."""
        super().__init__()
        num_classes = check_count(num_classes, "num_classes", least=2)
        self.conv1 = skip_init(nn.Conv2d, 3, 64, 3, padding=2)
        self.conv2 = skip_init(nn.Conv2d, 64, 192, 3, padding=1)
        self.conv3 = skip_init(nn.Conv2d, 192, 384, 3, padding=1)
        self.conv4 = skip_init(nn.Conv2d, 384, 256, 3, padding=1)
        self.conv5 = skip_init(nn.Conv2d, 256, 256, 3, padding=1)
        self.dropout1 = nn.Dropout(0.5)
        self.fc1 = skip_init(nn.Linear, 256 * 4 * 4, 1024)
        self.dropout2 = nn.Dropout(0.5)
        self.fc2 = skip_init(nn.Linear, 1024, 512)
        self.fc3 = skip_init(nn.Linear, 512, num_classes)
        initialize_(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, shape ``(n, classes)``, of images, shape ``(n, 3, 32, 32)``."""
        hidden = F.max_pool2d(F.relu(self.conv1(images)), 2)  # 34×34 to 17×17
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)  # 8×8
        hidden = F.relu(self.conv4(F.relu(self.conv3(hidden))))
        hidden = F.max_pool2d(F.relu(self.conv5(hidden)), 2)  # 4×4
        hidden = F.relu(self.fc1(self.dropout1(hidden.flatten(1))))
        hidden = F.relu(self.fc2(self.dropout2(hidden)))
        return self.fc3(hidden)


def initialize_(model: nn.Module, generator: torch.Generator | None) -> None:
    """Draw what torch's layers draw by default, but from ``generator``.

    The layers come from ``skip_init``, which draws nothing, so that a given generator
    leaves torch's global one untouched. A convolution without a bias stands before
    batch norm, and gets He's normal weights instead, as in the papers of such networks.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is None:
            nn.init.kaiming_normal_(
                layer.weight, nonlinearity="relu", generator=generator
            )
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, math.sqrt(5), generator=generator)
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
