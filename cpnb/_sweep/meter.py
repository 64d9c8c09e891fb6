"""Evaluate one network at any ranks, on a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from cpnb._checks import check_count, check_module
from cpnb._sweep.fingerprints import (
    data_fingerprint,
    model_fingerprint,
    order_fingerprint,
)
from cpnb._sweep.flops import count_flops
from cpnb._sweep.points import GLOBAL, SweptLayer
from cpnb._sweep.table import RankSweep
from cpnb.evaluation import evaluate, images_and_labels, placement
from cpnb.importance import check_refit, ranked_layers
from cpnb.ranked import RankedLayer
from cpnb.records import provenance
from cpnb.surgery import cp_layers, replace_layers


class Measurement(NamedTuple):
    """What evaluating a truncated network gives, as `RankSweep.add` takes it.

    Attributes:
        accuracy: Share of images classified correctly, 0 to 1.
        loss: Mean cross entropy in nats; infinite or NaN where the scores are.
        errors: Relative kernel error of every layer.
    """

    accuracy: float
    loss: float
    errors: dict[str, float]


class RankMeter:
    """Evaluates a network at given ranks, ordering each layer's components once.

    Works on a copy of the network; call it from one thread at a time.

    Attributes:
        table: A :class:`RankSweep` of the network without points.
        ranked: Its CP layers at every rank, by name.
        images: What it is measured on. Shape ``(n, ...)``.
        labels: Shape ``(n,)``.
        batch_size: Most images per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        key: str = "lam",
        refit: bool | str = False,
        batch_size: int = 1000,
        generator: torch.Generator | None = None,
        memory: int | None = None,
        progress: bool = True,
    ) -> None:
        """Copy the network and order the components; see :func:`rank_sweep`."""
        check_module(model)
        self.images, self.labels = images_and_labels(data)
        self.batch_size = check_count(batch_size, "batch_size")
        layers = cp_layers(model)
        if not layers:
            raise ValueError(
                f"model is a {type(model).__name__} without a CP layer, expected at "
                "least one. Convert it first with canonicalize(model)."
            )
        self.model, refit = copy.deepcopy(model).eval(), check_refit(refit)
        self.ranked = ranked_layers(
            self.model,
            layers,
            key=key,
            refit=refit,
            data=data,
            generator=generator,
            memory=memory,
            progress=progress,
        )
        # A layer used in several places is replaced in all of them.
        self._places = {
            name: [
                (parent, child)
                for parent in self.model.modules()
                for child, module in parent._modules.items()
                if module is ranked.layer
            ]
            for name, ranked in self.ranked.items()
        }
        self._present: dict[str, tuple[int, nn.Module]] = {}
        device, dtype = placement(model, self.images)
        orders = [ranked.order for ranked in self.ranked.values()]
        hashed = {
            "images_fingerprint": data_fingerprint((self.images, self.labels)),
            "order_fingerprint": order_fingerprint(key, refit, data, orders),
        }
        self.images = self.images.to(dtype)
        outside, flops = count_flops(self.model, self.images[:1].to(device, copy=True))
        inside = {p for layer in layers.values() for p in layer.parameters()}
        self.table = RankSweep(
            layers=tuple(
                _swept(name, ranked, *flops[name])
                for name, ranked in self.ranked.items()
            ),
            other_parameters=sum(
                p.numel() for p in model.parameters() if p not in inside
            ),
            other_flops=outside,
            key=key,
            refit=refit,
            fingerprint=model_fingerprint(model),
            provenance=provenance(device)
            | {
                "dtype": str(dtype).removeprefix("torch."),
                "data": getattr(data, "name", None),
                "images": len(self.images),
                **hashed,
            },
            axes=(*self.ranked, GLOBAL),
        )

    def measure(self, ranks: Mapping[str, int]) -> Measurement:
        """Evaluate the truncated network, one layer after the other.

        Args:
            ranks: Components of every CP layer.

        Returns:
            What was found.
        """
        found = evaluate(
            self.truncated(ranks),
            (self.images, self.labels),
            batch_size=self.batch_size,
        )
        return Measurement(found["accuracy"], found["loss"], self.errors(ranks))

    def errors(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Relative kernel error of every layer."""
        return {name: self.ranked[name].error(rank) for name, rank in ranks.items()}

    def cut(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """A truncated copy of the network that the meter was made for.

        Args:
            model: That network.
            ranks: Components of its CP layers; those left out stay whole.

        Returns:
            What `cpnb.truncate` gives for the same ranks.
        """
        layers = cp_layers(model)
        kept = {name: self.ranked[name].cut(rank) for name, rank in ranks.items()}
        for name, layer in kept.items():
            layer.train(layers[name].training)
        return replace_layers(model, kept)

    def truncated(self, ranks: Mapping[str, int]) -> nn.Module:
        """The network at some ranks, until they are changed."""
        for name, rank in ranks.items():
            if name not in self._present or self._present[name][0] != rank:
                cut = self.ranked[name].cut(rank)
                for parent, child in self._places[name]:
                    setattr(parent, child, cut)
                self._present[name] = rank, cut
        return self._present[""][1] if "" in self._present else self.model


def _swept(
    name: str, ranked: RankedLayer, component_flops: int, dense_flops: int
) -> SweptLayer:
    layer = ranked.layer
    fixed = 2 * layer.parameters_at(1) - layer.parameters_at(2)
    return SweptLayer(
        name=name,
        kind=type(layer).__name__,
        kernel_shape=tuple(layer.kernel_shape),
        kernel_norm=ranked.norm,
        rank=layer.rank,
        break_even_rank=layer.break_even_rank,
        dense_parameters=layer.dense_parameters,
        fixed_parameters=fixed,
        component_parameters=layer.parameters_at(1) - fixed,
        dense_flops=dense_flops,
        component_flops=component_flops,
    )
