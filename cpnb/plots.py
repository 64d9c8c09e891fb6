"""Figures: one function per question, one colour and marker per method.

Each function draws on ``ax``, or on a new figure, and returns the axes. A title states
a finding, so whoever has seen the numbers sets it with ``ax.set_title``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cpnb._figures.courses import axis_label, course, measure_label
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
from cpnb.records import Run

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
    *,
    axis: str = "epoch",
) -> Axes:
    """Course of the training of each method: mean and ± 1 standard deviation.

    Args:
        runs: A run, or runs that differ in the seed, by method. Runs of different
            length are shown over the epochs that all runs of the method completed.
        measure: ``"train_loss"``, ``"train_accuracy"``, ``"validation_loss"``,
            ``"validation_accuracy"`` or ``"seconds"``.
        ax: Axes to draw on.
        axis: ``"epoch"``, or ``"seconds"`` of training, evaluation not counted.

    Returns:
        The axes; the labels name the number of runs.

    Raises:
        ValueError: If there is nothing to draw, or ``measure`` or ``axis`` is unknown.
    """
    curves = {
        name: course(name, [group] if isinstance(group, Run) else group, measure, axis)
        for name, group in runs.items()
    }
    check_any("runs", curves)
    ax, ends = axes_or_new(ax), []
    for number, (style, curve) in enumerate(styled(curves)):
        style = style._replace(label=f"{style.label}, n = {curve.count}")
        if curve.spread is not None:
            band = curve.mean - curve.spread, curve.mean + curve.spread
            ax.fill_between(curve.x, *band, color=style.color, alpha=0.18, linewidth=0)
        ax.plot(
            curve.x,
            curve.mean,
            color=style.color,
            marker=style.marker,
            markevery=marked(len(curve.mean), number, len(curves)),
            label=style.label,
        )
        ends.append((curve.x[-1], curve.mean[-1], style))
    several = any(curve.spread is not None for curve in curves.values())
    ax.set_ylabel(measure_label(measure) + (", mean ± 1 std" if several else ""))
    ax.set_xlabel(axis_label(axis))
    if axis == "epoch":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if measure.endswith("accuracy"):
        ax.yaxis.set_major_formatter(percent)
    label_lines(ax, ends)
    return ax
