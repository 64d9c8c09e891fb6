"""Run the trainings of one call: one bar, one checkpoint for each, Ctrl-C for all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cpnb._training.checkpoint import Checkpoint
from cpnb._training.loop import Training
from cpnb.evaluation import preserved_flags
from cpnb.records import Run


def run_all(
    trainings: Sequence[Training],
    checkpoint: str | os.PathLike[str] | None,
    progress: bool,
) -> None:
    """Run trainings one after the other; Ctrl-C ends this one and those to come.

    Args:
        trainings: What to run.
        checkpoint: File of the only training; several have one each, numbered.
        progress: Whether to show a bar.

    Raises:
        FileNotFoundError: If the folder of the checkpoint does not exist.
        ValueError: If the checkpoint of any training is damaged, of another training,
            or kept in the other way; no model has changed then.
    """
    models = [model for training in trainings for model in training.networks.models]
    runs = [run for training in trainings for run in training.runs]
    images = sum(training.images for training in trainings)
    paths = _paths(checkpoint, len(trainings), len(models))
    kept = [
        None if path is None else Checkpoint(path, training)
        for path, training in zip(paths, trainings, strict=True)
    ]
    for state in kept:
        if state is not None:
            state.check()
    with _progress_bar(images, progress) as bar, preserved_flags(nn.ModuleList(models)):
        for n, training in enumerate(trainings):
            if any(run.status == "interrupted" for run in runs):
                training.runs[0].status = "interrupted"
                continue
            place = f"network {n + 1}/{len(models)}, " if len(trainings) > 1 else ""
            training.run(bar, place, kept[n])
        if ending := _ending(runs):
            bar.set_description(ending)


def _paths(
    checkpoint: str | os.PathLike[str] | None, trainings: int, models: int
) -> list[Path] | list[None]:
    """Where each training keeps its state; refuse states kept in the other way."""
    if checkpoint is None:
        return [None] * trainings
    whole = Path(checkpoint)
    numbered = [whole.with_stem(f"{whole.stem}-{n}") for n in range(models)]
    alone = trainings == models
    if models > 1 and (other := whole if alone else numbered[0]).exists():
        raise ValueError(
            f"checkpoint {other} is of networks trained "
            f"{'in one graph' if alone else 'one after the other'}, expected the way "
            f"of this call. Set vectorise={alone} to go on from it, or delete it."
        )
    return numbered if alone and models > 1 else [whole]


def _ending(runs: Sequence[Run]) -> str:
    """What is to be said of runs that did not finish."""
    unfinished = [run for run in runs if run.status != "finished"]
    if not unfinished:
        return ""
    first = unfinished[0]
    text = f"{first.status} in epoch {len(first.history) + 1}"
    return text if len(runs) == 1 else f"{len(unfinished)} of {len(runs)} {text}"


def _progress_bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not progress, unit=" images", mininterval=0.5)
