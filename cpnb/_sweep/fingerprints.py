"""Short hashes that tell one network, or one set of images, from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cpnb.evaluation import images_and_labels
from cpnb.importance import DATA_KEYS
from cpnb.probing import calibration_images
from cpnb.surgery import cp_layers


def model_fingerprint(model: nn.Module) -> str:
    """Hash a network's structure and weights.

    Two networks share a fingerprint when their modules have the same names and types
    and their parameters and buffers the same names, shapes, dtypes and values. The
    rank of a CP layer is in the shapes. Device, gradients and training mode do not
    count.

    Args:
        model: Any network.

    Returns:
        A SHA-256 digest, 64 hexadecimal digits.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> before = model_fingerprint(layer)
        >>> _ = nn.init.zeros_(layer.bias)
        >>> before == model_fingerprint(layer)
        False
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name}:{type(module).__name__};".encode())
    states = model.state_dict().items()
    _update(digest, ((name, value) for name, value in states if torch.is_tensor(value)))
    return digest.hexdigest()


def data_fingerprint(data: Any) -> str:
    """Hash the images and labels that an evaluation of ``data`` would use.

    Args:
        data: A data set, of which the validation split is read, or a pair
            ``(images, labels)``.

    Returns:
        A SHA-256 digest, 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    _update(digest, zip(("images", "labels"), images_and_labels(data), strict=True))
    return digest.hexdigest()


def order_fingerprint(
    key: str, refit: bool | str, data: Any, orders: Iterable[Tensor]
) -> str:
    """Hash what decides a cut beside the network, its key and its refit.

    Args:
        key: As in `cpnb.truncate`.
        refit: False, True or ``"data"``.
        data: As in `cpnb.truncate`.
        orders: The components of every layer in order, one tensor each.

    Returns:
        A SHA-256 digest of the images that the key or the refit looks at, and of the
        orders that the random key drew; of nothing for any other cut.
    """
    digest = hashlib.sha256()
    if key in DATA_KEYS or refit == "data":
        images = calibration_images(data)
        _update(digest, zip(("images", "labels"), images, strict=True))
    if key == "random":
        _update(digest, (("order", order) for order in orders))
    return digest.hexdigest()


def check_network(model: nn.Module, ranks: Mapping[str, int], fingerprint: str) -> None:
    """Refuse a network other than the one a sweep was made for.

    Args:
        model: The network.
        ranks: Rank of every CP layer of the sweep's network.
        fingerprint: Its fingerprint.

    Raises:
        ValueError: If layers, ranks or weights differ.
    """
    given = {name: layer.rank for name, layer in cp_layers(model).items()}
    advice = "Sweep this network again with rank_sweep(model, data)."
    if given != ranks:
        raise ValueError(
            f"sweep was made for a network with the CP ranks {dict(ranks)}, but model "
            f"has {given}. {advice}"
        )
    found = model_fingerprint(model)
    if found != fingerprint:
        raise ValueError(
            "sweep was made for a network with the same CP ranks but other weights or "
            f"modules: fingerprint {fingerprint[:12]}, model has {found[:12]}. {advice}"
        )


def _update(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        # The bytes are viewed as integers because numpy has no bfloat16.
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
