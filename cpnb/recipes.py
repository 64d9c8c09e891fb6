"""Recipes: networks, how they are normalised and how they are trained, by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpnb._compare.describe import describe
from cpnb.data import Dataset
from cpnb.hooks import Hook
from cpnb.models import AlexNet, DigitsNet, LeNet
from cpnb.normalizers import NORMALIZERS, normalize
from cpnb.resnet import VGG, ResNet
from cpnb.training import fit

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "DigitsNet": DigitsNet,
    "LeNet": LeNet,
    "AlexNet": AlexNet,
    "ResNet-20": partial(ResNet, 20),
    "ResNet-32x2": partial(ResNet, 32, 2),
    "VGG": VGG,
}
"""Networks by name; each is called with ``num_classes`` and ``generator``."""

# A network's random numbers and the order of the images come from different seeds.
_START_SEED_OFFSET = 1_000_000
_START_IMAGES = 256
_SET_BY_COMPARE = {"model", "data", "seed", "seeds", "hooks", "progress", "callback"}
_SET_BY_COMPARE |= {"checkpoint"}


@dataclass(frozen=True)
class Recipe:
    """How a network is made and trained: what `cpnb.compare` compares.

    A recipe travels to other processes, so that a function in it must be importable
    there, and into records, which hold its description.

    Attributes:
        name: Its name in tables, figures and files: letters, digits and ``+-_.``.
        network: A name in `NETWORKS`, or a function ``(generator) -> network``.
        normalizer: A key of `cpnb.NORMALIZERS`, or a function
            ``(network, **options) -> network``.
        options: Keyword arguments of the normalizer. One that takes a ``generator`` or
            ``data``, a batch of images, is given these.
        hooks: Functions without arguments, each of which makes a `cpnb.hooks.Hook` for
            one training; `functools.partial` gives them arguments.
        settings: Keyword arguments of `cpnb.fit`.
        measure: More to measure on each tested network: a function ``(network, data,
            seed) -> dict`` of numbers and lists, called last.

    Raises:
        TypeError: If a part cannot be described.
        ValueError: If ``name`` is no file name, the network is unknown, or ``settings``
            holds what `cpnb.fit` does not take.

    >>> Recipe("small", "DigitsNet", "canonical", {"rank": 0.5}, settings={"epochs": 2})
    Recipe('small': DigitsNet, canonical, rank=0.5; epochs=2)
    """

    name: str
    network: str | Callable[[torch.Generator], nn.Module]
    normalizer: str | Callable[..., nn.Module] = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    hooks: tuple[Callable[[], Hook], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    measure: Callable[[nn.Module, Any, int], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Check what would otherwise fail after the first training."""
        if not re.fullmatch(r"[\w+.-]+", self.name):
            raise ValueError(
                f"name is {self.name!r}, expected letters, digits and +-_. only: "
                "a record's file is called so."
            )
        if isinstance(self.network, str) and self.network not in NETWORKS:
            raise ValueError(
                f"network is {self.network!r}, expected one of "
                f"{', '.join(map(repr, NETWORKS))} or a function of a generator."
            )
        if isinstance(self.normalizer, str) and self.normalizer not in NORMALIZERS:
            raise ValueError(
                f"normalizer is {self.normalizer!r}, expected one of "
                f"{', '.join(map(repr, NORMALIZERS))} or a function of a network."
            )
        known = inspect.signature(fit).parameters.keys() - _SET_BY_COMPARE
        if unknown := self.settings.keys() - known:
            raise ValueError(
                f"settings holds {sorted(unknown)}, expected arguments of cpnb.fit "
                f"among {sorted(known)}."
            )
        self.describe()

    def describe(self) -> dict[str, Any]:
        """The recipe in the types of JSON; equal for equal recipes."""
        return {
            name: describe(getattr(self, name), name)
            for name in self.__dataclass_fields__
        }

    def build(self, data: Dataset, seed: int) -> nn.Module:
        """Make the network of one seed.

        Args:
            data: Says the number of classes and the device. A start that depends on
                images gets the first training images.
            seed: Seed of everything random in the start.

        Returns:
            The normalised network.
        """
        generator = torch.Generator().manual_seed(seed + _START_SEED_OFFSET)
        if isinstance(self.network, str):
            classes = len(data.classes)
            made = NETWORKS[self.network](num_classes=classes, generator=generator)
        else:
            made = self.network(generator)
        made = made.to(data.train.images.device)
        if callable(self.normalizer):
            make, known = self.normalizer, inspect.signature(self.normalizer).parameters
        else:
            make = partial(normalize, name=self.normalizer)
            known = NORMALIZERS[self.normalizer].options
        options = dict(self.options)
        if "generator" in known:
            options["generator"] = generator
        if "data" in known:
            options["data"] = _first_images(data)
        return make(made, **options)

    def __repr__(self) -> str:
        """Name, network and normalizer, then the settings."""
        said = self.describe()

        def words(entries: Mapping[str, Any]) -> list[str]:
            return [f"{name}={entry!r}" for name, entry in entries.items()]

        parts = [str(said["network"]), str(said["normalizer"]), *words(said["options"])]
        text = f"{self.name!r}: {', '.join(parts)}"
        if said["settings"]:
            text += f"; {', '.join(words(said['settings']))}"
        return f"Recipe({text})"


def _first_images(data: Dataset) -> Tensor:
    images, labels = (part[:_START_IMAGES] for part in data.train)
    return replace(data.train, images=images, labels=labels).standardized()
