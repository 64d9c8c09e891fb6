"""The arguments of a training, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from cpnb._checks import check_count
from cpnb.augmentation import Augment
from cpnb.hooks import Hook, check_hooks
from cpnb.optimizers import MakeOptimizer, check_schedule

PRECISIONS = ("bfloat16", "float16")
Callback = Callable[[int, nn.Module, dict[str, float | None]], Any]


@dataclass
class Settings:
    """Arguments of `cpnb.fit` that all its networks share; see there."""

    epochs: int
    batch_size: int
    optimizer: str | MakeOptimizer
    momentum: float
    weight_decay: float
    schedule: str | None
    augment: Augment | None
    hooks: Sequence[Hook]
    amp: bool | str
    compile: bool
    cuda_graph: bool
    callback: Callback | None

    def __post_init__(self) -> None:
        """Refuse what is impossible whatever the networks and the data are."""
        self.epochs = check_count(self.epochs, "epochs")
        self.batch_size = check_count(self.batch_size, "batch_size")
        self.hooks = check_hooks(self.hooks)
        check_schedule(self.schedule)
        if not isinstance(self.augment, Augment | None):
            raise TypeError(
                f"augment is {self.augment!r}, expected a cpnb.Augment or None."
            )
        if not (isinstance(self.amp, bool) or self.amp in PRECISIONS):
            raise ValueError(
                f"amp is {self.amp!r}, expected False, True, "
                f"{' or '.join(map(repr, PRECISIONS))}."
            )
        if self.callback is not None and not callable(self.callback):
            raise TypeError(
                f"callback is a {type(self.callback).__name__}, expected a function of "
                "epoch, model and record."
            )

    def check_device(self, device: torch.device, hooked: bool) -> None:
        """Refuse a CUDA graph where none can be captured."""
        if not self.cuda_graph:
            return
        obstacles = {
            f"a {device.type} device": device.type != "cuda",
            "hooks": hooked,
            "an optimizer of its own": callable(self.optimizer),
            "float16": self.precision(device) == torch.float16,
        }
        found = [name for name, there in obstacles.items() if there]
        if found:
            raise ValueError(
                f"cuda_graph is True with {' and '.join(found)}, expected a CUDA "
                "device, no hooks, an optimizer by name and no float16. Set "
                "cuda_graph=False."
            )

    def precision(self, device: torch.device) -> torch.dtype | None:
        """Dtype of mixed precision on this device, None without."""
        if not self.amp:
            return None
        if self.amp is not True:
            return getattr(torch, self.amp)
        native = device.type != "cuda" or torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return torch.bfloat16 if native else torch.float16

    def recipe(self, device: torch.device) -> dict[str, Any]:
        """What a record says of the settings, but for the optimizer's and the hooks."""
        precision = self.precision(device)
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "schedule": self.schedule,
            "augment": None if self.augment is None else asdict(self.augment),
            "amp": None if precision is None else str(precision).removeprefix("torch."),
            "compile": self.compile,
            "cuda_graph": self.cuda_graph,
        }
