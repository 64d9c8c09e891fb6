"""Classifiers of plain torch layers; LeNet as in arXiv:2206.01509."""

from __future__ import annotations

import math

from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.nn.utils import skip_init


class DigitsNet(nn.Module):
    """Small convolutional network for 8×8 images: ``conv1, conv2, fc1, fc2``.

    Args:
        num_classes: Number of classes.
        generator: Source of the initial weights; torch's global one by default.
    """

    def __init__(self, num_classes: int = 10, *, generator: Generator | None = None):
        super().__init__()
        self.conv1 = skip_init(nn.Conv2d, 1, 16, 3, padding=1)
        self.conv2 = skip_init(nn.Conv2d, 16, 32, 3, padding=1)
        self.fc1 = skip_init(nn.Linear, 32 * 4 * 4, 64)
        self.fc2 = skip_init(nn.Linear, 64, num_classes)
        initialize(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, shape ``(n, classes)``, of images, shape ``(n, 1, 8, 8)``."""
        hidden = F.relu(self.conv1(images))
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        return self.fc2(F.relu(self.fc1(hidden.flatten(1))))


class LeNet(nn.Module):
    """LeNet of the paper, 1,199,882 parameters for 28×28 images; see `DigitsNet`."""

    def __init__(self, num_classes: int = 10, *, generator: Generator | None = None):
        super().__init__()
        self.conv1 = skip_init(nn.Conv2d, 1, 32, 3)
        self.conv2 = skip_init(nn.Conv2d, 32, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = skip_init(nn.Linear, 64 * 12 * 12, 128)
        self.dropout2 = nn.Dropout(0.5)
        self.fc2 = skip_init(nn.Linear, 128, num_classes)
        initialize(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, shape ``(n, classes)``, of images, shape ``(n, 1, 28, 28)``."""
        hidden = F.relu(self.conv1(images))
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        hidden = self.dropout1(hidden).flatten(1)
        return self.fc2(self.dropout2(F.relu(self.fc1(hidden))))


def initialize(model: nn.Module, generator: Generator | None) -> None:
    """Draw torch's default weights, He's before batch norm, from this generator."""
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if layer.bias is None:
            init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        else:
            init.kaiming_uniform_(layer.weight, math.sqrt(5), generator=generator)
            bound = 1 / math.sqrt(layer.weight[0].numel())
            init.uniform_(layer.bias, -bound, bound, generator=generator)
