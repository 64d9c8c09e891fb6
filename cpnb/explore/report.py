"""What a truncation costs and saves, what layers cost, and chains of stock layers."""

import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import skip_init
from torch.utils.flop_counter import FlopCounterMode

from cpnb.convert import cp_layers, replace_layers, to_dense
from cpnb.cp import break_even_rank, columnwise_kronecker
from cpnb.layers import CP_KINDS, CPLayer, CPLinear, pad_factors
from cpnb.train.evaluation import accuracy, every_layer, images_and_labels, moved

__all__ = ["cost_table", "count_flops", "to_chain", "truncation_report"]


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
    with every_layer(), FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(moved(model, image).clone())
    # The counter knows a module of several names by another of them.
    names = {module: name for name, module in twin.named_modules()}
    own = {p: names[m] for p, m in twin.named_modules(remove_duplicate=False)}
    paths = {n.partition(".")[2]: x for n, x in counter.get_flop_counts().items()}
    return Counter({own.get(p, p): sum(x.values()) for p, x in paths.items()})


def to_chain(model: nn.Module) -> nn.Module:
    """Copy a model with each CP layer as stock layers: 1×1 → depthwise → 1×1.

    Exact, with σ and λ in the window, the bias in the last; a linear layer becomes two.
    Low-rank layers stay as they are, and a chain takes no ``output_size`` in a call.

    >>> [type(part).__name__ for part in to_chain(CPLinear(8, 4, rank=2))]
    ['Linear', 'Linear']
    """
    new = {name: _chain(layer) for name, layer in cp_layers(model).items()}
    return replace_layers(model, new)


@torch.no_grad()
def _chain(layer: Any) -> nn.Module:
    lam, units = layer.components(torch.float64)
    padded = pad_factors(lam, units, layer.kernel_shape)
    outputs, (source, *spatial) = layer.by_role(padded)
    groups, rank, bias = layer.groups, layer.rank, layer.bias
    make: Any = partial(skip_init, device=layer.lam.device, dtype=layer.lam.dtype)
    if isinstance(layer, CPLinear):
        first = make(nn.Linear, layer.in_features, rank, bias=False)
        last = make(nn.Linear, rank, layer.out_features, bias=bias is not None)
        weights = {first: (source * lam).T, last: outputs}
    else:
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(spatial) - 1]
        wide = groups * rank
        names = ("stride", "padding", "output_padding", "dilation", "padding_mode")
        how = {n: getattr(layer, n) for n in names if n in layer.argument_names}
        first = make(conv, layer.in_channels, wide, 1, groups=groups, bias=False)
        size = layer.kernel_size
        middle = make(layer.stock, wide, wide, size, groups=wide, bias=False, **how)
        channels = layer.out_channels
        last = make(conv, wide, channels, 1, groups=groups, bias=bias is not None)
        if not getattr(layer, "transposed", False):  # there groups slice the source
            source = source.repeat(groups, 1)
        slices = source.unflatten(0, (groups, -1)).mT.flatten(0, 1)
        window = (columnwise_kronecker(spatial) * lam).T.repeat(groups, 1)
        weights = {first: slices, middle: window, last: outputs}
    for part, weight in weights.items():
        part.weight.copy_(weight.reshape(part.weight.shape))
    if bias is not None:
        last.bias.copy_(bias)
    return nn.Sequential(*weights).train(layer.training)


def cost_table(
    model: nn.Module, input_shape: Sequence[int], turns: int = 5
) -> pd.DataFrame:
    """Measure what each convolution and linear layer costs on a random input.

    Args:
        model: Any module; its layers may be dense or in CP form.
        input_shape: Shape of the input of the model, with the batch.
        turns: Timings of which the median counts; the forms of a layer take turns.

    Returns:
        A row per layer: ``parameters``, ``break_even`` rank, and for its forms,
        ``dense`` and of CP layers also ``rebuilt`` and ``chain``: FLOPs, bytes kept for
        a backward pass, and milliseconds of an inference.
    """
    twin = copy.deepcopy(model).eval()
    kinds = (*CP_KINDS, CPLayer)
    layers: dict[str, Any] = {
        name: layer for name, layer in twin.named_modules() if isinstance(layer, kinds)
    }
    inputs: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, arguments: tuple, named: dict) -> None:
        inputs[name] = (*arguments, *named.values())[0].detach()

    add: Any = partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
    hooks = [add(layer, partial(note, name)) for name, layer in layers.items()]
    like = next(twin.parameters())
    twin(torch.randn(*input_shape, device=like.device, dtype=like.dtype))
    for hook in hooks:
        hook.remove()
    rows = {}
    for name, given in inputs.items():
        layer = layers[name]
        forms = {"dense": to_dense(layer)}
        if isinstance(layer, CPLayer):
            layer.forward_mode = "dense"
            forms |= {"rebuilt": layer, "chain": to_chain(layer)}
        row = {"parameters": sum(p.numel() for p in layer.parameters())}
        row["break_even"] = break_even_rank(tuple(layer.weight.shape))
        row |= {f"flops_{n}": count_flops(m, given)[""] for n, m in forms.items()}
        row |= {f"kept_bytes_{n}": _kept_bytes(m, given) for n, m in forms.items()}
        times = _milliseconds(forms, given, turns).items()
        rows[name or "layer"] = row | {f"ms_{n}": value for n, value in times}
    return pd.DataFrame.from_dict(rows, orient="index")


def _kept_bytes(module: nn.Module, given: Tensor) -> int:
    """What a forward saves for the backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(given.clone().requires_grad_())  # alive until all is counted
    return sum(kept.values()) if output is not None else 0


@torch.no_grad()
def _milliseconds(
    forms: dict[str, nn.Module], given: Tensor, turns: int
) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(-1, turns):  # the first is to warm up
        for name, module in forms.items():
            begin = time.perf_counter()
            module(given).flatten()[:1].cpu()  # waits for a device
            if turn >= 0:
                taken[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in taken.items()}
