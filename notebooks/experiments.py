"""Experiments that are too long for a notebook, and the command that runs them.

``python notebooks/experiments.py list`` says what is defined, ``status`` what there is,
``run NAME`` trains what the record in ``notebooks/results`` lacks (stop it with Ctrl-C
and start it again as you like), and ``gpu`` does all that wants a GPU. ``checkpoint``
trains the plain network of ``cifar10-small`` once more, for notebook 09. Rows name the
commit of the repository; in a copy without one, that of the variable ``CPNB_COMMIT``.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cpnb
from cpnb.initializers import INITIALIZERS, unified
from cpnb.methods import first_and_last, fit_rank, ranks_for
from cpnb.train import REGISTRY, Augment, Comparison, Dataset, Recipe, build
from networks import AlexNet, LeNet5, ResNet, SmallConvNet

REGISTRY |= {"ResNet-20": partial(ResNet, 20), "ResNet-32x4": partial(ResNet, 32, 4)}
REGISTRY |= {"AlexNet": AlexNet, "LeNet5": LeNet5, "SmallConvNet": SmallConvNet}
REGISTRY["SmallConvNet-BN"] = partial(SmallConvNet, batch_norm=True)

RESULTS = Path(__file__).resolve().parent / "results"
CHECKPOINTS = RESULTS.with_name("checkpoints")
KEPT = (1.0, 0.9, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)  # of the components

# The authors' ranks for the LeNet, read from their public code.
RANKS = dict(conv1=11, conv2=270, fc1=128, fc2=10)


@dataclass(frozen=True)
class Experiment:
    """What it is in a line, where its size fits, and arguments of `cpnb.compare`."""

    title: str
    data: Callable[[], Dataset]
    recipes: Sequence[Recipe]
    rates: Sequence[float]
    tune_seeds: Sequence[int] = (100,)
    tune_epochs: int | None = None
    seeds: Sequence[int] = range(5)
    device: str = "cpu"
    measure: Mapping[str, Any] | None = None


@lru_cache(maxsize=1)
def first_images(
    name: str, train_size: int | None = None, validation_size: int | None = None
) -> Dataset:
    """Load a data set with the first of its training and validation images."""
    data = cpnb.load_data(name, train_size=train_size)
    images, labels = (part[:validation_size] for part in data.validation)
    validation = replace(data.validation, images=images, labels=labels)
    return replace(data, validation=validation)


def unified_small(shape: Sequence[int], rank: int, **options: Any) -> Any:
    """As `unified`, with the variance of torch's dense default, Kaiming's / 6.

    The control for ``"power"`` and ``"als"``, which fit kernels of this variance.
    """
    lam, factors = unified(shape, rank, **options)
    return lam / math.sqrt(6), factors


STARTS = {**INITIALIZERS, "unified_small": unified_small}


def started(network: nn.Module, rank: Any, init: str, generator: Any) -> nn.Module:
    """Canonical form from any of `STARTS`."""
    return cpnb.canonicalize(network, rank=rank, init=STARTS[init], generator=generator)


def with_share(
    network: nn.Module, share: float, init: str, generator: torch.Generator
) -> nn.Module:
    """A share of the parameters, in CP or low-rank form; first and last layer dense."""
    skip = first_and_last(network)
    form, convert = "low_rank", cpnb.factorize
    if init in STARTS:
        form, convert = "cp", cpnb.canonicalize
    ranks = ranks_for(network, share, form=form, skip=skip)
    return convert(network, rank=ranks, init=init, skip=skip, generator=generator)


def truncation_curve(
    network: nn.Module, data: Dataset, recipe: Recipe, seed: int, **settings: Any
) -> list[dict[str, Any]]:
    """Test accuracies of a network cut to `KEPT`, before and after training on.

    Cut are a nested network's last components, another's smallest |λ|. None where the
    training, with the ``settings`` of `cpnb.fit`, diverged or has no epochs.
    """
    key = "nested" if "NestedRank" in recipe.hooks else "lam"
    rows = []
    for keep in KEPT:
        cut = cpnb.truncate(network, keep=keep, key=key, progress=False)
        row: dict[str, Any] = {"keep": keep}
        row["parameters"] = sum(parameter.numel() for parameter in cut.parameters())
        row["before"] = cpnb.accuracy(cut, data.test)
        done = False
        if settings["epochs"]:
            run = cpnb.fit(cut, data, seed=seed, progress=False, **settings)
            if run.status == "interrupted":
                raise KeyboardInterrupt
            done = run.status == "finished"
        rows.append(row | {"after": cpnb.accuracy(cut, data.test) if done else None})
    return rows


for function in (started, with_share, truncation_curve):
    REGISTRY[function.__name__] = function
REGISTRY["low_rank"] = partial(cpnb.factorize, rank="same", skip=())


def compressed(network: str, share: float, settings: Mapping[str, Any]) -> list[Recipe]:
    """A network, and the same with a share of its parameters, factorised in six ways.

    Spectral initialisation (SI) splits the dense start; Frobenius decay (FD) replaces
    the factors' weight decay, not that of σ: before a batch norm it would go to zero.
    """
    rows: list[tuple[str, str, list[Any]]] = [
        ("low-rank", "kaiming", []),
        ("SI", "spectral", []),
        ("FD", "kaiming", ["FrobeniusDecay"]),
        ("SI+FD", "spectral", ["FrobeniusDecay"]),
        ("CP", "unified", []),
        ("CP+FD", "unified", [{"name": "FrobeniusDecay", "scale": False}]),
    ]
    return [Recipe("dense", network, settings=settings)] + [
        Recipe(name, network, "with_share", dict(share=share, init=i), hooks, settings)
        for name, i, hooks in rows
    ]


def curves(
    network: str, settings: Mapping[str, Any], names: Sequence[str]
) -> list[Recipe]:
    """Recipes by name: a normalizer, a start of the canonical form, or SI+FD.

    Every layer takes part, with as many parameters as it has when it is dense.
    """
    parts: dict[str, Any] = {name: dict(normalizer=name) for name in names}
    parts["canonical-unified"] = dict(
        normalizer="canonical", options={"init": "unified"}
    )
    decay = {"name": "FrobeniusDecay", "mu": 1e-4}
    parts["SI+FD"] = dict(normalizer="low_rank", hooks=[decay])
    return [Recipe(name, network, settings=settings, **parts[name]) for name in names]


# Training to the end, the rate going down to 0.
TO_THE_END = {"optimizer": "sgd", "momentum": 0.9, "batch_size": 64}
TUNED: dict[str, Any] = {"tune_seeds": (100, 101, 102), "tune_epochs": 2}
METHODS = "none batch weight conditioned scaling canonical".split()
MORE = "oni canonical-unified SI+FD".split()
# As in the papers of residual networks.
RESNET = {"optimizer": "sgd", "momentum": 0.9, "schedule": "step", "batch_size": 128}
MOVED = {"augment": {"crop": 4, "flip": True}}
GPU: dict[str, Any] = {"tune_epochs": 2, "seeds": range(3), "device": "cuda"}
GPU_RATES = (0.02, 0.04, 0.08)
# The authors' logs: 50 epochs of these; a CPU affords ten.
PAPER: dict[str, Any] = {"optimizer": "rmsprop", "schedule": None}
PAPER |= {"epochs": 10, "batch_size": 64}
LENET: dict[str, Any] = {"rank": RANKS}
STARTING = {"epochs": 3, "batch_size": 64, "optimizer": "adam"}

# fmt: off
EXPERIMENTS = {
    "mnist-lenet5": Experiment(
        "MNIST, all images, LeNet-5, nine methods, 10 epochs, 5 seeds",
        partial(first_images, "mnist"),
        curves("LeNet5", TO_THE_END | {"epochs": 10}, METHODS + MORE),
        (0.01, 0.02, 0.04, 0.08), **TUNED,
    ),
    "fashion-lenet5": Experiment(
        "Fashion-MNIST, all images, LeNet-5, nine methods, 10 epochs, 5 seeds",
        partial(first_images, "fashion_mnist"),
        curves("LeNet5", TO_THE_END | {"epochs": 10}, METHODS + MORE),
        (0.01, 0.02, 0.04, 0.08), **TUNED,
    ),
    "cifar10-small": Experiment(
        "CIFAR-10, all images, crops and flips, four convolutions, six methods, "
        "12 epochs, 5 seeds",
        partial(first_images, "cifar10"),
        curves("SmallConvNet", TO_THE_END | MOVED | {"epochs": 12}, METHODS),
        (0.02, 0.04, 0.08), **TUNED,
    ),
    "cifar10-small-15": Experiment(
        "CIFAR-10, all images, crops and flips, four convolutions with batch norm, the "
        "inner three at 15 % of their parameters (the network at a quarter) in six "
        "factorised forms, 12 epochs, 5 seeds",
        partial(first_images, "cifar10"),
        compressed("SmallConvNet-BN", 0.25,
                   TO_THE_END | MOVED | {"epochs": 12, "weight_decay": 5e-4}),
        (0.02, 0.04, 0.08), **TUNED,
    ),
    "mnist-lenet-paper": Experiment(
        "MNIST, all images, LeNet as in the authors' logs (RMSprop at 1e-3), for a CPU "
        "10 epochs: plain and weight norm, 3 seeds",
        partial(first_images, "mnist"),
        [Recipe(name, "LeNet", name, settings=PAPER) for name in ("none", "weight")],
        (1e-3,), seeds=range(3),
    ),
    "truncation-mnist-lenet-paper-cpu": Experiment(
        "As before, canonical at the authors' ranks, cut to 100…5 % of its components "
        "without fine-tuning: their power start, the unified one, nested training; the "
        "power start at the parameters of dense, and for 2 and 50 epochs; 3 seeds",
        partial(first_images, "mnist"),
        [Recipe(name, "LeNet", "started", {"rank": rank, "init": init}, hooks,
                PAPER | {"epochs": epochs})
         for name, init, rank, hooks, epochs in (
             ("power", "power", RANKS, [], 10),
             ("power-nested", "power", RANKS, ["NestedRank"], 10),
             ("unified", "unified", RANKS, [], 10),
             ("power-same-ranks", "power", "same", [], 10),
             ("power-2-epochs", "power", RANKS, [], 2),
             ("power-50-epochs", "power", RANKS, [], 50))],
        (1e-3,), seeds=range(3), measure=dict(name="truncation_curve", epochs=0),
    ),
    "initialization-mnist": Experiment(
        "MNIST, 6,000 images, LeNet, six starts, 3 epochs, 5 seeds",
        partial(first_images, "mnist", 6000, 1000),
        [Recipe(init, "LeNet", "started", LENET | {"init": init}, settings=STARTING)
         for init in "unified power unified_small als gaussian uniform".split()],
        (3e-4, 1e-3, 3e-3, 1e-2),
    ),
    # In the order in which `gpu` trains them.
    "cifar10-alexnet": Experiment(
        "CIFAR-10, AlexNet, crops and flips, six methods, 20 epochs, 3 seeds (GPU)",
        partial(first_images, "cifar10"),
        curves("AlexNet", TO_THE_END | MOVED | {"epochs": 20, "batch_size": 128},
               METHODS), GPU_RATES, **GPU,
    ),
    "mnist-lenet": Experiment(
        "MNIST, LeNet, six methods, 20 epochs, 3 seeds (GPU)",
        partial(first_images, "mnist"),
        curves("LeNet", TO_THE_END | {"epochs": 20, "batch_size": 128}, METHODS),
        GPU_RATES, **GPU,
    ),
    "cifar100-resnet20": Experiment(
        "CIFAR-100, ResNet-20 with batch norm, crops and flips, five methods, "
        "60 epochs, 3 seeds (GPU)",
        partial(first_images, "cifar100"),
        curves("ResNet-20", RESNET | MOVED | {"epochs": 60, "weight_decay": 5e-4},
               "none weight conditioned scaling canonical".split()),
        (0.05, 0.1, 0.2), **GPU,
    ),
    "cifar10-resnet32-tenth": Experiment(
        "CIFAR-10, ResNet-32×4 at 10 % of its parameters in six factorised forms, "
        "crops and flips, 60 epochs, 3 seeds (GPU)",
        partial(first_images, "cifar10"),
        compressed("ResNet-32x4", 0.1,
                   RESNET | MOVED | {"epochs": 60, "weight_decay": 1e-4}),
        (0.05, 0.1, 0.2), **GPU,
    ),
}
# fmt: on

# Images a second of each, on one H100: guesses, until a record has measured ones.
GUESSES = {"cifar10-alexnet": 40_000, "mnist-lenet": 60_000}
GUESSES |= {"cifar100-resnet20": 15_000, "cifar10-resnet32-tenth": 10_000}
ROUGHLY = 50_000  # training images in each of their data sets


def read_results(folder: Path | str = RESULTS) -> dict[str, Comparison]:
    """The records in a folder, by experiment."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"folder is {str(folder)!r}, which is not there, expected one of records. "
            f"Those of this repository are in {RESULTS}."
        )
    made = [name for name in EXPERIMENTS if Path(folder, name, "recipes.json").exists()]
    return {name: Comparison.load(Path(folder, name)) for name in made}


