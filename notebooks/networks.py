"""Networks that only the long experiments train; AlexNet as in arXiv:2206.01509."""

from __future__ import annotations

from functools import partial

from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from cpnb.train.models import initialize

# Before batch norm, which has the bias.
_conv = partial(skip_init, nn.Conv2d, kernel_size=3, padding=1, bias=False)


class AlexNet(nn.Module):
    """AlexNet of the paper, 6,976,842 parameters, 32×32 colours; as `DigitsNet`."""

    def __init__(self, num_classes: int = 10, *, generator: Generator | None = None):
        super().__init__()
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
        initialize(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, shape ``(n, classes)``, of images, shape ``(n, 3, 32, 32)``."""
        hidden = F.max_pool2d(F.relu(self.conv1(images)), 2)  # 34×34 to 17×17
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)  # 8×8
        hidden = F.relu(self.conv4(F.relu(self.conv3(hidden))))
        hidden = F.max_pool2d(F.relu(self.conv5(hidden)), 2)  # 4×4
        hidden = F.relu(self.fc1(self.dropout1(hidden.flatten(1))))
        return self.fc3(F.relu(self.fc2(self.dropout2(hidden))))


class LeNet5(nn.Sequential):
    """LeNet-5 with ReLU and max pooling, 61,706 parameters, 28×28 images.

    Arguments are as in `cpnb.DigitsNet`. Source: LeCun, Bottou, Bengio, Haffner 1998,
    doi:10.1109/5.726791.
    """

    def __init__(self, num_classes: int = 10, *, generator: Generator | None = None):
        pool, relu = partial(nn.MaxPool2d, 2), nn.ReLU
        super().__init__(
            *(skip_init(nn.Conv2d, 1, 6, 5, padding=2), relu(), pool()),
            *(skip_init(nn.Conv2d, 6, 16, 5), relu(), pool(), nn.Flatten()),
            *(skip_init(nn.Linear, 16 * 5 * 5, 120), relu()),
            *(skip_init(nn.Linear, 120, 84), relu()),
            skip_init(nn.Linear, 84, num_classes),
        )
        initialize(self, generator)


class SmallConvNet(nn.Sequential):
    """Four 3×3 convolutions and a linear layer, 28,474 parameters, 32×32 colours.

    Other arguments are as in `cpnb.DigitsNet`.

    Args:
        batch_norm: Put a batch norm behind every convolution, 256 parameters in all.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        batch_norm: bool = False,
        generator: Generator | None = None,
    ):
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 16), (16, 32), (32, 64)):
            layers += [skip_init(nn.Conv2d, before, after, 3, padding=1)]
            layers += [nn.BatchNorm2d(after)] if batch_norm else []
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), skip_init(nn.Linear, 64 * 2 * 2, num_classes)]
        super().__init__(*layers)
        initialize(self, generator)


class ResNet(nn.Module):
    """The residual network for CIFAR of He et al., in three stages of equal blocks.

    The second and third begin with a stride of 2; their shortcuts take every second
    pixel and append channels of zeros. Other arguments are as in `cpnb.DigitsNet`.

    Args:
        depth: Number of layers with weights, ``6·blocks + 2``: 20, 32, …
        width: Multiple of the 16, 32 and 64 channels of the stages.

    Source: He, Zhang, Ren, Sun 2015, arXiv:1512.03385, section 4.2, shortcuts A.
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 1,
        num_classes: int = 10,
        *,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        channels = 16 * width
        self.conv1 = _conv(3, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stage1 = _stage(blocks, channels, channels)
        self.stage2 = _stage(blocks, channels, 2 * channels)
        self.stage3 = _stage(blocks, 2 * channels, 4 * channels)
        self.fc = skip_init(nn.Linear, 4 * channels, num_classes)
        initialize(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, shape ``(n, classes)``, of images, shape ``(n, 3, 32, 32)``."""
        hidden = F.relu(self.bn1(self.conv1(images)))
        hidden = self.stage3(self.stage2(self.stage1(hidden)))
        return self.fc(F.adaptive_avg_pool2d(hidden, 1).flatten(1))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; more channels out halve height and width."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.appended = channels_out - channels_in
        self.conv1 = _conv(channels_in, channels_out, stride=2 if self.appended else 1)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(n, channels_in, h, w)`` to ``(n, channels_out, h', w')``."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(hidden)))))
        if self.appended:
            hidden = F.pad(hidden[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.appended))
        return F.relu(branch + hidden)


def _stage(blocks: int, channels_in: int, channels_out: int) -> nn.Sequential:
    sizes = [channels_in] + [channels_out] * (blocks - 1)
    return nn.Sequential(*(ResidualBlock(size, channels_out) for size in sizes))
