"""What the truncation experiments measure on a trained network."""

from __future__ import annotations

from typing import Any

from torch import nn

from cpnb.data import Dataset
from cpnb.evaluation import accuracy
from cpnb.training import fit
from cpnb.truncation import truncate

KEPT = (1.0, 0.9, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)


def truncation_curve(
    network: nn.Module, data: Dataset, seed: int, *, key: str, **settings: Any
) -> dict[str, Any]:
    """Cut a network to fractions of its components, and train it on.

    Args:
        network: With CP layers; it is not changed.
        data: Trained on is its training split, read for the accuracies its test split.
        seed: Seed of the fine-tuning.
        key: What to keep, as `cpnb.truncate` takes it.
        settings: How to fine-tune, as `cpnb.fit` takes it.

    Returns:
        Lists over `KEPT`: the fractions ``keep``, the ``parameters`` of the network,
        and its test accuracy ``before`` and ``after`` fine-tuning, None if that
        diverged.
    """
    curve: dict[str, list[Any]] = {"keep": [], "parameters": []}
    curve |= {"before": [], "after": []}
    for keep in KEPT:
        cut = truncate(network, keep=keep, key=key)
        curve["keep"].append(keep)
        curve["parameters"].append(sum(p.numel() for p in cut.parameters()))
        curve["before"].append(round(accuracy(cut, data.test), 5))
        run = fit(cut, data, seed=seed, progress=False, **settings)
        if run.status == "interrupted":
            raise KeyboardInterrupt
        done = run.status == "finished"
        curve["after"].append(round(accuracy(cut, data.test), 5) if done else None)
    return curve
