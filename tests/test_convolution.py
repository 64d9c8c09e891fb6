"""Convolutions as torch's own compute them, also where torch's must not be called."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cpnb import CPConv2d
from cpnb.convolution import convolve, innermost, is_channels_last

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@settings(max_examples=60)
@given(
    ndim=st.integers(1, 3),
    window=st.sampled_from([1, 1, 2, 3]),
    stride=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2]),
)
def test_convolve_equals_torch_in_value_and_gradients(
    ndim, window, stride, padding, groups
):
    """In float64, where torch's strided pointwise convolution is right."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    images = torch.randn(2, 4, *(7, 6, 5)[:ndim], **options)
    kernel = torch.randn(6, 4 // groups, *[window] * ndim, **options)
    bias = torch.randn(6, **options)
    geometry = {"stride": stride[:ndim], "padding": padding, "groups": groups}
    results = []
    for function in (convolve, CONVS[ndim]):
        leaves = [t.clone().requires_grad_() for t in (images, kernel, bias)]
        output = function(*leaves, **geometry)
        slope = torch.linspace(-1, 1, output.numel()).double().view_as(output)
        output.backward(slope)
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    assert_close(*results)


@pytest.mark.parametrize("channels", [1, 3])
def test_layout_is_told_apart_also_for_a_single_channel(channels):
    images = torch.randn(2, channels, 4, 5)
    rows = torch.randn(2, 4, 5, channels).movedim(-1, 1)
    assert is_channels_last(rows)
    assert not is_channels_last(images)
    # The layout of one pixel is no layout.
    assert not is_channels_last(torch.randn(2, channels, 1, 1))
    assert not is_channels_last(torch.randn(2, channels, 7))
    moved = innermost(images)
    assert torch.equal(moved, images)
    assert is_channels_last(moved) or channels == 1


# On some processors torch's weight gradient of a strided 1x1 convolution breaks memory
# if the input's channels are innermost; hence a process of its own. See
# https://github.com/uxlfoundation/oneDNN/issues/6035.
BACKWARD_PASSES = """
import copy, torch, cpnb
from cpnb.methods import LowRankConv2d
torch.manual_seed(0)
torch.set_num_threads(1)
layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
cases = [(cpnb.CPConv1d, 9, 1), (cpnb.CPConv2d, 9, 1), (cpnb.CPConv3d, 5, 1)]
cases += [(cpnb.CPConv2d, 9, (1, 3)), (cpnb.CPConv2d, 9, 3)]
cases += [(LowRankConv2d, 9, 1), (LowRankConv2d, 9, 3)]
for kind, size, window in cases:
    for mode in ("dense", "chain"):
        for channels in ((8, 24), (3, 5), (1, 4)):
            options = {"stride": 2, "rank": 2}
            if kind is not LowRankConv2d:
                options["forward_mode"] = mode
            layer = kind(*channels, window, **options)
            exact = copy.deepcopy(layer).double()
            ndim = len(layer.kernel_size)
            images = torch.randn(4, channels[0], *[size] * ndim)
            if ndim > 1:
                images = images.to(memory_format=layouts[ndim + 2])
            images.requires_grad_()
            doubles = images.detach().double().requires_grad_()
            exact(doubles).square().sum().backward()
            expected = [doubles.grad, *(p.grad for p in exact.parameters())]
            for _ in range(50):
                layer.zero_grad()
                images.grad = None
                layer(images).square().sum().backward()
                gradients = [images.grad, *(p.grad for p in layer.parameters())]
                for one, other in zip(gradients, expected, strict=True):
                    error = (one - other).norm() / other.norm()
                    assert error < 1e-4, (kind, window, mode, channels, error)
print("right")
"""


def test_layers_survive_strided_backward_passes_on_channels_last_input():
    command = [sys.executable, "-c", BACKWARD_PASSES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "right", f"status {done.returncode}: {done.stderr}"


class Convolutions(TorchDispatchMode):
    """Notes window and stride of every convolution and every backward of one."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            # Forward: input, kernel, bias, stride; backward has the slope before these.
            backward = "backward" in str(func)
            kernel, stride = (args[2], args[4]) if backward else (args[1], args[3])
            self.seen.append((tuple(kernel.shape[2:]), tuple(stride), backward))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["dense", "chain"])
@pytest.mark.parametrize("window", [1, (1, 3), 3], ids=str)
def test_layer_hands_torch_no_strided_pointwise_convolution(mode, window):
    for channels in ((8, 24), (1, 4)):
        layer = CPConv2d(*channels, window, stride=2, rank=2, forward_mode=mode)
        with Convolutions() as convolutions:
            layer(torch.randn(2, channels[0], 7, 7)).sum().backward()
        assert {backward for *_, backward in convolutions.seen} == {True, False}
        for size, stride, _ in convolutions.seen:
            assert math.prod(size) > 1 or math.prod(stride) == 1
