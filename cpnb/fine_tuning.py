"""Training after truncation, at once or in several cuts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cpnb._checks import check_count
from cpnb.evaluation import accuracy
from cpnb.records import Run
from cpnb.surgery import cp_layers
from cpnb.training import fit
from cpnb.truncation import truncate, wanted_ranks


@dataclass(frozen=True)
class TruncationStage:
    """One cut of a gradual truncation, and the training after it.

    Attributes:
        ranks: Components of every CP layer after the cut.
        accuracy_after_cut: Validation accuracy before the training.
        accuracy_after_training: Validation accuracy after it; NaN if Ctrl-C came first.
        run: Record of the training.
    """

    ranks: dict[str, int]
    accuracy_after_cut: float
    accuracy_after_training: float
    run: Run


def fine_tune(
    model: nn.Module, data: Any, *, epochs: int = 5, lr: float = 1e-3, **options: Any
) -> Run:
    """Train a truncated network in place, with an optimizer of its own.

    `cpnb.fit` with a smaller rate and fewer epochs. The optimizer is built here from
    the parameters that the network has now: one built before the cut holds parameters
    that are no longer there, and would train nothing.

    Args:
        model: The network.
        data: As in `cpnb.fit`.
        epochs: Passes over the training images.
        lr: Learning rate.
        options: As in `cpnb.fit`.

    Returns:
        The record of the run.

    Raises:
        TypeError: As `cpnb.fit`.
        ValueError: As `cpnb.fit`; an optimizer that exists already is refused.

    >>> import torch, cpnb
    >>> data = torch.randn(64, 20), torch.arange(64) % 4
    >>> small = cpnb.truncate(cpnb.CPLinear(20, 4, rank=6), rank=2)
    >>> fine_tune(small, data, epochs=1, progress=False).status
    'finished'
    """
    return fit(model, data, epochs=epochs, lr=lr, **options)


def truncate_gradually(
    model: nn.Module,
    data: Any,
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    steps: int = 4,
    epochs: int = 2,
    lr: float = 1e-3,
    key: str = "lam",
    refit: bool | str = False,
    **options: Any,
) -> tuple[nn.Module, list[TruncationStage]]:
    """Cut a network in several steps, with training after each.

    Every layer loses the same share of its components in each step (a geometric
    schedule), so that no cut is deep and training can mend each.

    Args:
        model: The network; it is not touched.
        data: As in `cpnb.fit`; its validation split measures the accuracies, or the
            pair ``validation=`` in ``options``, or else the training images.
        rank: Final ranks, as in `cpnb.truncate`.
        keep: Final share of the components, instead of ``rank``.
        steps: Number of cuts.
        epochs: Epochs of training after each cut.
        lr: Learning rate of that training.
        key: Importance that orders the components, see `cpnb.truncate`; what looks at
            images looks at those of ``data`` that are trained on.
        refit: Whether to re-solve λ after each cut, and on what.
        options: As in `cpnb.fit`. Of a ``checkpoint`` each stage gets its own file,
            with its number in the name, so that the same call goes on where it was.

    Returns:
        The truncated and trained network, and one `TruncationStage` per cut. After
        Ctrl-C or divergence these are the stages so far: fewer, or the last one with a
        run that says so. Ctrl-C before the first training raises KeyboardInterrupt.

    Raises:
        TypeError: As `cpnb.truncate` and `cpnb.fit`.
        ValueError: As `cpnb.truncate` and `cpnb.fit`, and if ``steps`` is below 1.
    """
    steps = check_count(steps, "steps")
    goal = wanted_ranks(model, rank=rank, keep=keep)
    whole = {name: layer.rank for name, layer in cp_layers(model).items()}
    how = {"key": key, "refit": refit, "progress": options.get("progress", True)}
    measured = options.get("validation") or data
    checkpoint = options.pop("checkpoint", None)
    stages: list[TruncationStage] = []
    for step in range(1, steps + 1):
        ranks = {
            name: max(last, round(whole[name] * (last / whole[name]) ** (step / steps)))
            for name, last in goal.items()
        }
        if checkpoint is not None:
            path = Path(checkpoint)
            options["checkpoint"] = path.with_stem(f"{path.stem}-{step}")
        try:
            cut = truncate(model, rank=ranks, data=data, **how)
            before = accuracy(cut, measured)
            run = fine_tune(cut, data, epochs=epochs, lr=lr, **options)
        except KeyboardInterrupt:
            if not stages:
                raise
            break
        model, interrupted = cut, False
        try:
            after = accuracy(model, measured)
        except KeyboardInterrupt:
            after, interrupted = math.nan, True
        found = {name: layer.rank for name, layer in cp_layers(model).items()}
        stages.append(TruncationStage(found, before, after, run))
        if interrupted or run.status != "finished":
            break
    return model, stages