def status(name: str, found: Comparison | None) -> str:
    """What there is of an experiment."""
    if found is None:
        return "no record"
    experiment, runs = EXPERIMENTS[name], found.runs
    defined = {recipe.name: recipe for recipe in experiment.recipes}
    plan = [[*experiment.rates], [*experiment.tune_seeds], [*experiment.seeds]]
    plan.append(experiment.tune_epochs)
    state = "not complete" if found.missing() else "complete"
    made = [found.rates, found.tune_seeds, found.seeds, found.tune_epochs]
    if (defined, plan) != (found.recipes, made):
        state = "not as it is defined now"
    return f"{state}, {len(runs)} trainings, {runs.seconds.sum() / 60:.0f} minutes"


def minutes_left(name: str, found: Comparison | None, workers: int) -> float:
    """About how long what a record lacks takes on one GPU, at the rates to begin with.

    The images per second are those of the record, times the workers that share the
    GPU; before there are any a guess.
    """
    experiment = EXPERIMENTS[name]
    tuning = len(experiment.rates) * len(experiment.tune_seeds)
    epochs = sum(
        tuning * (experiment.tune_epochs or recipe.settings["epochs"])
        + len(experiment.seeds) * recipe.settings["epochs"]
        for recipe in experiment.recipes
    )
    speed: float = GUESSES.get(name, ROUGHLY)
    if found is not None and len(found.runs):
        epochs = max(0, epochs - found.runs.epochs.sum())
        measured = found.runs.images_per_second.mean()  # NaN if all diverged at once
        speed = workers * measured if measured > 0 else speed
    return epochs * ROUGHLY / speed / 60


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> int:
    """Run the command, whose words are in the module's docstring; its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is defined")
    commands.add_parser("status", help="what there is")
    training = commands.add_parser("run", help="train what a record lacks")
    training.add_argument("name", choices=EXPERIMENTS)
    training.add_argument("--again", action="store_true", help="delete it first")
    training.add_argument("--workers", type=int, default=1, help="of one thread each")
    training.add_argument("--device", help="the experiment's own if left out")
    training.add_argument("--minutes", type=float, default=math.inf,
                          help="after which no training begins")  # fmt: skip
    everything = commands.add_parser("gpu", help="all that wants a GPU")
    everything.add_argument("--minutes", type=float, default=10, help="to end in")
    everything.add_argument("--dry-run", action="store_true", help="say what and stop")
    everything.add_argument("--device", default="cuda", help="cpu for a trial")
    everything.add_argument("--workers", type=int, default=3, help="on the one GPU")
    commands.add_parser("checkpoint", help="the network that notebook 09 loads")
    options = parser.parse_args(arguments)
    if options.command == "run":
        return run(options, folder)
    if options.command == "gpu":
        return gpu(options, folder)
    if options.command == "checkpoint":
        checkpoint(read_results(folder)["cifar10-small"], CHECKPOINTS)
        return 0
    found = read_results(folder)
    for name, experiment in EXPERIMENTS.items():
        is_list = options.command == "list"
        text = experiment.title if is_list else status(name, found.get(name))
        print(f"{name}: {text}")
    return 0


def run(options: argparse.Namespace, folder: Path) -> int:
    """Train what the record of an experiment lacks, in one or more processes."""
    name = options.name
    plan = dict(vars(EXPERIMENTS[name]))
    plan["device"] = device = options.device or plan["device"]
    del plan["title"]
    is_missing = device == "cuda" and not torch.cuda.is_available()
    if options.again and not is_missing:
        shutil.rmtree(folder / name, ignore_errors=True)
    state = status(name, read_results(folder).get(name))
    if state.startswith("complete") and not options.again:
        print(f"{name}: {state}, nothing trained; see --again")
        return 0
    if is_missing:
        print(f"{name} is made for a GPU and there is none; see --device")
        return 1
    pool: Any = nullcontext()
    if options.workers > 1:
        threads = {"initializer": torch.set_num_threads, "initargs": (1,)}
        pool = ProcessPoolExecutor(options.workers, get_context("spawn"), **threads)
    try:
        with pool as executor:
            limits = {"path": folder / name, "limit": 60 * options.minutes}
            done = cpnb.compare(**plan, executor=executor, **limits)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the next training")
        return 130
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        # No data set and no way to get it, another definition, no room on the GPU.
        print(f"{name}: {type(error).__name__}, {error}")
        return 1
    print(done.table().to_string())
    return 0


def gpu(options: argparse.Namespace, folder: Path) -> int:
    """Test and time on a GPU, then train what `GUESSES` lists, in that order."""
    steps = {
        "the tests on a GPU": [
            *("-m", "pytest", "-q", "-o", "addopts=", "--noconftest"),
            "tests/test_cuda.py",
        ],
        "milliseconds per step": ["benchmarks/steps.py", "--device", options.device],
    }
    if options.device == "cpu":  # a trial
        few = ["--batches", "8", "--steps", "1", "--turns", "1"]
        steps["milliseconds per step"] += few
    found, workers = read_results(folder), options.workers
    left = {name: minutes_left(name, found.get(name), workers) for name in GUESSES}
    for name in steps:
        print(f"{name}: 1 minute")
    for name, minutes in left.items():
        print(f"{name}: {minutes:.0f} minutes; {EXPERIMENTS[name].title}")
    total = len(steps) + sum(left.values())
    print(f"in all {total:.0f} minutes on one H100, estimated; ", end="")
    print(f"{options.minutes:g} are given", flush=True)
    if options.dry_run:
        return 0
    if options.device == "cpu" and folder == RESULTS:
        folder = Path(tempfile.mkdtemp())
        print(f"a trial, whose records lie in {folder}")
    end = time.monotonic() + 60 * options.minutes
    root = Path(__file__).resolve().parents[1]
    path = {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    where: Any = {"cwd": root, "env": os.environ | path, "timeout": 180}
    results = []
    for name, command in steps.items():
        print(f"\n{name}", flush=True)
        try:
            code = subprocess.run([sys.executable, *command], **where).returncode
        except subprocess.TimeoutExpired as error:
            print(error)
            code = 1
        results.append(code)
        if code:
            print(f"{name}: FAILED", flush=True)
    for name in GUESSES:
        # A training that begins just before the end takes one share of the rest.
        cells = len(EXPERIMENTS[name].recipes) * len(EXPERIMENTS[name].seeds)
        longest = workers * left[name] / cells
        options.minutes = (end - time.monotonic()) / 60 - longest
        if options.minutes <= 0:
            print(f"{name}: no time left")
            continue
        options.name, options.again = name, False
        print(f"\n{name}", flush=True)
        results.append(run(options, folder))
        if results[-1] == 130:
            return 130
    return int(any(results))


def checkpoint(record: Comparison, folder: Path, **settings: Any) -> None:
    """Keep the record's plain network of seed 0, in CP form, too, and a sweep of that.

    A fit may differ in rounding between processors, and a sweep belongs to a network
    bit by bit: so both are kept. ``settings`` replace some of the training's.
    """
    data = EXPERIMENTS["cifar10-small"].data()
    recipe = record.recipe("none", "final")
    network = build(recipe, data, seed=0)
    trained = recipe.settings | {"lr": record.best["none"], "seed": 0} | settings
    trained["augment"] = Augment(**trained["augment"])
    print(cpnb.fit(network, data, **trained))
    rank = fit_rank(0.1, method="als")
    generator = torch.Generator().manual_seed(0)
    form = cpnb.canonicalize(network, rank=rank, init="als", generator=generator)
    folder.mkdir(exist_ok=True)
    kept = {"dense": network.state_dict(), "canonical": form.state_dict()}
    torch.save(kept, folder / "cifar10-small.pt")
    sweep = cpnb.rank_sweep(form, data, key="greedy", refit=True)
    sweep.save(folder / "cifar10-small-sweep.json")


if __name__ == "__main__":
    sys.exit(main())
