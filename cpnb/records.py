"""What a training run leaves behind: its course, its recipe, its provenance."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from cpnb._files import replacing

FORMAT, VERSION = "cpnb run", 1
STATUSES = ("finished", "interrupted", "diverged")
MEASURES = (
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "seconds",
)


@dataclass(repr=False)
class Run:
    """Record of one training run, saved as a small JSON file.

    Attributes:
        status: ``"finished"``; ``"interrupted"`` by Ctrl-C; or ``"diverged"`` when a
            loss stopped being finite.
        history: One dict for each completed epoch: ``epoch`` from 1, mean
            ``train_loss`` and ``train_accuracy`` over the epoch as it went,
            ``validation_loss`` and ``validation_accuracy`` after it (None without
            validation images), and ``seconds`` of training, evaluation not counted.
        recipe: All arguments of the run, the model's class and the numbers of images.
        provenance: Date, versions, device, threads and git commit, see
            :func:`provenance`.

    Raises:
        ValueError: If a field is malformed.
    """

    status: str
    history: list[dict[str, float | None]]
    recipe: dict[str, Any]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        """Check every field, as a run may come from a file."""
        if self.status not in STATUSES:
            raise ValueError(
                f"status is {self.status!r}, expected one of {', '.join(STATUSES)}."
            )
        for name in ("recipe", "provenance"):
            if not isinstance(getattr(self, name), dict):
                kind = type(getattr(self, name)).__name__
                raise ValueError(f"{name} is a {kind}, expected a dict.")
        if not isinstance(self.history, list):
            kind = type(self.history).__name__
            raise ValueError(f"history is a {kind}, expected a list of dicts.")
        for number, record in enumerate(self.history, start=1):
            _check_record(record, number)

    def to_json(self) -> str:
        """The run as JSON text; :meth:`from_json` reads it."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read the text that :meth:`to_json` wrote.

        Raises:
            ValueError: If ``text`` is no JSON, no run, or a malformed one.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ValueError(f"text is no JSON ({error}), expected a run.") from error
        found = document.get("format") if isinstance(document, dict) else None
        if found != FORMAT:
            raise ValueError(f"text has format {found!r}, expected {FORMAT!r}.")
        if document.get("version") != VERSION:
            raise ValueError(
                f"run has version {document.get('version')!r}, expected {VERSION}. "
                "Repeat it with this release of cpnb."
            )
        expected = {field.name for field in fields(cls)}
        if (names := document.keys() - {"format", "version"}) != expected:
            raise ValueError(
                f"run has the fields {sorted(names)}, expected {sorted(expected)}."
            )
        return cls(**{name: document[name] for name in expected})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the run to a JSON file; a crash leaves the old file or the new one."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Read a run from a JSON file.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it holds no run; the message names the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def __repr__(self) -> str:
        """Status, epochs, time and the last accuracies."""
        text = f"Run({self.status}, {len(self.history)} epochs"
        if self.history:
            last = self.history[-1]
            text += f" in {sum(record['seconds'] for record in self.history):.1f} s"
            for split in ("train", "validation"):
                if last[f"{split}_accuracy"] is not None:
                    text += f", {split} accuracy {last[f'{split}_accuracy']:.1%}"
        return text + ")"


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where, when and with what a number was made.

    Args:
        device: The device that was used.

    Returns:
        ``date`` (UTC), ``versions`` of cpnb, torch and Python, ``device``,
        ``machine``, ``threads`` and the ``commit`` of cpnb's own source, ending in
        ``-dirty`` after changes; None when it does not run from a git checkout.
    """
    device = torch.device(device)
    name = str(device)
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "cpnb": import_module("cpnb").__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "device": name,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "commit": _commit(Path(__file__).parent),
    }


def _commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An installed copy inside somebody else's repository is not tracked by it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _check_record(record: Any, number: int) -> None:
    expected = {"epoch", *MEASURES}
    if not isinstance(record, dict) or record.keys() != expected:
        got = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"history[{number - 1}] has {got}, expected the keys {sorted(expected)}."
        )
    if record["epoch"] != number:
        raise ValueError(
            f"history[{number - 1}] is epoch {record['epoch']!r}, expected {number}."
        )
    for name in MEASURES:
        value = record[name]
        if value is None and name.startswith("validation"):
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(
                f"history[{number - 1}][{name!r}] is {value!r}, expected a number."
            )
