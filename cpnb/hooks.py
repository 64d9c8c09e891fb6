"""What may happen between the steps of a training: the hooks of `cpnb.fit`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer


class Hook:
    """Something `cpnb.fit` calls around every optimizer step; override what is needed.

    A step is ``before_forward``, forward and backward, ``before_step``, the optimizer's
    step, ``after_step``; an epoch of them ends with ``after_epoch``. The same hook may
    serve several trainings, one after the other: `start` comes first in each.
    """

    def start(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Called once, before the first step."""

    def before_forward(self, model: nn.Module, step: int) -> None:
        """Called before the forward pass of step ``step``, counted from 0."""

    def before_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Called between backward and the optimizer's step, to change gradients."""

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Called after the optimizer's step, to change weights."""

    def after_epoch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Called after the last step of an epoch, before the model is evaluated."""

    def stop(self, model: nn.Module) -> None:
        """Called once at the end, also after an error or Ctrl-C."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of the hook: tensors, numbers and texts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned; called after `start`."""

    def __repr__(self) -> str:
        """Name of the class, as it goes into the recipe of a run; add the settings."""
        return f"{type(self).__name__}()"


def model_hooks(model: nn.Module) -> list[Hook]:
    """Hooks that came with the model, as of ``normalize(model, "scaling")``."""
    return list(getattr(model, "training_hooks", ()))


def check_hooks(hooks: Sequence[Hook]) -> list[Hook]:
    """The hooks as a list; raise unless that is what they are."""
    if isinstance(hooks, Hook):
        raise TypeError("hooks is a single hook, expected a list: hooks=[hook].")
    for n, hook in enumerate(hooks):
        if not isinstance(hook, Hook):
            raise TypeError(
                f"hooks[{n}] is a {type(hook).__name__}, expected a cpnb.hooks.Hook. "
                "Derive it from Hook and override what is needed."
            )
    return list(hooks)


@contextmanager
def running(
    hooks: Sequence[Hook], model: nn.Module, optimizer: Optimizer
) -> Iterator[None]:
    """Start the hooks; stop those that were started, last first, whatever happens."""
    with ExitStack() as stack:
        for hook in hooks:
            hook.start(model, optimizer)
            stack.callback(hook.stop, model)
        yield
