"""What every measurement of a model needs: its layers, a fixed state, its loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpnb._checks import check_count, check_module
from cpnb.evaluation import (
    check_scores,
    evaluation_mode,
    images_and_labels,
    place,
)

Chunks = Sequence[tuple[Tensor, Tensor]]


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers by name whose ``weight`` has two modes or more, however it is stored.

    A layer made of layers, as one of low rank, counts once if it has a ``weight``.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If there is no such layer.
    """
    check_module(model)
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    # In evaluation mode, where looking at a parametrized weight does not change it.
    with evaluation_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            if module not in inside and has_kernel(module):
                found[name or type(module).__name__] = module
                inside.update(module.modules())
    if not found:
        raise ValueError(
            f"model is a {type(model).__name__} without a layer whose weight has two "
            "modes or more, expected at least one convolution or linear layer."
        )
    return found


def has_kernel(module: nn.Module) -> bool:
    """Whether the module has a floating-point ``weight`` of two modes or more."""
    weight = getattr(module, "weight", None)
    known = isinstance(weight, Tensor) and weight.is_floating_point()
    return known and weight.ndim >= 2


@contextmanager
def as_measured(model: nn.Module, batch_statistics: bool) -> Iterator[None]:
    """Run the block in evaluation mode; on exit everything is as it was.

    Args:
        model: Any module.
        batch_statistics: Whether batch and instance norm layers take the statistics of
            their batch, as in training. These are not recorded.
    """
    kind = nn.modules.batchnorm._NormBase
    with evaluation_mode(model):
        norms = [m for m in model.modules() if isinstance(m, kind) and batch_statistics]
        tracked = [norm.track_running_stats for norm in norms]
        try:
            for norm in norms:  # in training without tracking nothing is recorded
                norm.training, norm.track_running_stats = True, False
            yield
        finally:
            for norm, flag in zip(norms, tracked, strict=True):
                norm.track_running_stats = flag


def read_chunks(model: nn.Module, data: Any, chunk_size: int) -> Chunks:
    """Split images and labels into chunks on the model's device.

    Args:
        model: Its scores of the first image are checked.
        data: A data set, of which the training split is used, or a pair.
        chunk_size: Images per chunk. A single image left over goes with the chunk
            before it, as batch statistics need two.

    Returns:
        Pairs of images, shape ``(n, ...)``, and labels, shape ``(n,)``.
    """
    check_module(model)
    size = check_count(chunk_size, "chunk_size")
    pair = place(images_and_labels(data, "train"), model, channels_last=False)
    images, labels = pair
    with evaluation_mode(model), torch.no_grad():
        check_scores(model(images[:1]), 1, int(labels.max()))
    cuts = list(range(size, len(labels) - 1, size))
    return list(zip(images.tensor_split(cuts), labels.tensor_split(cuts), strict=True))


def summed_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in nats, added up over the images."""
    return F.cross_entropy(scores, labels, reduction="sum")
