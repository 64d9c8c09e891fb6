"""What a training reads: images on the model's device, and batches of indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cpnb.evaluation import check_scores, evaluation_mode, images_and_labels, place

Pair = tuple[Tensor, Tensor]


def batches_of(order: Tensor, batch_size: int) -> list[Tensor]:
    """Indices of each step's images."""
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def training_pairs(
    model: nn.Module, data: Any, validation: Pair | None, channels_last: bool
) -> tuple[list[Pair], bool]:
    """The pair to train on, the one to validate on if there is one, and the layout."""
    given = [images_and_labels(data, "train")]
    if validation is None and hasattr(data, "validation"):
        validation = data.validation
    if validation is not None:
        given.append(images_and_labels(validation))
    largest = max(int(labels.max()) for _, labels in given)
    for layout in (True, False) if channels_last else (False,):
        pairs = [place(pair, model, channels_last=layout) for pair in given]
        # One image is scored now, so that a misfit shows before anything changes.
        try:
            with evaluation_mode(model), torch.no_grad():
                for images, _ in pairs:
                    check_scores(model(images[:1]), 1, largest)
        except RuntimeError:
            if not layout:
                raise
        else:
            break
    return pairs, layout
