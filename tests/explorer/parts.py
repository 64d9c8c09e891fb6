"""The small network that the tests of the rank explorer cut."""

import threading
from typing import NamedTuple

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


class Gated(NamedTuple):
    """A network that waits in each forward pass until its gate is open."""

    network: nn.Module
    gate: threading.Event
    entered: threading.Event
    ran: list[int]  # the rank of the convolution in each pass


def gated(net):
    """Put a `Net` behind a gate, open at first; copies of it share the gate."""
    gate, entered, ran = threading.Event(), threading.Event(), []
    gate.set()

    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images):
            ran.append(self.net.conv.rank)
            entered.set()
            assert gate.wait(LONG)
            return self.net(images)

    return Gated(Behind(), gate, entered, ran)
