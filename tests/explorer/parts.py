"""The small network that the tests of the rank explorer cut."""

from torch import nn

from cpnb.layers import CPConv2d, CPLinear

LONG = 30  # seconds; a test that waits this long has failed


class Net(nn.Module):
    """Ranks 8 and 6."""

    def __init__(self):
        super().__init__()
        self.conv = CPConv2d(1, 6, 3, rank=8)
        self.fc = CPLinear(24, 5, rank=6)

    def forward(self, images):
        """Scores of 5 classes."""
        return self.fc(self.conv(images).relu().flatten(1))
