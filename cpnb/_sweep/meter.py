"""Evaluate one network at any ranks, on a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cpnb._sweep.fingerprints import data_fingerprint, model_fingerprint
from cpnb._sweep.points import GLOBAL, SweptLayer
from cpnb._sweep.table import RankSweep
from cpnb.cp import relative_error
from cpnb.evaluation import accuracy, images_and_labels, placement
from cpnb.records import provenance
from cpnb.surgery import cp_layers
from cpnb.truncation import component_order, select_components


class RankMeter:
    """Evaluates a network at given ranks, ordering each layer's components once.

    Works on a copy of the network; call it from one thread at a time.

    Attributes:
        table: A :class:`RankSweep` of the network without points.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        key: str = "lam",
        refit: bool = False,
        batch_size: int = 1000,
    ) -> None:
        """Copy the network and order the components; see :func:`rank_sweep`."""
        made_with = _provenance(model, data)
        self.table = empty_table(model, key=key, refit=refit)
        self.table.provenance = made_with
        self._data, self._refit, self._batch_size = data, refit, batch_size
        self._model = copy.deepcopy(model)
        self._layers = cp_layers(self._model)
        self._orders = {
            name: component_order(layer, key) for name, layer in self._layers.items()
        }
        # A layer used in several places is replaced in all of them.
        self._places = {
            name: [
                (parent, child)
                for parent in self._model.modules()
                for child, module in parent._modules.items()
                if module is layer
            ]
            for name, layer in self._layers.items()
        }
        self._present: dict[str, tuple[int, nn.Module, float]] = {}

    def measure(self, ranks: Mapping[str, int]) -> tuple[float, dict[str, float]]:
        """Evaluate the truncated network.

        Args:
            ranks: Components of every CP layer.

        Returns:
            The accuracy, and the relative kernel error of every layer.
        """
        for name, rank in ranks.items():
            if name not in self._present or self._present[name][0] != rank:
                self._cut(name, rank)
        model = self._present[""][1] if "" in self._present else self._model
        errors = {name: error for name, (_, _, error) in self._present.items()}
        return accuracy(model, self._data, batch_size=self._batch_size), errors

    def _cut(self, name: str, rank: int) -> None:
        full = self._layers[name]
        kept = self._orders[name][:rank]
        cut = select_components(full, kept, refit=self._refit)
        for parent, child in self._places[name]:
            setattr(parent, child, cut)
        with torch.no_grad():
            error = relative_error(full.weight, cut.weight).item()
        self._present[name] = rank, cut, error


def empty_table(
    model: nn.Module, *, key: str = "lam", refit: bool = False
) -> RankSweep:
    """A table of the network's CP layers, over every axis, without points.

    Args:
        model: The network.
        key: Importance that orders the components.
        refit: Whether λ is re-solved after each cut.

    Returns:
        The table.

    Raises:
        ValueError: If the model has no CP layer.
    """
    found = cp_layers(model)
    if not found:
        raise ValueError(
            f"model is a {type(model).__name__} without a CP layer, expected at least "
            "one. Convert it first with canonicalize(model)."
        )
    layers = []
    for name, layer in found.items():
        fixed = 2 * layer.parameters_at(1) - layer.parameters_at(2)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(layer.weight).item()
        layers.append(
            SweptLayer(
                name=name,
                kind=type(layer).__name__,
                kernel_shape=tuple(layer.kernel_shape),
                kernel_norm=norm,
                rank=layer.rank,
                break_even_rank=layer.break_even_rank,
                dense_parameters=layer.dense_parameters,
                fixed_parameters=fixed,
                component_parameters=layer.parameters_at(1) - fixed,
            )
        )
    inside = {p for layer in found.values() for p in layer.parameters()}
    outside = sum(p.numel() for p in model.parameters() if p not in inside)
    axes = (*found, GLOBAL)
    return RankSweep(
        tuple(layers), outside, key, refit, model_fingerprint(model), axes=axes
    )


def _provenance(model: nn.Module, data: Any) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module."
        )
    images, _ = images_and_labels(data)
    device, dtype = placement(model, images)
    return provenance(device) | {
        "dtype": str(dtype).removeprefix("torch."),
        "data": getattr(data, "name", None),
        "images": len(images),
        "images_fingerprint": data_fingerprint(data),
    }
