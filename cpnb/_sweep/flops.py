"""FLOPs of a network with CP layers, by layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cpnb.evaluation import evaluation_mode
from cpnb.surgery import cp_layers


def count_flops(
    model: nn.Module, image: Tensor
) -> tuple[int, Mapping[str, tuple[int, int]]]:
    """FLOPs of one inference, run in a copy of the network.

    Args:
        model: The network.
        image: One image as a batch, on the device and in the dtype of the network.

    Returns:
        FLOPs outside the CP layers; and for each CP layer, over all its uses, those of
        one component in a chain and those of the dense layer.
    """
    twin = copy.deepcopy(model)
    layers = cp_layers(twin)
    dense = dict.fromkeys(layers, 0)

    def count(name: str, layer: Any, output: Tensor) -> None:
        rows = output.numel() // layer.kernel_shape[0]
        dense[name] += 2 * rows * math.prod(layer.kernel_shape)

    for name, layer in layers.items():
        layer.forward_mode = "chain"
        layer.register_forward_hook(
            lambda layer, _, output, name=name: count(name, layer, output)
        )
    # Wrapped, so that a CP layer alone has a name of its own as well.
    root = nn.Sequential(twin)
    with (
        FlopCounterMode(display=False) as counter,
        evaluation_mode(root),
        torch.no_grad(),
    ):
        root(image)
    by_module = counter.get_flop_counts()
    chain = {
        name: sum(by_module.get(f"Sequential.0.{name}".rstrip("."), {}).values())
        for name in layers
    }
    outside = counter.get_total_flops() - sum(chain.values())
    return outside, {
        name: (chain[name] // layer.rank, dense[name]) for name, layer in layers.items()
    }
