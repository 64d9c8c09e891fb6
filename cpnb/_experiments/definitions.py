"""Every experiment whose records the notebooks read, as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cpnb._experiments.starts import unified_small
from cpnb.data import Dataset, load_data
from cpnb.recipes import Recipe


@dataclass(frozen=True)
class Experiment:
    """A comparison and its size.

    Attributes:
        name: Its name, and that of the folder with its records.
        title: What it compares and at which size, in one line.
        data: Loads the data set.
        recipes: What is compared.
        tune: Values to choose from, as in `cpnb.compare`.
        tune_seeds: Seeds on which they are chosen.
        seeds: Fresh seeds of the networks that are tested.
        device: Where its size fits: ``"cpu"`` or ``"cuda"``.
        together: Networks that train together at most, as in `cpnb.compare`.
    """

    name: str
    title: str
    data: Callable[[], Dataset]
    recipes: tuple[Recipe, ...]
    tune: Mapping[str, Sequence[float]]
    tune_seeds: Sequence[int]
    seeds: Sequence[int]
    device: str = "cuda"
    together: int | None = None


def experiment_data(
    name: str, train_size: int | None = None, validation_size: int | None = None
) -> Dataset:
    """Load what an experiment trains on, with the first of the validation images."""
    data = load_data(name, train_size=train_size)
    images, labels = (part[:validation_size] for part in data.validation)
    return replace(
        data, validation=replace(data.validation, images=images, labels=labels)
    )


# The authors' ranks, read from their public code.
LENET_RANKS = {"conv1": 11, "conv2": 270, "fc1": 128, "fc2": 10}


def starts(**settings: Any) -> tuple[Recipe, ...]:
    """One recipe per start of a LeNet in canonical form."""
    return tuple(
        Recipe(
            name,
            "LeNet",
            "canonical",
            {
                "rank": LENET_RANKS,
                "init": unified_small if name == "unified_small" else name,
            },
            settings=settings,
        )
        for name in ("unified", "power", "unified_small", "als", "gaussian", "uniform")
    )


_ADAM_RATES = {"lr": (3e-4, 1e-3, 3e-3, 1e-2)}


_DEFINED = (
    Experiment(
        "initialization-mnist",
        "MNIST, LeNet, six starts, reduced size for a CPU: 6,000 training images, "
        "3 epochs, 5 seeds",
        partial(experiment_data, "mnist", train_size=6000, validation_size=1000),
        starts(epochs=3, batch_size=64, optimizer="adam"),
        _ADAM_RATES,
        tune_seeds=(100,),
        seeds=range(5),
        device="cpu",
    ),
    Experiment(
        "initialization-mnist-full",
        "MNIST, LeNet, six starts, full size: all images, 20 epochs, 10 seeds (GPU)",
        partial(experiment_data, "mnist"),
        starts(epochs=20, batch_size=64, optimizer="adam"),
        _ADAM_RATES,
        tune_seeds=(100, 101, 102),
        seeds=range(10),
    ),
)
EXPERIMENTS = {experiment.name: experiment for experiment in _DEFINED}
