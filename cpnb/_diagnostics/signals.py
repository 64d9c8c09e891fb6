"""How strong are the signals: variance of activations and gradients, by layer."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cpnb._diagnostics.measuring import (
    as_measured,
    read_chunks,
    summed_loss,
    weighted_layers,
)
from cpnb._tables import html_table, text_table


@dataclass(frozen=True)
class Signal:
    """What passes one layer; NaN if nothing did.

    Attributes:
        activation: Variance of the layer's output, before any activation function, over
            images, channels and positions.
        gradient: Variance of the gradient of an image's cross entropy for that output.
    """

    activation: float
    gradient: float


@dataclass(frozen=True, repr=False)
class SignalReport:
    """The signals of every layer of a model, in the order of its modules.

    Attributes:
        layers: `Signal` by layer name.
    """

    layers: dict[str, Signal]

    def to_rows(self) -> list[dict[str, Any]]:
        """One dict per layer."""
        return [
            {"layer": name, "activation": s.activation, "gradient": s.gradient}
            for name, s in self.layers.items()
        ]

    def __repr__(self) -> str:
        """A table in plain text."""
        return text_table(self._cells())

    def _repr_html_(self) -> str:
        return html_table(self._cells())

    def _cells(self) -> list[list[str]]:
        table = [["layer", "activation variance", "gradient variance"]]
        for name, found in self.layers.items():
            table.append([name, f"{found.activation:.3g}", f"{found.gradient:.3g}"])
        return table


@dataclass
class _Moments:
    """Sums from which a variance follows; kept on the device until asked for."""

    count: int = 0
    sums: Tensor | float = field(default=0.0)

    def add(self, values: Tensor) -> None:
        values = values.detach().double()
        self.count += values.numel()
        self.sums = self.sums + torch.stack([values.sum(), values.square().sum()])

    @property
    def variance(self) -> float:
        if not self.count:
            return math.nan
        mean, square = (self.sums / self.count).tolist()
        return max(square - mean**2, 0.0) if math.isfinite(square) else math.nan


def signal_report(
    model: nn.Module,
    data: Any,
    *,
    batch_statistics: bool = False,
    chunk_size: int = 1000,
) -> SignalReport:
    """Measure the variance of activations and gradients in every layer of a model.

    The model is evaluated, and left as it was: its flags, its batch-norm statistics,
    its parameters' ``.grad``; no hook stays.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``.
        data: A data set, of which the training split is used, or a pair
            ``(images, labels)``.
        batch_statistics: Whether batch norm takes the statistics of each chunk, as in
            training, instead of the recorded ones. At the start of a training the
            recorded ones say nothing yet.
        chunk_size: Images per forward pass.

    Returns:
        The report, with the layers that have a kernel, see `cpnb.spectrum`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data is malformed or no layer has a kernel.

    >>> net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 3))
    >>> report = signal_report(net, (torch.randn(64, 20), torch.arange(64) % 3))
    >>> [row["layer"] for row in report.to_rows()]
    ['0', '2']
    """
    layers = weighted_layers(model)
    chunks = read_chunks(model, data, chunk_size)
    forward = {name: _Moments() for name in layers}
    backward = {name: _Moments() for name in layers}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def seen(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # At once: the next layer may be a ReLU that writes into this output.
            forward[name].add(output)
            if output.requires_grad:
                output.register_hook(backward[name].add)

        return seen

    with ExitStack() as stack:
        stack.enter_context(as_measured(model, batch_statistics))
        stack.enter_context(torch.enable_grad())
        for name, layer in layers.items():
            hook = layer.register_forward_hook(watch(name))
            stack.callback(hook.remove)
        for images, labels in chunks:
            images = images.detach().requires_grad_()
            loss = summed_loss(model(images), labels)
            torch.autograd.grad(loss, images, allow_unused=True)
    return SignalReport(
        {n: Signal(forward[n].variance, backward[n].variance) for n in layers}
    )
