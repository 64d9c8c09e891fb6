"""The sweep: one scale per unit, chosen from the input to the output, then applied."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cpnb._rescaling.graph import read_layers
from cpnb._rescaling.layers import WEIGHTED
from cpnb._rescaling.state import carry_state_

LIMIT = 1e6  # no single sweep scales a unit by more, up or down


class Step(NamedTuple):
    """Units whose scales are chosen together, and the layers that matter for them."""

    units: Tensor
    writers: list[int]
    readers: list[int]


class Plan:
    """What a sweep needs to know of a model's connections; read once, used often."""

    def __init__(self, model: nn.Module, before_norm: bool) -> None:
        """Read the model.

        Raises:
            ValueError: If a scale cannot be followed through the model, or it is a
                single layer.
        """
        if isinstance(model, tuple(WEIGHTED)):
            raise ValueError(
                f"model is a {type(model).__name__}, a single layer, whose inputs and "
                "outputs keep their scale. Expected a model of several layers."
            )
        self.layers = read_layers(model, before_norm)
        if not self.layers:
            raise ValueError(
                f"model is a {type(model).__name__} with no layer to rescale, expected "
                "convolutions or linear layers in it. Check the model."
            )
        written = [_units(layer.rows) for layer in self.layers]
        reads = [_units(layer.columns) for layer in self.layers]
        self.steps, seen = [], {0}
        for rows in written:
            new = rows - seen
            seen |= rows
            if new:
                writers, readers = (
                    [n for n, units in enumerate(sets) if units & new]
                    for sets in (written, reads)
                )
                device = self.layers[0].rows.device
                units = torch.tensor(sorted(new), device=device)
                self.steps.append(Step(units, writers, readers))
        self.count = len(seen)
        rows = torch.cat([layer.rows.flatten() for layer in self.layers])
        self.writers = torch.bincount(rows, minlength=self.count)
        cancelled = set().union(*(_units(layer.cancelled) for layer in self.layers))
        free = cancelled - set().union(*reads)
        self.free = torch.zeros(self.count, dtype=torch.bool, device=rows.device)
        self.free[sorted(free - {0})] = True

    @torch.no_grad()
    def scales(self, mode: str, c: float) -> Tensor:
        """One scale per unit, from the input to the output; 1 for the fixed unit."""
        dtype = self.dtype
        squares = [layer.squares(dtype) for layer in self.layers]
        scales = torch.ones(self.count, dtype=dtype, device=squares[0].device)
        for units, writers, readers in self.steps:
            rows, columns = torch.zeros_like(scales), torch.zeros_like(scales)
            for n in writers:
                norms = self.layers[n].row_squares(squares[n], scales)
                rows.index_add_(0, self.layers[n].rows.flatten(), norms)
            for n in readers:
                norms = self.layers[n].column_squares(squares[n], scales)
                columns.index_add_(0, self.layers[n].columns.flatten(), norms)
            rows, columns = rows[units], columns[units]
            unit = c / (rows / self.writers[units]).sqrt()
            if mode == "unit":
                chosen = unit
            else:
                balanced = (columns / rows).sqrt().div(c).sqrt()
                chosen = torch.where(self.free[units], unit, balanced)
            # A zero row or column, or one that is not finite, stays as it is.
            usable = chosen.isfinite() & (chosen > 0)
            scales[units] = torch.where(usable, chosen.clamp(1 / LIMIT, LIMIT), 1)
        return scales

    @torch.no_grad()
    def apply_(
        self, scales: Tensor, optimizer: Optimizer | None, gradients: bool
    ) -> None:
        """Multiply parameters, optimizer state, running statistics and gradients."""
        changes = [layer.change(scales) for layer in self.layers]
        for layer, change in zip(self.layers, changes, strict=True):
            if gradients:
                change.carry_([parameter.grad for parameter in change.parameters])
            if optimizer is not None:
                carry_state_(change, optimizer)
            for parameter, factor in zip(
                change.parameters, change.factors, strict=True
            ):
                parameter.mul_(factor)
            layer.cancel_(scales)

    def by_layer(self, values: Tensor) -> dict[str, Tensor]:
        """One value per unit, spread to the rows of each layer."""
        return {layer.name: values[layer.rows.flatten()] for layer in self.layers}

    @torch.no_grad()
    def row_norms(self) -> dict[str, Tensor]:
        """Norm of each row of each layer as it is."""
        return {
            layer.name: layer.squares(self.dtype).sum(2).flatten().sqrt()
            for layer in self.layers
        }

    def check_finite(self) -> None:
        """Raise unless every weight is finite."""
        for layer in self.layers:
            for name, parameter in layer.module.named_parameters():
                if not parameter.isfinite().all():
                    raise ValueError(
                        f"{layer.name}.{name} has NaN or infinite entries, expected "
                        "finite weights. Check the training run it came from."
                    )

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the weights, at least float32."""
        widest = torch.float32
        for layer in self.layers:
            for parameter in layer.module.parameters():
                widest = torch.promote_types(widest, parameter.dtype)
        return widest


def _units(units: Tensor | None) -> set[int]:
    return set() if units is None else set(units.flatten().tolist())
