"""Canonical (CP-decomposed) neural networks: train one, slide its ranks, see the cost.

The first hour, by task:

- a layer: `CPConv2d`, `CPLinear`; a whole network: `canonicalize`, `to_dense`
- train and measure it: `load_data`, `DigitsNet`, `fit`, `accuracy`
- cut it: `truncate`, `rank_sweep`, `RankExplorer`

Where the rest is:

- `cpnb.cp`, `cpnb.decompose`, `cpnb.initializers`: the mathematics on plain tensors
- `cpnb.layers`, `cpnb.convert`, `cpnb.truncation`: layers, conversion, ranks, cuts
- `cpnb.methods`: what canonical weight normalization is compared with, a file per paper
- `cpnb.train`: data, networks, the training loop, comparisons
- `cpnb.explore`: sweeps, allocation, reports, diagnostics, plots, widgets

``import cpnb`` loads torch and numpy only; what needs more loads it when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cpnb.convert import canonicalize, cp_layers, from_layer, step_gauge_, to_dense
from cpnb.cp import cp_to_kernel, relative_error
from cpnb.decompose import als, power_method
from cpnb.layers import CPConv1d, CPConv2d, CPConv3d, CPLinear
from cpnb.truncation import truncate

if TYPE_CHECKING:
    from cpnb import explore, methods, train
    from cpnb.explore import (
        RankExplorer,
        RankSweep,
        allocate_ranks,
        rank_sweep,
        truncation_report,
    )
    from cpnb.methods import NestedRank, factorize, normalize, rescale_
    from cpnb.train import DigitsNet, LeNet, accuracy, compare, fit, load_data

__version__ = "0.2.0"

__all__ = [
    "CPConv1d", "CPConv2d", "CPConv3d", "CPLinear", "DigitsNet", "LeNet", "NestedRank",
    "RankExplorer", "RankSweep", "accuracy", "allocate_ranks", "als", "canonicalize",
    "compare", "cp_layers", "cp_to_kernel", "explore", "factorize", "fit", "from_layer",
    "load_data", "methods", "normalize", "power_method", "rank_sweep", "relative_error",
    "rescale_", "step_gauge_", "to_dense", "train", "truncate", "truncation_report",
]  # fmt: skip

_LAZY = {
    "methods": "NestedRank factorize normalize rescale_",
    "train": "DigitsNet LeNet accuracy compare fit load_data",
    "explore": "RankExplorer RankSweep allocate_ranks rank_sweep truncation_report",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return import_module(f"cpnb.{name}")
    for tier, names in _LAZY.items():
        if name in names.split():
            return getattr(import_module(f"cpnb.{tier}"), name)
    raise AttributeError(
        f"module 'cpnb' has no attribute {name!r}; help(cpnb) says where what is, and "
        "CHANGELOG.md where the names of version 0.1 went."
    )


def __dir__() -> list[str]:
    return sorted(__all__)
