"""The state of a training in a file: complete or not there, and no pickled code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpnb._files import replacing
from cpnb._training.networks import tensors_of

if TYPE_CHECKING:
    from cpnb._training.loop import Training

_FORMAT = "cpnb training 1"
# How several networks are trained, which the file's name tells, and why so.
_NO_IDENTITY = {"members", "members_reason"}


class Checkpoint:
    """A file that holds all that the next epoch of a training depends on.

    Args:
        path: The file; its folder must exist.
        training: Whose state it keeps.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], training: Training) -> None:
        self._path = Path(path)
        check_folder(self._path)
        self._training = training
        self._identity = _identity(training)
        self._parts = {
            "networks": training.networks,
            "optimizer": training.optimizer,
            "scaler": training.scaler,
            "chance": training.chance,
            **{f"hook {n}": hook for n, hook in enumerate(training.hooks)},
        }
        if training.schedule is not None:
            self._parts["schedule"] = training.schedule

    def save(self, epoch: int) -> None:
        """Keep the state after an epoch in place of the one before."""
        state = {
            "format": _FORMAT,
            "identity": json.dumps(self._identity),
            "epoch": epoch,
            "runs": json.dumps([asdict(run) for run in self._training.runs]),
            **{name: part.state_dict() for name, part in self._parts.items()},
        }
        with replacing(self._path) as partial:
            torch.save(state, partial)

    def restore(self) -> int:
        """Take up the kept state, if there is one.

        Returns:
            Number of completed epochs.

        Raises:
            ValueError: If the file is damaged or of another training; nothing has
                changed then.
        """
        if not self._path.exists():
            return 0
        state = self._read()
        self._check(json.loads(state["identity"]))
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        epoch, epochs = state["epoch"], self._training.settings.epochs
        kept = json.loads(state["runs"])
        for run, earlier in zip(self._training.runs, kept, strict=True):
            run.status, run.history = earlier["status"], earlier["history"]
            if epoch == epochs or run.status == "diverged":
                run.provenance = earlier["provenance"]
            else:
                past = earlier["provenance"].get("resumed_after", [])
                run.provenance["resumed_after"] = [*past, epoch]
        return epoch

    def _read(self) -> dict[str, Any]:
        try:
            state = torch.load(self._path, map_location=self._place, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"checkpoint {self._path} cannot be read: damaged, or no checkpoint. "
                "Delete it to start from the first epoch."
            ) from error
        found = state.get("format") if isinstance(state, dict) else None
        if found != _FORMAT:
            raise ValueError(
                f"checkpoint {self._path} has format {found!r}, expected {_FORMAT!r}. "
                "Delete it to start from the first epoch."
            )
        return state

    def _place(self, storage: torch.UntypedStorage, was: str) -> torch.UntypedStorage:
        """What was on a device to that of the training, the rest stays on the CPU."""
        # Adam counts its steps there: a count on a GPU would be waited for in each.
        if was == "cpu":
            return storage
        return storage.to(device=self._training.source.labels.device)

    def _check(self, kept: Mapping[str, Any]) -> None:
        """Refuse the state of another training; name the first difference."""
        ours = json.loads(json.dumps(self._identity))
        for name in dict.fromkeys([*kept, *ours]):
            was, now = kept.get(name), ours.get(name)
            if was != now:
                raise ValueError(
                    f"checkpoint {self._path} is of another training: {name} was "
                    f"{was}, now it is {now}. Delete it, or give this training another "
                    "path."
                )


def check_folder(path: Path) -> None:
    """Refuse a file in a folder that is not there."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"checkpoint is {str(path)!r}, expected an existing folder. Create "
            f"{path.parent} first."
        )


def _identity(training: Training) -> dict[str, Any]:
    """What tells one training from another, in the types of JSON."""
    recipes = [run.recipe for run in training.runs]
    identity = {
        name: [recipe[name] for recipe in recipes] if len(recipes) > 1 else value
        for name, value in recipes[0].items()
        if name not in _NO_IDENTITY
    }
    model, source = training.networks.models[0], training.source
    for name, tensor in tensors_of(model).items():
        identity[f"shape of {name}"] = str(tuple(tensor.shape))
    identity["hash of the modules"] = hashlib.sha256(str(model).encode()).hexdigest()
    digest = hashlib.sha256()
    for tensor in (source.images, source.labels):
        # The bytes are viewed as integers because numpy has no bfloat16.
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    identity["hash of the training data"] = digest.hexdigest()
    return identity
