"""How long the CP layers of a network take, by rank."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpnb._checks import check_count
from cpnb.evaluation import images_and_labels, placement
from cpnb.importance import ranked_layers
from cpnb.probing import received
from cpnb.records import provenance
from cpnb.surgery import cp_layers, to_dense


@torch.no_grad()
def time_layers(
    model: nn.Module, data: Any, *, batch_size: int, repeats: int
) -> dict[str, Any]:
    """Time a network and each of its CP layers, dense and as chains.

    Args:
        model: The network; a copy of it is run.
        data: As in `cpnb.rank_sweep`; its first images are used.
        batch_size: How many.
        repeats: Runs of each, in turns; the shortest counts.

    Returns:
        Milliseconds for one image. ``"layers"``: by name, over all uses, ``"dense"``
        and ``"chain"`` as pairs of rank and time; ``"other"``: outside the CP layers;
        ``"batch"``, ``"device"``, ``"machine"`` and ``"threads"`` they hold for.
    """
    repeats = check_count(repeats, "repeats")
    images, _ = images_and_labels(data)
    images = images[: check_count(batch_size, "batch_size")]
    images = images.to(*placement(model, images))
    network = copy.deepcopy(model).eval()
    inputs = _inputs(network, images)
    runs: dict[tuple[str, Any], Callable[[], Any]] = {}
    for name, ranked in ranked_layers(network, inputs).items():
        full = ranked.layer.rank
        for rank in sorted({1, max(1, full // 2), full}):
            chain = ranked.cut(rank)
            chain.forward_mode = "chain"
            runs[name, rank] = partial(_each, chain, inputs[name])
        runs[name, "dense"] = partial(_each, ranked.layer.to_dense(), inputs[name])
    dense = to_dense(network)
    for name in inputs:  # dense layers have another name for their input
        dense.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs: ((received(args, kwargs),), {}), with_kwargs=True
        )
    runs["", "network"] = partial(dense, images)
    for run in runs.values():
        run()
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for what, run in runs.items():
            seconds[what] = min(seconds[what], _timed(run, images.device))
    taken = {what: 1000 * least / len(images) for what, least in seconds.items()}
    layers = {
        name: {
            "dense": taken[name, "dense"],
            "chain": [
                [what, value]
                for (layer, what), value in taken.items()
                if layer == name and isinstance(what, int)
            ],
        }
        for name in inputs
    }
    inside = sum(layer["dense"] for layer in layers.values())
    made = provenance(images.device)
    return {
        "layers": layers,
        "other": max(0.0, taken["", "network"] - inside),
        "batch": len(images),
        **{name: made[name] for name in ("device", "machine", "threads")},
    }


def milliseconds_at(times: dict[str, Any], rank: int) -> float:
    """Time of a layer at a rank: as a chain or dense, whichever is shorter.

    Between measured ranks the chain's time is taken to be linear.
    """
    chain = times["chain"]
    ranks, taken = zip(*chain, strict=True)
    if rank in ranks:
        return min(times["dense"], taken[ranks.index(rank)])
    upper = next(n for n, known in enumerate(ranks) if known > rank)
    (low, start), (high, end) = chain[upper - 1 : upper + 1]
    return min(times["dense"], start + (end - start) * (rank - low) / (high - low))


def _inputs(network: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    """What each CP layer receives, call by call."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in cp_layers(network)}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, *given, name=name: inputs[name].append(received(*given)),
            with_kwargs=True,
        )
        for name, layer in cp_layers(network).items()
    ]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _each(layer: nn.Module, inputs: list[Tensor]) -> None:
    for given in inputs:
        layer(given)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
