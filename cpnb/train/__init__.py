"""Data sets, networks, one training loop, and fair comparisons of recipes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cpnb.train.batches import Augment
from cpnb.train.data import Dataset, Split, load_data
from cpnb.train.evaluation import accuracy, evaluate, paired_difference
from cpnb.train.loop import fast_mode, fit
from cpnb.train.models import DigitsNet, LeNet
from cpnb.train.optim import param_groups
from cpnb.train.records import Run

if TYPE_CHECKING:
    from cpnb.train.comparison import REGISTRY, Comparison, Recipe, build, compare

__all__ = [
    "REGISTRY", "Augment", "Comparison", "Dataset", "DigitsNet", "LeNet",
    "Recipe", "Run", "Split", "accuracy", "build", "compare", "evaluate",
    "fast_mode", "fit", "load_data", "paired_difference", "param_groups",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The rest is loaded when asked for, as pandas takes a while.
    return getattr(import_module("cpnb.train.comparison"), name)
