"""The state of a training in a file: complete or not there, and no pickled code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpnb._files import replacing
from cpnb._training.identity import identity

if TYPE_CHECKING:
    from cpnb._training.loop import Training

_FORMAT = "cpnb training 2"
_CHECKSUM = hashlib.sha256().digest_size  # bytes at the end of the file


class Checkpoint:
    """A file that holds all that the next epoch of a training depends on.

    It is what `torch.save` writes, followed by the SHA-256 of that.

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
        self._identity = identity(training)
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
        """Keep the state after an epoch, 0 at the start, in place of the one before."""
        state = {
            "format": _FORMAT,
            "identity": json.dumps(self._identity),
            "epoch": epoch,
            "runs": json.dumps([asdict(run) for run in self._training.runs]),
            **{name: part.state_dict() for name, part in self._parts.items()},
        }
        with replacing(self._path) as partial:
            torch.save(state, partial)
            with partial.open("r+b") as file:
                checksum = hashlib.file_digest(file, "sha256").digest()
                file.seek(0, os.SEEK_END)
                file.write(checksum)

    def check(self) -> None:
        """Refuse a kept state as `restore` does, and change nothing.

        Raises:
            ValueError: If the file is damaged or of another training.
        """
        if self._path.exists():
            self._read()

    def restore(self) -> int:
        """Take up the kept state; if there is none, keep that of the start.

        Returns:
            Number of completed epochs.

        Raises:
            ValueError: If the file is damaged or of another training; nothing has
                changed then.
        """
        if not self._path.exists():
            self.save(0)
            return 0
        state = self._read()
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        epoch, epochs = state["epoch"], self._training.settings.epochs
        kept = json.loads(state["runs"])
        for run, earlier in zip(self._training.runs, kept, strict=True):
            run.status, run.history = earlier["status"], earlier["history"]
            if epoch == epochs or run.status == "diverged":
                run.provenance = earlier["provenance"]
            elif epoch > 0:
                past = earlier["provenance"].get("resumed_after", [])
                run.provenance["resumed_after"] = [*past, epoch]
        return epoch

    def _read(self) -> dict[str, Any]:
        """The kept state, once it is known to be whole and of this training."""
        try:
            content = self._verified()
            state = torch.load(content, map_location=self._place, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"checkpoint {self._path} cannot be read: damaged, of another version, "
                "or no checkpoint. Delete it to start from the first epoch."
            ) from error
        found = state.get("format") if isinstance(state, dict) else None
        if found != _FORMAT:
            raise ValueError(
                f"checkpoint {self._path} has format {found!r}, expected {_FORMAT!r}. "
                "Delete it to start from the first epoch."
            )
        self._compare(json.loads(state["identity"]))
        return state

    def _verified(self) -> io.BytesIO:
        """What `torch.save` wrote, as the checksum after it says."""
        whole = self._path.read_bytes()
        content, kept = whole[:-_CHECKSUM], whole[-_CHECKSUM:]
        expected = hashlib.sha256(content).digest()
        if kept != expected:
            raise EOFError(f"checksum is {kept.hex()}, expected {expected.hex()}.")
        return io.BytesIO(content)

    def _place(self, storage: torch.UntypedStorage, was: str) -> torch.UntypedStorage:
        """What was on a device to that of the training, the rest stays on the CPU."""
        # Adam counts its steps there: a count on a GPU would be waited for in each.
        if was == "cpu":
            return storage
        return storage.to(device=self._training.source.labels.device)

    def _compare(self, kept: Mapping[str, Any]) -> None:
        """Refuse the state of another training; name the first difference."""
        for name in dict.fromkeys([*kept, *self._identity]):
            was, now = kept.get(name), self._identity.get(name)
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
