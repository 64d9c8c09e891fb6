"""What may happen between the steps of a training: the hooks of `cpnb.fit`."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer


class Hook:
    """Something `cpnb.fit` calls around every optimizer step; override what is needed.

    A step is ``before_forward``, forward and backward, ``before_step``, the optimizer's
    step, ``after_step``. The same hook may serve several trainings, one after the
    other: `start` comes first in each.
    """

    def start(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Called once, before the first step."""

    def before_forward(self, model: nn.Module, step: int) -> None:
        """Called before the forward pass of step ``step``, counted from 0."""

    def before_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Called between backward and the optimizer's step, to change gradients."""

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Called after the optimizer's step, to change weights."""

    def stop(self, model: nn.Module) -> None:
        """Called once at the end, also after an error or Ctrl-C."""


def model_hooks(model: nn.Module) -> list[Hook]:
    """Hooks that came with the model, as of ``normalize(model, "scaling")``."""
    return list(getattr(model, "training_hooks", ()))
