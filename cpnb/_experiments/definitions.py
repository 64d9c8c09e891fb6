"""Every experiment whose records the notebooks read, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cpnb._experiments.tables import (
    batch_normed,
    compressed,
    normalizations,
    starts,
    truncations,
)
from cpnb.augmentation import Augment
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
    """

    name: str
    title: str
    data: Callable[[], Dataset]
    recipes: tuple[Recipe, ...]
    tune: Mapping[str, Sequence[float]]
    tune_seeds: Sequence[int]
    seeds: Sequence[int]
    device: str = "cuda"


def experiment_data(
    name: str, train_size: int | None = None, validation_size: int | None = None
) -> Dataset:
    """Load what an experiment trains on, with the first of the validation images."""
    data = load_data(name, train_size=train_size)
    images, labels = (part[:validation_size] for part in data.validation)
    return replace(
        data, validation=replace(data.validation, images=images, labels=labels)
    )


def _all(name: str) -> Callable[[], Dataset]:
    return partial(experiment_data, name)


def _first(name: str, count: int) -> Callable[[], Dataset]:
    return partial(experiment_data, name, train_size=count, validation_size=1000)


# The authors' settings: no momentum, no weight decay, a constant rate.
_SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "schedule": None}
_RMSPROP: dict[str, Any] = {"optimizer": "rmsprop", "schedule": None}
_SGD_RATES = {"lr": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)}
_RMSPROP_RATES = {"lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
_ADAM_RATES = {"lr": (3e-4, 1e-3, 3e-3, 1e-2)}
# A few steps are enough to show who starts fast; twice as many for the same images.
_SHORT: dict[str, Any] = {"epochs": 4, "batch_size": 32}
_LENET: dict[str, Any] = {"epochs": 20, "batch_size": 64}
_ALEXNET: dict[str, Any] = {"epochs": 40, "batch_size": 128}
_MOVED = Augment(crop=4, flip=True)

# As in the papers of residual networks; after cutting, Adam goes on gently.
_RESNET: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "schedule": "step"}
_RESNET |= {"batch_size": 128, "augment": _MOVED}
_RESNET_RATES = {"lr": (0.01, 0.03, 0.1, 0.3)}
_AGAIN: dict[str, Any] = {"batch_size": 64, "lr": 1e-3}

_CPU: dict[str, Any] = {"tune_seeds": (100,), "seeds": range(5), "device": "cpu"}
_FIVE: dict[str, Any] = {"tune_seeds": (100, 101), "seeds": range(5)}
_TEN: dict[str, Any] = {"tune_seeds": (100, 101), "seeds": range(10)}

_SMALL = "reduced size for a CPU: 2,000 training images, 4 epochs, 5 seeds"

