"""What a rank explorer shows at one position of its sliders: numbers and words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cpnb._explorer.choices import refit_words
from cpnb._explorer.pareto import Pairs, known_points, pareto_front
from cpnb._sweep.points import GLOBAL, RankPoint
from cpnb._sweep.table import RankSweep


@dataclass(frozen=True)
class ExplorerState:
    """One frame of the explorer, free of pictures and widgets.

    Attributes:
        axis: The layer moved last, or ``"*"``.
        position: Its rank, or the percentage of components kept in all layers.
        last: Largest position.
        point: What is known at the present ranks.
        source: ``"table"``, ``"measured"``, ``"being measured"``, ``"failed"`` or
            ``"not in the table"``.
        accuracy: Known accuracies along the axis, pairs of position and value.
        error: Known relative kernel errors along the axis.
        known: Size over dense and accuracy of every known network, in any order.
        front: Those of them that no other beats, see :func:`pareto_front`.
        largest: Size over dense of the untruncated network.
        present_error: Error at the position, of the layer or of all kernels.
        whole_accuracy: Accuracy of the untruncated network, None if unknown.
        break_even: R_same of the layer, None for ``"*"``.
        budget: Parameters that the allocator was given, in percent of dense; None
            where the ranks were not allocated.
    """

    axis: str
    position: int
    last: int
    point: RankPoint
    source: str
    accuracy: Pairs
    error: Pairs
    known: Pairs
    front: Pairs
    largest: float
    present_error: float | None
    whole_accuracy: float | None
    break_even: int | None
    budget: int | None


def explorer_state(
    sweep: RankSweep,
    ranks: Mapping[str, int],
    axis: str,
    percent: int,
    source: str,
    *,
    budget: int | None = None,
    known: Pairs | None = None,
) -> ExplorerState:
    """Collect what the explorer shows.

    Args:
        sweep: The table.
        ranks: Components of every layer.
        axis: The layer moved last, or ``"*"``.
        percent: Components kept in all layers, in percent; the position on ``"*"``.
        source: Where the accuracy comes from, as in :class:`ExplorerState`.
        budget: Budget that the ranks were allocated for, as in :class:`ExplorerState`.
        known: What ``known_points(sweep)`` gives, where it has been listed before.

    Returns:
        The state.
    """
    point, whole = sweep.point(ranks), sweep.point()
    known = known_points(sweep) if known is None else known
    shared = {
        "axis": axis,
        "point": point,
        "source": source,
        "whole_accuracy": whole.accuracy,
        "known": list(known),
        "front": pareto_front(known),
        "largest": whole.size,
        "budget": budget,
    }
    if axis == GLOBAL:
        curve = [(100 * keep, at) for keep, at in sweep.curve(GLOBAL)]
        return ExplorerState(
            position=percent,
            last=100,
            accuracy=[(x, at.accuracy) for x, at in curve],
            error=[
                (x, at.total_error) for x, at in curve if at.total_error is not None
            ],
            present_error=point.total_error,
            break_even=None,
            **shared,
        )
    layer = sweep.layer(axis)
    return ExplorerState(
        position=ranks[axis],
        last=layer.rank,
        accuracy=[(x, at.accuracy) for x, at in sweep.curve(axis, ranks)],
        error=sweep.errors(axis),
        present_error=point.relative_error[axis],
        break_even=layer.break_even_rank,
        **shared,
    )


def label(name: str) -> str:
    """A layer's name for readers; a bare layer has none."""
    return name or "layer"


def percentage(accuracy: float | None) -> str:
    """An accuracy as it is written everywhere in the explorer."""
    return "unknown" if accuracy is None else f"{100 * accuracy:.2f} %"


def decimal(error: float | None) -> str:
    """A relative error as it is written everywhere in the explorer."""
    return "unknown" if error is None else f"{error:.3f}"


def accuracy_words(state: ExplorerState) -> str:
    """The accuracy and where it comes from."""
    if state.point.accuracy is None:
        return f"accuracy {state.source}"
    return f"accuracy {percentage(state.point.accuracy)} ({state.source})"


def size_words(parameters: int, dense: int) -> str:
    """Parameters against dense; only fewer than dense is called compression."""
    ratio = f"{parameters:,} parameters, {parameters / dense:.2f} × dense ({dense:,})"
    if parameters < dense:
        return f"{ratio}, compression {dense / parameters:.2f}"
    return f"{ratio}, no compression"


def status_lines(state: ExplorerState, sweep: RankSweep) -> list[str]:
    """The numbers of a frame in words, one line for the network and one per layer.

    Args:
        state: The frame.
        sweep: The table it was made from.

    Returns:
        Lines of plain text, not escaped for HTML.
    """
    words = accuracy_words(state)
    images = sweep.provenance.get("images")
    known = images and state.point.accuracy is not None
    over = f" on {images:,} images" if known else ""
    lines = [
        f"{words[0].upper()}{words[1:]}{over}; untruncated "
        f"{percentage(state.whole_accuracy)}.",
        f"Network: {size_words(state.point.parameters, sweep.dense_parameters)}; "
        f"relative kernel error of all layers {decimal(state.point.total_error)}.",
        f"Components ordered by {sweep.key!r}; refit of λ: {refit_words(sweep.refit)}.",
    ]
    if state.budget is not None:
        lines.insert(
            0,
            f"Budget of {state.budget} % of the dense parameters, allocated to the "
            "layers.",
        )
    elif state.axis == GLOBAL:
        lines.insert(0, f"All layers keep {state.position} % of their components.")
    for name, rank in state.point.ranks.items():
        layer = sweep.layer(name)
        share = rank / layer.break_even_rank
        lines.append(
            f"{label(name)}: rank {rank} of {layer.rank}, {share:.2f} × break-even "
            f"rank {layer.break_even_rank}; relative kernel error "
            f"{decimal(state.point.relative_error[name])}; "
            f"{size_words(layer.parameters_at(rank), layer.dense_parameters)}."
        )
    return lines
