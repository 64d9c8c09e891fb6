"""One step of a training, and the same step captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from cpnb._training.batches import Source
from cpnb._training.networks import Networks
from cpnb.hooks import Hook

_WARM_UP = 3  # steps before a capture, in which optimizers and libraries set up


class Step:
    """Forward, backward and update of m networks on one batch each.

    Args:
        networks: What to train.
        source: Where the images come from.
        optimizer: Over the networks' shares.
        scaler: Of the loss, for float16; it does nothing when not enabled.
        precision: Dtype of mixed precision, or None.
        hooks: Called around the step; then there is a single network.

    Attributes:
        totals: Summed loss and correct answers of each network. Shape ``(2, m)``.
    """

    def __init__(
        self,
        networks: Networks,
        source: Source,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        precision: torch.dtype | None,
        hooks: Sequence[Hook],
    ) -> None:
        self._networks, self._source = networks, source
        self._optimizer, self._scaler = optimizer, scaler
        self._precision, self._hooks = precision, hooks
        device = source.labels.device
        # Added up on the device: to read a number back would be to wait for it.
        self.totals = torch.zeros((2, len(networks.models)), device=device)

    def __call__(
        self, number: int, index: Tensor, changes: Tensor | None, keys: Tensor
    ) -> None:
        """Take step ``number``.

        Args:
            number: Of the step, from 0.
            index: The images. Shape ``(m, batch)``.
            changes: Their augmentation. Shape ``(m, batch, 5)``.
            keys: Of the dropout. Shape ``(m, 2)``.
        """
        networks, optimizer = self._networks, self._optimizer
        for hook in self._hooks:
            hook.before_forward(networks.models[0], number)
        images, labels = self._source.batch(index, changes)
        enabled = self._precision is not None
        with torch.autocast(images.device.type, self._precision, enabled=enabled):
            scores = networks(images, keys)
        if enabled:
            scores = scores.float()
        losses = F.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), reduction="none"
        )
        losses = losses.view(labels.shape).mean(1)
        networks.clear_gradients()
        # The gradient of the sum is that of each network's own loss.
        self._scaler.scale(losses.sum()).backward()
        networks.hand_out_gradients()
        if self._hooks:
            self._scaler.unscale_(optimizer)
        for hook in self._hooks:
            hook.before_step(networks.models[0], optimizer, number)
        self._scaler.step(optimizer)
        self._scaler.update()
        for hook in self._hooks:
            hook.after_step(networks.models[0], optimizer, number)
        correct = (scores.detach().argmax(-1) == labels).sum(1)
        self.totals[0] += losses.detach() * index.shape[1]
        self.totals[1] += correct


class CapturedStep:
    """A step that is captured in a CUDA graph at its fourth call, then replayed.

    A batch of another size than the first, as at the end of an epoch, runs as usual.

    Args:
        step: Without hooks, its optimizer made to be captured.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self.totals = step.totals
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._calls = 0

    def __call__(self, number: int, *inputs: Tensor | None) -> None:
        """Take a step; arguments as of `Step`."""
        # Streams and graphs are those of the current device.
        with torch.cuda.device(self.totals.device):
            self._take(number, *inputs)

    def _take(self, number: int, *inputs: Tensor | None) -> None:
        given = [tensor for tensor in inputs if tensor is not None]
        if not self._inputs:
            self._inputs = [tensor.clone() for tensor in given]
        if given[0].shape != self._inputs[0].shape:
            self._step(number, *inputs)
        elif self._calls < _WARM_UP:
            self._calls += 1
            self._warm_up(number, *inputs)
        else:
            for kept, tensor in zip(self._inputs, given, strict=True):
                kept.copy_(tensor)
            if self._graph is None:
                self._capture(number, inputs)
            self._graph.replay()

    def _warm_up(self, number: int, *inputs: Tensor | None) -> None:
        # Not on the stream that PyTorch runs on otherwise: it could not be captured.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(number, *inputs)
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self, number: int, inputs: Sequence[Tensor | None]) -> None:
        kept = iter(self._inputs)
        static = [None if tensor is None else next(kept) for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step(number, *static)
