"""What a training leaves behind: its course, its recipe, its provenance."""

from __future__ import annotations

import datetime
import os
import platform
import threading
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from subprocess import DEVNULL, CalledProcessError, check_output
from typing import Any

import torch

MEASURES = ["train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]


@dataclass(repr=False)
class Run:
    """Record of one training.

    Attributes:
        status: ``"finished"``, ``"interrupted"`` by Ctrl-C, or ``"diverged"``.
        history: A dict for each completed epoch: ``epoch`` from 1; means as it went;
            validation after it, or None; ``seconds`` without evaluation.
        recipe, provenance: What was run; where, when and with what versions.
        message: Where and at which rate it diverged, and what to try.
    """

    status: str
    history: list[dict[str, Any]]
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    message: str = ""

    @property
    def seconds(self) -> float:
        """Seconds of training of all completed epochs."""
        return sum(record["seconds"] for record in self.history)

    def __repr__(self) -> str:
        """Status, epochs, time and the last accuracies."""
        text = f"Run({self.status}, {len(self.history)} epochs in {self.seconds:.1f} s"
        for name in ("train_accuracy", "validation_accuracy"):
            if self.history and self.history[-1][name] is not None:
                text += f", {name.replace('_', ' ')} {self.history[-1][name]:.1%}"
        return f"{text}){' ' * bool(self.message)}{self.message}"


def provenance(device: torch.device) -> dict[str, Any]:
    """Where, when, and with what versions and ``commit`` of cpnb a number was made."""
    is_gpu = device.type == "cuda"
    return {
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if is_gpu else _cpu(),
        "threads": torch.get_num_threads(),
        "cpnb": import_module("cpnb").__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    """Model of the processor, its architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.processor() or platform.machine()


def write_text(path: str | Path, text: str) -> None:
    """Write a file that is whole at any time, the old or the new one."""
    path = Path(path).expanduser()
    writer = f"{os.getpid()}-{threading.get_ident()}"
    part = path.with_name(f".{path.name}.{writer}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@cache
def _commit() -> str | None:
    """Commit of this source, "-dirty" where it differed; else that of CPNB_COMMIT."""
    package = Path(__file__).parents[1]
    git = partial(check_output, cwd=package.parent, stderr=DEVNULL, text=True)
    try:
        # An installed copy inside somebody else's repository is not tracked by it.
        git(["git", "ls-files", "--error-unmatch", __file__])
        commit = git(["git", "rev-parse", "HEAD"]).strip()
        changes = git(["git", "status", "--porcelain", "-uno", "--", package.name])
    except (OSError, CalledProcessError):
        return os.environ.get("CPNB_COMMIT")
    return f"{commit}-dirty" if changes else commit
