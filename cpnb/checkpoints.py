"""Checkpoints that carry their ranks, in safetensors: no pickle, no code."""

import json
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from cpnb._files import replacing
from cpnb.surgery import cp_layers

_FORMAT = "cpnb-checkpoint-1"


def save_model(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a model's state to a safetensors file, its ranks in the metadata.

    The file is complete or not there: it is written beside its place, then moved.

    Args:
        model: Any module.
        path: The file; its folder must exist.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If two entries of the state share memory.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"path is {str(path)!r}, expected an existing folder. Create "
            f"{path.parent} first."
        )
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    owners: dict[int, str] = {}
    for name, value in state.items():
        other = owners.setdefault(value.data_ptr(), name) if value.numel() else name
        if other != name:
            raise ValueError(
                f"model has {other!r} and {name!r} in the same memory, expected "
                "separate tensors. Untie them first."
            )
    ranks = {name: layer.rank for name, layer in cp_layers(model).items()}
    metadata = {
        "format": _FORMAT,
        "model": type(model).__name__,
        "ranks": json.dumps(ranks),
    }
    with replacing(path) as partial:
        save_file(state, partial, metadata)


def load_weights(model: nn.Module, path: str | PathLike[str]) -> nn.Module:
    """Load a checkpoint into a model of the same architecture, at the file's ranks.

    Everything is compared before anything is changed: on an error the model is as it
    was. Parameters of layers whose rank changes are new: build optimizers afterwards.

    Args:
        model: Where to load; its ranks may differ from the checkpoint's.
        path: A file that `save_model` wrote.

    Returns:
        ``model``, with the checkpoint's values and ranks.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no cpnb checkpoint or of another architecture.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path is {str(path)!r}, expected an existing file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). Save it again with "
            "cpnb.save_model."
        ) from error
    if metadata.get("format") != _FORMAT or "ranks" not in metadata:
        raise ValueError(
            f"{path} has format {metadata.get('format')!r}, expected {_FORMAT!r}. "
            "Write checkpoints with cpnb.save_model."
        )
    _check_fits(model, state, json.loads(metadata["ranks"]), path)
    model.load_state_dict(state)
    return model


def _check_fits(
    model: nn.Module, state: dict[str, torch.Tensor], ranks: dict[str, int], path: Path
) -> None:
    layers = cp_layers(model)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        rank = ranks.get(name, layer.rank)
        expected[f"{prefix}lam"] = (rank,)
        for n, factor in enumerate(layer.factors):
            expected[f"{prefix}factors.{n}"] = (factor.shape[0], rank)
    found = {name: tuple(value.shape) for name, value in state.items()}
    differences = [
        f"{name}: expected {expected.get(name, 'nothing')}, got "
        f"{found.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if differences:
        more = len(differences) - 3
        listed = "; ".join(differences[:3]) + (f"; and {more} more" * (more > 0))
        raise ValueError(
            f"{path} is a checkpoint of another architecture: {listed}. Build the "
            "model it was saved from."
        )
