"""What a truncation costs and saves, in one table."""

import copy
import math
from collections import Counter
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cpnb.convert import cp_layers, to_dense
from cpnb.train.evaluation import accuracy, images_and_labels, placement

__all__ = ["count_flops", "truncation_report"]


@torch.no_grad()
def truncation_report(
    before: nn.Module, after: nn.Module, data: Any = None
) -> pd.DataFrame:
    """Compare a truncated network with the one it came from, and with a dense one.

    Args:
        before: The network before truncation.
        after: The same network with other ranks.
        data: A data set (its validation split is used) or a pair ``(images, labels)``;
            None leaves out FLOPs and accuracy.

    Returns:
        A row for each CP layer, and ``"total"`` for the network: ``rank_before`` and
        ``rank``, ``relative_rank`` (over break-even), ``parameters_before`` and
        ``parameters``, ``over_dense`` (parameters over those of the dense layer), and
        ``relative_error`` of the kernel (for the network of all together). With data
        also ``flops`` for one image, run as chains, ``flops_over_dense``, and for the
        network ``accuracy_before`` and ``accuracy``.
    """
    old, new = cp_layers(before), cp_layers(after)
    shapes = [{n: x.kernel_shape for n, x in layers.items()} for layers in (old, new)]
    if not old or shapes[0] != shapes[1]:
        raise ValueError(
            f"after has the CP layers {shapes[1]}, expected those of before, at least "
            f"one: {shapes[0]}. Pass a network and its truncated copy."
        )
    rows: list[dict[str, Any]] = [
        {
            "rank_before": was.rank,
            "rank": layer.rank,
            "relative_rank": layer.rank / layer.break_even_rank,
            "parameters_before": was.parameters_at(was.rank),
            "parameters": layer.parameters_at(layer.rank),
            "dense": layer.dense_parameters,
            "norm": was.weight.double().norm().item(),
            "lost": (was.weight.double() - layer.weight.double()).norm().item(),
        }
        for was, layer in ((old[name], new[name]) for name in new)
    ]
    total: dict[str, Any] = {c: sum(row[c] for row in rows) for c in rows[0]}
    others = sum(p.numel() for p in after.parameters()) - total["parameters"]
    for column in ("parameters_before", "parameters", "dense"):
        total[column] += others
    for column in ("norm", "lost"):
        total[column] = math.hypot(*(row[column] for row in rows))
    total["relative_rank"] = None
    table = pd.DataFrame([*rows, total], [*(name or "layer" for name in new), "total"])
    table["over_dense"] = table["parameters"] / table.pop("dense")
    table["relative_error"] = table.pop("lost") / table.pop("norm")
    if data is not None:
        pair = images_and_labels(data)
        flops = count_flops(after, pair[0][:1], chains=True)
        dense = count_flops(to_dense(after), pair[0][:1])
        table["flops"] = [flops[name] for name in (*new, "")]
        table["flops_over_dense"] = table["flops"] / [dense[n] for n in (*new, "")]
        table.loc["total", "accuracy_before"] = accuracy(before, pair)
        table.loc["total", "accuracy"] = accuracy(after, pair)
    return table


def count_flops(
    model: nn.Module, image: Tensor, *, chains: bool = False
) -> Counter[str]:
    """Count the FLOPs of one inference by module name; ``""`` is the whole model.

    With ``chains`` CP layers run through their components, else as they choose.
    """
    twin = copy.deepcopy(model).eval()
    for layer in cp_layers(twin).values() if chains else ():
        layer.forward_mode = "chain"
    device, dtype = placement(model, image)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(image.to(device, dtype, copy=True))
    by_name = counter.get_flop_counts().items()
    return Counter({n.partition(".")[2]: sum(x.values()) for n, x in by_name})
