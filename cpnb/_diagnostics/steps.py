"""How far does a step turn the weights: effective learning rates, growing columns."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cpnb._checks import check_module, check_positive
from cpnb._diagnostics.measuring import as_measured
from cpnb._tables import html_table, text_table
from cpnb.evaluation import images_and_labels, placement

_IMAGES = 64  # to tell whether the function changes
_TOLERANCE = 1e-3  # batch norm's ε keeps it from being scale-invariant exactly
_PARTS = {0: "row", 1: "column", None: "whole"}


@dataclass(frozen=True)
class EffectiveStep:
    """A parameter whose length does not matter, and the steps of its parts.

    Attributes:
        part: What may be scaled by itself: each ``"row"`` (an output's weights), each
            ``"column"`` (a factor vector), or only the ``"whole"``.
        norms: 2-norm of each part.
        rates: ``lr / norm²``, the learning rate with which a part of unit norm would
            turn as far; infinite for a part that is zero.
    """

    part: str
    norms: tuple[float, ...] = field(repr=False)
    rates: tuple[float, ...] = field(repr=False)

    @property
    def typical(self) -> float:
        """The median of the rates."""
        return statistics.median(self.rates)


@dataclass(frozen=True, repr=False)
class StepReport:
    """The effective learning rates of a model's scale-invariant parameters.

    Attributes:
        lr: The learning rate.
        parameters: `EffectiveStep` by parameter name.
    """

    lr: float
    parameters: dict[str, EffectiveStep]

    def growth(self, start: "StepReport") -> dict[str, float]:
        """Mean growth of the norms since an earlier report; 1 if nothing changed.

        Args:
            start: Report of the same model, with as many parts.

        Raises:
            ValueError: If the reports have different parts.
        """
        counts = [
            {name: len(step.norms) for name, step in report.parameters.items()}
            for report in (start, self)
        ]
        if counts[0] != counts[1]:
            raise ValueError(
                f"start has the parts {counts[0]}, expected {counts[1]} as this "
                "report. Compare reports of one model at one rank."
            )
        return {
            name: statistics.fmean(
                new / old if old else math.inf
                for new, old in zip(
                    step.norms, start.parameters[name].norms, strict=True
                )
            )
            for name, step in self.parameters.items()
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """One dict per parameter."""
        return [
            {
                "parameter": name,
                "part": step.part,
                "parts": len(step.norms),
                "smallest_norm": min(step.norms),
                "largest_norm": max(step.norms),
                "rate": step.typical,
            }
            for name, step in self.parameters.items()
        ]

    def __repr__(self) -> str:
        """A table in plain text."""
        return text_table(self._cells())

    def _repr_html_(self) -> str:
        return html_table(self._cells())

    def _cells(self) -> list[list[str]]:
        table = [["parameter", "parts", "norms", "effective rate (median)"]]
        for row in self.to_rows():
            plural = "" if row["parts"] == 1 or row["part"] == "whole" else "s"
            norms = f"{row['smallest_norm']:.3g} to {row['largest_norm']:.3g}"
            parts = f"{row['parts']} {row['part']}{plural}"
            table.append([row["parameter"], parts, norms, f"{row['rate']:.3g}"])
        return table


@torch.no_grad()
def step_report(model: nn.Module, data: Any, lr: float) -> StepReport:
    """Effective learning rates of every parameter whose length does not matter.

    Where the function stays the same when a vector v is scaled, a gradient is
    orthogonal to v and shrinks with 1/‖v‖, so that a step of plain SGD turns v by an
    angle proportional to ``lr/‖v‖²``. Such are the factor columns of a CP layer, the
    rows of weight normalization and of weight conditioning, and any kernel that batch
    norm follows. Which they are in this model is found by trying: every parameter of
    two modes or more is scaled, and the scores of a few images compared. Batch norm
    takes the statistics of these images, as in training. The model is left as it was.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``.
        data: A data set, of which the training split is used, or a pair
            ``(images, labels)``; of either the first 64 images.
        lr: Learning rate, one number for all parameters.

    Returns:
        The report; empty if every length matters, as in a plain network.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data is malformed or ``lr`` is not positive.

    Source: van Laarhoven 2017, arXiv:1706.05350.

    >>> from cpnb import CPLinear
    >>> net = CPLinear(6, 4, rank=3)
    >>> report = step_report(net, (torch.randn(8, 6), torch.arange(8) % 4), lr=0.1)
    >>> [(row["parameter"], row["parts"], row["part"]) for row in report.to_rows()]
    [('factors.0', 3, 'column'), ('factors.1', 3, 'column')]
    """
    check_module(model)
    lr = check_positive(lr, "lr")
    images, _ = images_and_labels(data, "train")
    images = images[:_IMAGES].to(*placement(model, images))
    found = {}
    with as_measured(model, batch_statistics=True):
        scores = model(images)
        for name, parameter in model.named_parameters():
            part = _free_part(model, name, parameter, images, scores)
            if part is not None:
                found[name] = _step(parameter, part, lr)
    return StepReport(lr, found)


def _free_part(
    model: nn.Module, name: str, parameter: Tensor, images: Tensor, scores: Tensor
) -> str | None:
    """The finest part of a parameter whose scale leaves the scores alone."""
    if parameter.ndim < 2:
        return None
    for axis, part in _PARTS.items():
        shape = [1] * parameter.ndim
        if axis is not None:
            shape[axis] = parameter.shape[axis]
            if shape[axis] == 1:  # that is the whole
                continue
        # Powers of two, so that scaling rounds nothing; no two neighbours alike.
        powers = torch.arange(max(shape), device=parameter.device) % 3 + 1
        scaled = parameter * (2.0**powers).to(parameter.dtype).view(shape)
        changed = functional_call(model, {name: scaled}, (images,))
        if (changed - scores).norm() <= _TOLERANCE * scores.norm():
            return part
    return None


def _step(parameter: Tensor, part: str, lr: float) -> EffectiveStep:
    values = parameter.double()
    if part == "whole":
        norms = values.norm()[None]
    else:
        first = values if part == "row" else values.transpose(0, 1)
        norms = first.flatten(1).norm(dim=1)
    return EffectiveStep(
        part, tuple(norms.tolist()), tuple((lr / norms.square()).tolist())
    )
