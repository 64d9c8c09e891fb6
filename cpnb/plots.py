"""Figures: one function per question, one colour and marker per method.

Each function draws on ``ax``, or on a new figure, and returns the axes. A title states
a finding, so whoever has seen the numbers sets it with ``ax.set_title``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cpnb._figures.landscape import plot_landscape
from cpnb._figures.ranks import (
    plot_lambda_spectrum,
    plot_rank_curve,
    plot_truncation_panel,
)
from cpnb._figures.style import (
    METHOD_STYLES,
    MethodStyle,
    axes_or_new,
    check_any,
    label_lines,
    marked,
    percent,
    styled,
    use_style,
)
from cpnb._figures.tiles import plot_components, plot_images
from cpnb.records import MEASURES, Run

__all__ = [
    "METHOD_STYLES",
    "MethodStyle",
    "plot_components",
    "plot_images",
    "plot_lambda_spectrum",
    "plot_landscape",
    "plot_rank_curve",
    "plot_training",
    "plot_truncation_panel",
    "use_style",
]


def plot_training(
    runs: Mapping[str, Run | Sequence[Run]],
    measure: str = "validation_accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Course of the training of each method: mean and ± 1 standard deviation.

    Args:
        runs: A run, or runs that differ in the seed, by method. Runs of different
            length are shown over the epochs that all runs of the method completed.
        measure: ``"train_loss"``, ``"train_accuracy"``, ``"validation_loss"``,
            ``"validation_accuracy"`` or ``"seconds"``.
        ax: Axes to draw on.

    Returns:
        The axes; the labels name the number of runs.

    Raises:
        ValueError: If there is nothing to draw, or ``measure`` is unknown.
    """
    if measure not in MEASURES:
        raise ValueError(
            f"measure is {measure!r}, expected one of {', '.join(MEASURES)}."
        )
    curves = {
        name: _course(name, [group] if isinstance(group, Run) else group, measure)
        for name, group in runs.items()
    }
    check_any("runs", curves)
    ax, ends = axes_or_new(ax), []
    for number, (style, values) in enumerate(styled(curves)):
        style = style._replace(label=f"{style.label}, n = {len(values)}")
        epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
        if len(values) > 1:
            spread = values.std(0, ddof=1)
            band = mean - spread, mean + spread
            ax.fill_between(epochs, *band, color=style.color, alpha=0.18, linewidth=0)
        ax.plot(
            epochs,
            mean,
            color=style.color,
            marker=style.marker,
            markevery=marked(len(mean), number, len(curves)),
            label=style.label,
        )
        ends.append((epochs[-1], mean[-1], style))
    several = any(len(values) > 1 for values in curves.values())
    name = measure.replace("_", " ") if measure != "seconds" else "seconds per epoch"
    unit = " in nats" if measure.endswith("loss") else ""
    ax.set_ylabel(name + unit + (", mean ± 1 std" if several else ""))
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if measure.endswith("accuracy"):
        ax.yaxis.set_major_formatter(percent)
    label_lines(ax, ends)
    return ax


def _course(name: str, runs: Sequence[Run], measure: str) -> np.ndarray:
    """Values, shape (runs, epochs)."""
    lines = [[record[measure] for record in run.history] for run in runs]
    epochs = min((len(line) for line in lines), default=0)
    values = [line[:epochs] for line in lines]
    if not epochs or any(value is None for line in values for value in line):
        raise ValueError(
            f"runs[{name!r}] hold no {measure}, expected at least one run, each with "
            "at least one epoch that has it."
        )
    return np.array(values)