_DEFINED = (
    Experiment(
        "initialization-mnist",
        "MNIST, LeNet, six starts, reduced size for a CPU: 6,000 training images, "
        "3 epochs, 5 seeds",
        _first("mnist", 6000),
        starts(epochs=3, batch_size=64, optimizer="adam"),
        _ADAM_RATES,
        tune_seeds=(100,),
        seeds=range(5),
        device="cpu",
    ),
    Experiment(
        "initialization-mnist-full",
        "MNIST, LeNet, six starts, full size: all images, 20 epochs, 10 seeds (GPU)",
        _all("mnist"),
        starts(epochs=20, batch_size=64, optimizer="adam"),
        _ADAM_RATES,
        tune_seeds=(100, 101, 102),
        seeds=range(10),
    ),
    Experiment(
        "mnist-lenet-sgd-cpu",
        f"MNIST, LeNet, SGD, {_SMALL}",
        _first("mnist", 2000),
        normalizations("LeNet", **_SGD, **_SHORT),
        _SGD_RATES,
        **_CPU,
    ),
    Experiment(
        "mnist-lenet-rmsprop-cpu",
        f"MNIST, LeNet, RMSprop, {_SMALL}",
        _first("mnist", 2000),
        normalizations("LeNet", **_RMSPROP, **_SHORT),
        _RMSPROP_RATES,
        **_CPU,
    ),
    Experiment(
        "fashion-lenet-sgd-cpu",
        f"Fashion-MNIST, LeNet, SGD, {_SMALL}",
        _first("fashion_mnist", 2000),
        normalizations("LeNet", **_SGD, **_SHORT),
        _SGD_RATES,
        **_CPU,
    ),
    Experiment(
        "mnist-lenet-sgd",
        "MNIST, LeNet, SGD, full size: all images, 20 epochs, 10 seeds (GPU)",
        _all("mnist"),
        normalizations("LeNet", **_SGD, **_LENET),
        _SGD_RATES,
        **_TEN,
    ),
    Experiment(
        "mnist-lenet-rmsprop",
        "MNIST, LeNet, RMSprop, full size: all images, 20 epochs, 10 seeds (GPU)",
        _all("mnist"),
        normalizations("LeNet", **_RMSPROP, **_LENET),
        _RMSPROP_RATES,
        **_TEN,
    ),
    Experiment(
        "fashion-lenet-sgd",
        "Fashion-MNIST, LeNet, SGD, full size: all images, 20 epochs, 5 seeds (GPU)",
        _all("fashion_mnist"),
        normalizations("LeNet", **_SGD, **_LENET),
        _SGD_RATES,
        **_FIVE,
    ),
    Experiment(
        "cifar10-alexnet-sgd",
        "CIFAR-10, AlexNet, SGD, crops and flips, 40 epochs, 5 seeds (GPU)",
        _all("cifar10"),
        normalizations("AlexNet", **_SGD, **_ALEXNET, augment=_MOVED),
        _SGD_RATES,
        **_FIVE,
    ),
    Experiment(
        "svhn-alexnet-sgd",
        "SVHN, AlexNet, SGD, 40 epochs, 5 seeds (GPU); waits for the full data set",
        _all("svhn"),
        normalizations("AlexNet", **_SGD, **_ALEXNET),
        _SGD_RATES,
        **_FIVE,
    ),
    Experiment(
        "svhn-alexnet-sample-cpu",
        "SVHN's first 1,083 crops, AlexNet, SGD, five methods, a sample for a CPU: "
        "5 epochs, 3 seeds",
        _all("svhn_first_1083"),
        normalizations(
            "AlexNet",
            peers=("none", "batch", "weight"),
            starts=("unified", "gaussian"),
            **_SGD,
            **(_SHORT | {"epochs": 5}),
        ),
        {"lr": (0.01, 0.03, 0.1)},
        **(_CPU | {"seeds": range(3)}),
    ),
    Experiment(
        "cifar100-resnet20",
        "CIFAR-100, ResNet-20 with batch norm, SGD with momentum, crops and flips, "
        "60 epochs, 5 seeds (GPU)",
        _all("cifar100"),
        batch_normed(**_RESNET, epochs=60, weight_decay=5e-4),
        _RESNET_RATES,
        **_FIVE,
    ),
    Experiment(
        "cifar10-resnet32x2-tenth",
        "CIFAR-10, ResNet-32×2 at 10 % of its parameters in six factorised forms, SGD "
        "with momentum, crops and flips, 60 epochs, 3 seeds (GPU)",
        _all("cifar10"),
        compressed("ResNet-32x2", 0.1, **_RESNET, epochs=60, weight_decay=1e-4),
        _RESNET_RATES,
        tune_seeds=(100,),
        seeds=range(3),
    ),
    Experiment(
        "cifar10-resnet20-tenth-cpu",
        "CIFAR-10, ResNet-20 at 10 % of its parameters in six factorised forms, SGD "
        "with momentum, crops and flips, reduced size for a CPU: 2,000 training "
        "images, 6 epochs, 5 seeds",
        _first("cifar10", 2000),
        compressed("ResNet-20", 0.1, **_RESNET, epochs=6, weight_decay=1e-4),
        {"lr": (0.03, 0.1)},
        **_CPU,
    ),
    Experiment(
        "truncation-mnist-lenet",
        "MNIST, LeNet cut to 100…5 % of its components, before and after fine-tuning, "
        "trained plainly and nested: all images, 20 epochs, 5 seeds (GPU)",
        _all("mnist"),
        truncations("LeNet", _AGAIN | {"epochs": 5}, **_LENET),
        _ADAM_RATES,
        **_FIVE,
    ),
    Experiment(
        "truncation-mnist-lenet-cpu",
        "MNIST, LeNet cut to 100…5 % of its components, before and after fine-tuning, "
        "trained plainly and nested, reduced size for a CPU: 24,000 training images, "
        "6 epochs, 5 seeds",
        _first("mnist", 24000),
        truncations("LeNet", _AGAIN | {"epochs": 1}, epochs=6, batch_size=32),
        {"lr": (2e-3, 4e-3)},
        **(_FIVE | {"device": "cpu"}),
    ),
    Experiment(
        "truncation-cifar10-alexnet",
        "CIFAR-10, AlexNet cut to 100…5 % of its components, before and after "
        "fine-tuning, trained plainly and nested: crops and flips, 40 epochs, 5 seeds "
        "(GPU)",
        _all("cifar10"),
        truncations(
            "AlexNet",
            _AGAIN | {"epochs": 5, "augment": _MOVED},
            **_ALEXNET,
            augment=_MOVED,
        ),
        _ADAM_RATES,
        **_FIVE,
    ),
)
EXPERIMENTS = {experiment.name: experiment for experiment in _DEFINED}
