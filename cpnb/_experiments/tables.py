"""The recipes that the experiments compare, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import sqrt
from typing import Any

from cpnb._experiments.starts import unified_small
from cpnb._experiments.truncation import truncation_curve
from cpnb.budgets import ParameterRatio
from cpnb.factorization import factorize
from cpnb.frobenius import FrobeniusDecay
from cpnb.nested import NestedRank
from cpnb.recipes import Recipe

# The authors' ranks, read from their public code.
LENET_RANKS = {"conv1": 11, "conv2": 270, "fc1": 128, "fc2": 10}
ALEXNET_RANKS = {
    **{"conv1": 36, "conv2": 571, "conv3": 1626, "conv4": 1948, "conv5": 1644},
    **{"fc1": 1024, "fc2": 512, "fc3": 10},
}
RANKS = {"LeNet": LENET_RANKS, "AlexNet": ALEXNET_RANKS}

# Normalizers with their options. Standardized kernels want a norm layer behind them;
# these networks have none, so that a gain takes its place.
PEERS: dict[str, Mapping[str, Any]] = {
    "none": {},
    "batch": {},
    "weight": {},
    "weight_data_init": {},
    "spectral": {},
    "standardized": {"gain": sqrt(2)},
    "conditioned": {},
    "scaling": {},
    "oni": {},
}
STARTS = ("unified", "gaussian", "uniform", "power")


def normalizations(
    network: str,
    *,
    peers: Sequence[str] = tuple(PEERS),
    starts: Sequence[str] = STARTS,
    **settings: Any,
) -> tuple[Recipe, ...]:
    """The peers, and the canonical form at the authors' ranks from each start."""
    others = [
        Recipe(name, network, name, PEERS[name], settings=settings) for name in peers
    ]
    canonical = [
        Recipe(
            f"canonical-{start}",
            network,
            "canonical",
            {"rank": RANKS[network], "init": start},
            settings=settings,
        )
        for start in starts
    ]
    return (*others, *canonical)


def starts(**settings: Any) -> tuple[Recipe, ...]:
    """A LeNet in canonical form from every start there is."""
    named = {name: name for name in ("unified", "power")}
    named |= {"unified_small": unified_small}
    named |= {name: name for name in ("als", "gaussian", "uniform")}
    return tuple(
        Recipe(
            name,
            "LeNet",
            "canonical",
            {"rank": LENET_RANKS, "init": init},
            settings=settings,
        )
        for name, init in named.items()
    )


def compressed(network: str, share: float, **settings: Any) -> tuple[Recipe, ...]:
    """A network, and the same with a share of its parameters, factorised in six ways.

    The first and the last layer stay dense. Spectral initialisation (SI) splits the
    dense start; Frobenius decay (FD) takes the place of the factors' weight decay.
    """
    rank = ParameterRatio(share)
    low_rank = {init: {"rank": rank, "init": init} for init in ("kaiming", "spectral")}
    canonical = {"rank": rank, "init": "unified", "skip": ("conv1", "fc")}
    rows = (
        ("dense", "none", {}, ()),
        ("low-rank", factorize, low_rank["kaiming"], ()),
        ("SI", factorize, low_rank["spectral"], ()),
        ("FD", factorize, low_rank["kaiming"], (FrobeniusDecay,)),
        ("SI+FD", factorize, low_rank["spectral"], (FrobeniusDecay,)),
        ("CP", "canonical", canonical, ()),
        # Before a batch norm decay would take σ to zero.
        ("CP+FD", "canonical", canonical, (partial(FrobeniusDecay, scale=False),)),
    )
    return tuple(
        Recipe(name, network, normalizer, options, hooks, settings)
        for name, normalizer, options, hooks in rows
    )


def batch_normed(**settings: Any) -> tuple[Recipe, ...]:
    """A ResNet-20, which has batch norm already, with its kernels normalised too."""
    return tuple(
        Recipe(name, "ResNet-20", name, settings=settings)
        for name in ("none", "weight", "conditioned", "scaling", "canonical")
    )


def truncations(
    network: str, fine_tuning: Mapping[str, Any], **settings: Any
) -> tuple[Recipe, ...]:
    """A canonical network trained as it is, and one trained to be cut anywhere."""
    return tuple(
        Recipe(
            name,
            network,
            "canonical",
            {"rank": RANKS[network], "init": "unified"},
            hooks=hooks,
            settings=settings,
            measure=partial(truncation_curve, key=key, **fine_tuning),
        )
        for name, hooks, key in (
            ("plain", (), "lam"),
            ("nested", (NestedRank,), "nested"),
        )
    )
