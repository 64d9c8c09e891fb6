"""One cell of an experiment: one network trained from one start, rate and seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite, sqrt
from typing import Any

import torch

from cpnb.data import Dataset, load_data
from cpnb.evaluation import accuracy, evaluate
from cpnb.initializers import INITIALIZERS, CPForm, unified
from cpnb.models import LeNet
from cpnb.records import MEASURES, provenance
from cpnb.surgery import canonicalize
from cpnb.training import fit

# A start's random numbers and the order of the images come from different seeds.
_START_SEED_OFFSET = 1_000_000
_DIGITS = 5  # after the point, in the record


def unified_small(shape: Sequence[int], rank: int, **options: Any) -> CPForm:
    """Directions of `cpnb.unified`, variance of torch's dense default, Kaiming's / 6.

    The control for ``"power"`` and ``"als"``, which fit torch's default kernels: it has
    their variance and nothing else of them.

    Args: see `cpnb.unified`.
    """
    lam, factors = unified(shape, rank, **options)
    return lam / sqrt(6), factors


STARTS: dict[str, Callable[..., CPForm]] = {
    **INITIALIZERS,
    "unified_small": unified_small,
}


@dataclass(frozen=True)
class Experiment:
    """A comparison of CP starts, learning rate tuned for each, and its size.

    Attributes:
        name: Name of the experiment and of its record.
        title: What it compares and at which size, in one line.
        data: Data set, as in `cpnb.load_data`.
        train_size: Number of training images; None for all.
        validation_size: Number of validation images; None for all.
        ranks: Rank of each layer of the `cpnb.LeNet`.
        starts: Names in `STARTS`.
        rates: Learning rates to choose from.
        tuning_seeds: Seeds on which the rate is chosen.
        seeds: Fresh seeds of the networks that are tested.
        epochs: Passes over the training images.
        batch_size: Images per step.
        optimizer: As in `cpnb.fit`.
    """

    name: str
    title: str
    data: str
    train_size: int | None
    validation_size: int | None
    ranks: Mapping[str, int]
    starts: tuple[str, ...]
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    optimizer: str


@dataclass(frozen=True)
class Cell:
    """One training run: ``"tune"`` sees the validation split, ``"test"`` also the test.

    Attributes:
        phase: ``"tune"`` or ``"test"``.
        start: Name of the start.
        lr: Learning rate.
        seed: Seed of the start and of the training.
    """

    phase: str
    start: str
    lr: float
    seed: int


def tuning_cells(experiment: Experiment) -> list[Cell]:
    """All cells on which the learning rates are chosen."""
    return [
        Cell("tune", start, lr, seed)
        for start in experiment.starts
        for lr in experiment.rates
        for seed in experiment.tuning_seeds
    ]


def fresh_cells(experiment: Experiment, rates: Mapping[str, float]) -> list[Cell]:
    """All cells with fresh seeds at the chosen rate of each start."""
    return [
        Cell("test", start, rates[start], seed)
        for start in experiment.starts
        for seed in experiment.seeds
    ]


@lru_cache(maxsize=1)
def experiment_data(
    name: str, train_size: int | None, validation_size: int | None
) -> Dataset:
    """Load what an experiment trains on, with the first of the validation images."""
    data = load_data(name, train_size=train_size)
    images, labels = (part[:validation_size] for part in data.validation)
    return replace(
        data, validation=replace(data.validation, images=images, labels=labels)
    )


def run_cell(experiment: Experiment, cell: Cell, device: str = "cpu") -> dict[str, Any]:
    """Train the network of one cell and measure it.

    Args:
        experiment: What the cell belongs to.
        cell: What to train.
        device: Where to.

    Returns:
        What the record keeps of the cell. ``test_accuracy`` is None in phase ``"tune"``
        and for a network that diverged: the test split is not read then.

    Raises:
        KeyboardInterrupt: If Ctrl-C ended the training.
    """
    data = experiment_data(
        experiment.data, experiment.train_size, experiment.validation_size
    ).to(device)
    generator = torch.Generator().manual_seed(cell.seed + _START_SEED_OFFSET)
    dense = LeNet(len(data.classes), generator=generator)
    begin = time.perf_counter()
    net = canonicalize(
        dense,
        rank=experiment.ranks,
        init=STARTS[cell.start],
        generator=generator,
    ).to(device)
    start_seconds = time.perf_counter() - begin
    before = evaluate(net, data.validation)["loss"]
    run = fit(
        net,
        data,
        epochs=experiment.epochs,
        batch_size=experiment.batch_size,
        optimizer=experiment.optimizer,
        lr=cell.lr,
        seed=cell.seed,
        progress=False,
    )
    if run.status == "interrupted":
        raise KeyboardInterrupt
    where = provenance(device)
    measured = cell.phase == "test" and run.status == "finished"
    curves = {
        name: [round(record[name], _DIGITS) for record in run.history]
        for name in MEASURES
    }
    return {
        "phase": cell.phase,
        "start": cell.start,
        "lr": cell.lr,
        "seed": cell.seed,
        "status": run.status,
        "start_seconds": round(start_seconds, _DIGITS),
        "start_validation_loss": round(before, _DIGITS) if isfinite(before) else None,
        **curves,
        "test_accuracy": accuracy(net, data.test) if measured else None,
        "provenance": where,
    }
