"""The networks of a training behind one face: a single one, or several in one graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from cpnb._training.dropout import KeyedDropout
from cpnb.evaluation import preserved_flags
from cpnb.optimizers import Share


class Networks:
    """Networks of one architecture that take every step together.

    Attributes:
        models: The networks, m of them.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = list(models)

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Scores of each network for its own images.

        Args:
            images: Shape ``(m, batch, ...)``.
            keys: Of the dropout, see `KeyedDropout`. Shape ``(m, 2)``.

        Returns:
            Shape ``(m, batch, classes)``.
        """
        raise NotImplementedError

    def shares(self, rates: Sequence[float]) -> list[Share]:
        """Tensors to train at each of the rates, one rate for each network."""
        raise NotImplementedError

    def compile(self) -> None:
        """Let `torch.compile` run the forward pass from now on."""
        raise NotImplementedError

    def clear_gradients(self) -> None:
        """Forget the gradients, as before each backward pass."""
        for model in self.models:
            model.zero_grad()

    def hand_out_gradients(self) -> None:
        """After each backward pass give the tensors of the shares their gradients."""

    def outcome(self) -> dict[str, Tensor]:
        """Gradients and buffers as a step left them. Shapes ``(m, ...)``."""
        raise NotImplementedError

    def collect(self, active: Sequence[bool]) -> None:
        """Bring the networks marked as active up to date."""

    def state_dict(self) -> dict[str, Any]:
        """All parameters and buffers, also those that no state_dict of torch holds."""
        return {str(n): tensors_of(model) for n, model in enumerate(self.models)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over values of the same names and shapes."""
        for n, model in enumerate(self.models):
            for name, tensor in tensors_of(model).items():
                tensor.copy_(state[str(n)][name])


class Single(Networks):
    """One network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([model])
        self._forward: Callable[[Tensor], Tensor] = model

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        with KeyedDropout(keys[0]):
            return self._forward(images[0])[None]

    def shares(self, rates: Sequence[float]) -> list[Share]:
        return [(trained(self.models[0]), rates[0])]

    def compile(self) -> None:
        self._forward = torch.compile(self.models[0])

    def outcome(self) -> dict[str, Tensor]:
        model = self.models[0]
        found = _outcome(trained(model), dict(model.named_buffers()))
        return {name: tensor[None] for name, tensor in found.items()}


class Stacked(Networks):
    """Several networks as one graph over stacked parameters.

    Each network has its own images, its own dropout and batch statistics, and its own
    learning rate; no number of one reaches another.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__(models)
        with preserved_flags(nn.ModuleList(self.models)) as members:
            members.train()  # only networks of one mode can be stacked
            self._parameters, self._buffers = stack_module_state(self.models)
        self._slices: list[tuple[Tensor, Tensor, slice]] = []
        self._forward = torch.vmap(self._one, randomness="error")

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # Weight norm's kernel is run for one network after the other, and said so.
            warnings.filterwarnings("ignore", "There is a performance drop")
            return self._forward(self._parameters, self._buffers, keys, images)

    def _one(
        self,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        keys: Tensor,
        images: Tensor,
    ) -> Tensor:
        with KeyedDropout(keys):
            return functional_call(self.models[0], (parameters, buffers), (images,))

    def shares(self, rates: Sequence[float]) -> list[Share]:
        shares = []
        for rate, rows in _runs(rates):
            tensors = {}
            for name in trained(self.models[0]):
                stack = self._parameters[name]
                tensors[name] = stack.detach()[rows]
                self._slices.append((stack, tensors[name], rows))
            shares.append((tensors, rate))
        return shares

    def compile(self) -> None:
        self._forward = torch.compile(self._forward)

    def clear_gradients(self) -> None:
        for stack in self._parameters.values():
            stack.grad = None

    def hand_out_gradients(self) -> None:
        for stack, part, rows in self._slices:
            part.grad = None if stack.grad is None else stack.grad[rows]

    def outcome(self) -> dict[str, Tensor]:
        parameters = {name: self._parameters[name] for name in trained(self.models[0])}
        return _outcome(parameters, self._buffers)

    @torch.no_grad()
    def collect(self, active: Sequence[bool]) -> None:
        stacks = {**self._parameters, **self._buffers}
        for n, model in enumerate(self.models):
            if active[n]:
                for name, tensor in tensors_of(model).items():
                    tensor.copy_(stacks[name][n])

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        stacks = {**self._parameters, **self._buffers}
        for n, model in enumerate(self.models):
            for name, tensor in tensors_of(model).items():
                stacks[name][n].copy_(tensor)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters to train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_trainable(model: nn.Module) -> None:
    """Refuse a network in which nothing is to be trained."""
    if not trained(model):
        raise ValueError(
            "model has no parameters to train, expected at least one with "
            "requires_grad=True."
        )


def _outcome(
    parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    found = {f"buffer {name}": tensor for name, tensor in buffers.items()}
    for name, tensor in parameters.items():
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        found[f"gradient of {name}"] = gradient
    return found


def _runs(rates: Sequence[float]) -> list[tuple[float, slice]]:
    """Neighbours of one rate: the rate, and where they stand."""
    starts = [n for n, rate in enumerate(rates) if n == 0 or rate != rates[n - 1]]
    ends = [*starts[1:], len(rates)]
    return [(rates[a], slice(a, b)) for a, b in zip(starts, ends, strict=True)]
