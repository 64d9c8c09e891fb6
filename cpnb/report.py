"""What a truncation costs and saves, in one table."""

import copy
import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from cpnb._tables import html_table, text_table
from cpnb.cp import relative_error
from cpnb.evaluation import accuracy, images_and_labels
from cpnb.surgery import cp_layers, to_dense

Cell = str | int | float | None


@dataclass(frozen=True)
class LayerReport:
    """One layer before and after truncation, or the whole network.

    Attributes:
        layer: Name, ``"total"`` for the network.
        rank_before: Components before.
        rank_after: Components after.
        parameters_before: CP parameters before, bias included; for the network, all
            of its parameters.
        parameters_after: The same, after.
        dense_parameters: The same with dense kernels.
        break_even_rank: R_same; None for the network.
        relative_error: ‖W_before − W_after‖/‖W_before‖; over all kernels taken
            together for the network.
    """

    layer: str
    rank_before: int
    rank_after: int
    parameters_before: int
    parameters_after: int
    dense_parameters: int
    break_even_rank: int | None
    relative_error: float

    def to_row(self) -> dict[str, Cell]:
        """A dict with the ratios spelled out."""
        even = self.break_even_rank
        return asdict(self) | {
            "rank_over_break_even": None if even is None else self.rank_after / even,
            "parameters_over_dense": self.parameters_after / self.dense_parameters,
        }


@dataclass(frozen=True, repr=False)
class TruncationReport:
    """Per layer and in total: components, parameters, error, accuracy, FLOPs.

    Attributes:
        rows: One `LayerReport` per CP layer.
        total: The whole network.
        accuracy_before: Share of right answers before; None without data.
        accuracy_after: The same, after.
        images: Number of images it was measured on.
        dense_flops: FLOPs per image of the dense network; None without data.
        chain_flops: FLOPs per image of the truncated network run as chains.
    """

    rows: tuple[LayerReport, ...]
    total: LayerReport
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    images: int | None = None
    dense_flops: int | None = None
    chain_flops: int | None = None

    def to_rows(self) -> list[dict[str, Cell]]:
        """One dict per layer, then one for the network with accuracy and FLOPs."""
        measured = {
            name: getattr(self, name)
            for name in (
                *("accuracy_before", "accuracy_after", "images"),
                *("dense_flops", "chain_flops"),
            )
        }
        return [*(row.to_row() for row in self.rows), self.total.to_row() | measured]

    def __repr__(self) -> str:
        """A table in plain text."""
        return "\n".join([text_table(_cells(self)), *_notes(self)])

    def _repr_html_(self) -> str:
        notes = "<br>".join(map(html.escape, _notes(self)))
        return f"{html_table(_cells(self))}<p>{notes}</p>"


def truncation_report(
    before: nn.Module, after: nn.Module, data: Any = None
) -> TruncationReport:
    """Compare a truncated network with the one it came from, and with a dense one.

    Args:
        before: The network before truncation (or any CP form of it).
        after: The same network with other ranks.
        data: A data set (its validation split is used) or a pair
            ``(images, labels)``; None leaves out accuracy and FLOPs.

    Returns:
        The report; print it, show it in a notebook, or take its ``to_rows()``.

    Raises:
        ValueError: If the two do not have the same CP layers with the same kernel
            shapes, or there is none.

    >>> from cpnb import CPLinear, truncate
    >>> layer = CPLinear(20, 10, rank=6)
    >>> truncation_report(layer, truncate(layer, rank=3)).total.parameters_after
    104
    """
    pairs = _paired(cp_layers(before), cp_layers(after))
    rows, squares = [], torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for name, (old, new) in pairs.items():
            kernel, cut = old.weight.double().cpu(), new.weight.double().cpu()
            squares += torch.stack(
                [(kernel - cut).square().sum(), kernel.square().sum()]
            )
            rows.append(
                LayerReport(
                    layer=name or type(new).__name__,
                    rank_before=old.rank,
                    rank_after=new.rank,
                    parameters_before=old.parameters_at(old.rank),
                    parameters_after=new.parameters_at(new.rank),
                    dense_parameters=new.dense_parameters,
                    break_even_rank=new.break_even_rank,
                    relative_error=relative_error(kernel, cut).item(),
                )
            )
    parameters = _count(after)
    total = LayerReport(
        layer="total",
        rank_before=sum(row.rank_before for row in rows),
        rank_after=sum(row.rank_after for row in rows),
        parameters_before=_count(before),
        parameters_after=parameters,
        dense_parameters=parameters
        + sum(row.dense_parameters - row.parameters_after for row in rows),
        break_even_rank=None,
        relative_error=(squares[0] / squares[1]).sqrt().item() if squares[1] else 0.0,
    )
    if data is None:
        return TruncationReport(tuple(rows), total)
    images, labels = images_and_labels(data)
    return TruncationReport(
        tuple(rows),
        total,
        accuracy_before=accuracy(before, (images, labels)),
        accuracy_after=accuracy(after, (images, labels)),
        images=len(labels),
        dense_flops=_flops(to_dense(before), images[:1]),
        chain_flops=_flops(_as_chains(after), images[:1]),
    )


def _paired(
    before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]
) -> dict[str, tuple[Any, Any]]:
    shapes = [
        {name: layer.kernel_shape for name, layer in layers.items()}
        for layers in (before, after)
    ]
    if not before or shapes[0] != shapes[1]:
        raise ValueError(
            f"after has the CP layers {shapes[1]}, expected those of before, at least "
            f"one: {shapes[0]}. Pass a network and its truncated copy."
        )
    return {name: (before[name], after[name]) for name in before}


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _as_chains(model: nn.Module) -> nn.Module:
    chains = copy.deepcopy(model)
    for layer in cp_layers(chains).values():
        layer.forward_mode = "chain"
    return chains


def _flops(model: nn.Module, image: torch.Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    first = next(model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image.to(first.device, first.dtype))
    return counter.get_total_flops()


def _cells(report: TruncationReport) -> list[list[str]]:
    table = [
        ["layer", "components", "R/R_same", "parameters", "of dense", "kernel error"]
    ]
    for row in (*report.rows, report.total):
        values = row.to_row()
        share = values["rank_over_break_even"]
        table.append(
            [
                row.layer,
                f"{row.rank_before} -> {row.rank_after}",
                "" if share is None else f"{share:.2f}",
                f"{row.parameters_before:,} -> {row.parameters_after:,}",
                f"{values['parameters_over_dense']:.1%}",
                f"{row.relative_error:.3f}",
            ]
        )
    return table


def _notes(report: TruncationReport) -> list[str]:
    if report.images is None:
        return []
    return [
        f"accuracy {report.accuracy_before:.2%} -> {report.accuracy_after:.2%} on "
        f"{report.images:,} images",
        f"FLOPs per image: dense {report.dense_flops:,}, truncated as chains "
        f"{report.chain_flops:,} ({report.chain_flops / report.dense_flops:.1%})",
    ]
