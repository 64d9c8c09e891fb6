"""The training loop: epochs of steps, a record of each, a checkpoint after each."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cpnb._training.batches import Source, batch_slices
from cpnb._training.chance import Chance
from cpnb._training.identity import optimizer_settings
from cpnb._training.networks import Networks
from cpnb._training.settings import Settings
from cpnb._training.steps import CapturedStep, Step
from cpnb.evaluation import evaluate
from cpnb.hooks import Hook, running
from cpnb.optimizers import build_optimizer, build_schedule, decay_groups
from cpnb.randomness import seeded
from cpnb.records import Run

if TYPE_CHECKING:
    from cpnb._training.checkpoint import Checkpoint

_LOOK = 50  # steps between two looks at the losses, each of which waits for the device


class Training:
    """One training, of one or several networks, in place.

    Args:
        networks: What to train.
        source: What to train on.
        settings: How.
        runs: One record for each network, with its recipe, to be filled.
        hooks: Called around each step; then there is a single network.

    Raises:
        TypeError: If a function given as optimizer returns none.
    """

    def __init__(
        self,
        networks: Networks,
        source: Source,
        settings: Settings,
        runs: Sequence[Run],
        hooks: Sequence[Hook],
    ) -> None:
        device = source.labels.device
        self.networks, self.source, self.settings = networks, source, settings
        self.runs, self.hooks = runs, hooks
        self.slices = batch_slices(len(source.labels), settings.batch_size)
        self.optimizer = build_optimizer(
            settings.optimizer,
            networks.shares([run.recipe["lr"] for run in runs]),
            decay_groups(networks.models[0], settings.weight_decay),
            settings.momentum,
            capturable=settings.cuda_graph,
        )
        self.optimizer_settings: dict[str, Any] = {}
        if callable(settings.optimizer):
            # Before a schedule changes a rate.
            self.optimizer_settings = optimizer_settings(
                self.optimizer, networks.models[0]
            )
            rate = float(self.optimizer.param_groups[0]["lr"])
            runs[0].recipe.update(optimizer=type(self.optimizer).__name__, lr=rate)
        steps = settings.epochs * len(self.slices)
        self.schedule = build_schedule(settings.schedule, self.optimizer, steps)
        precision = settings.precision(device)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=precision == torch.float16
        )
        self.chance = Chance([run.recipe["seed"] for run in runs], device)
        step = Step(
            networks, source, self.optimizer, self.scaler, precision, self.hooks
        )
        self.totals = step.totals
        self._step = CapturedStep(step) if settings.cuda_graph else step
        if settings.compile:
            networks.compile()

    @property
    def images(self) -> int:
        """Images that all networks see over all epochs."""
        return self.settings.epochs * len(self.runs) * len(self.source.labels)

    def run(self, bar: Any, place: str, checkpoint: Checkpoint | None) -> None:
        """Train from the first epoch, or from the checkpoint, to the end.

        Ctrl-C and losses that are not finite end it early; the records say so.

        Args:
            bar: Progress over all images.
            place: Of this training among several, for the bar.
            checkpoint: Where the state is taken up and kept, or None.
        """
        epochs, model = self.settings.epochs, self.networks.models[0]
        random = seeded(self.runs[0].recipe["seed"], self.source.labels.device)
        with random, running(self.hooks, model, self.optimizer):
            try:
                done = checkpoint.restore() if checkpoint is not None else 0
                bar.update(done * len(self.runs) * len(self.source.labels))
                for epoch in range(done + 1, epochs + 1):
                    if not any(self._active()):
                        break
                    description = f"{place}epoch {epoch}/{epochs}"
                    bar.set_description(description, refresh=False)
                    self._train_epoch(epoch, bar)
                    try:
                        self._call_back(epoch)
                    finally:  # also when it raises: the epoch is over and recorded
                        if checkpoint is not None:
                            checkpoint.save(epoch)
            except KeyboardInterrupt:
                self.networks.collect(self._active())
                for run in self.runs:
                    if run.status == "finished":
                        run.status = "interrupted"

    def _train_epoch(self, epoch: int, bar: Any) -> None:
        start, count = time.perf_counter(), len(self.source.labels)
        self.networks.models[0].train()
        self._take_steps((epoch - 1) * len(self.slices), bar)
        for hook in self.hooks:
            hook.after_epoch(self.networks.models[0], self.optimizer)
        losses, shares = (self.totals / count).tolist()
        seconds = (time.perf_counter() - start) / len(self.runs)
        self.networks.collect(self._active())
        for n, run in enumerate(self.runs):
            if run.status == "finished":
                measured = {"train_loss": losses[n], "train_accuracy": shares[n]}
                self._record(n, epoch, measured, seconds)
        bar.set_postfix_str(_summary(self.runs), refresh=False)

    def _take_steps(self, first: int, bar: Any) -> None:
        """The steps of an epoch; fewer if nothing is left but losses not finite."""
        source = self.source
        plan = self.chance.plan(source.images.shape, len(self.slices), source.augment)
        self.totals.zero_()
        for n, part in enumerate(self.slices):
            changes = None if plan.changes is None else plan.changes[:, part]
            index = plan.order[:, part]
            self._step(first + n, index, changes, plan.keys[:, n])
            if self.schedule is not None:
                self.schedule.step()
            bar.update(index.numel())
            if n % _LOOK == _LOOK - 1:
                means = self.totals / part.stop
                finite = means[:, means[0].isfinite()]
                if not finite.numel():
                    break
                loss, share = finite.mean(1).tolist()
                bar.set_postfix_str(_measures(loss, share), refresh=False)

    def _record(
        self, n: int, epoch: int, measured: dict[str, float], seconds: float
    ) -> None:
        """Evaluate one network and write its epoch down."""
        run, model, held_out = self.runs[n], self.networks.models[n], {}
        if self.source.validation is not None and math.isfinite(measured["train_loss"]):
            held_out = evaluate(model, self.source.validation)
        if not math.isfinite(measured["train_loss"] + held_out.get("loss", 0.0)):
            run.status = "diverged"
            return
        record = {
            "epoch": epoch,
            **measured,
            "validation_loss": held_out.get("loss"),
            "validation_accuracy": held_out.get("accuracy"),
            "seconds": seconds,
        }
        run.history.append(record)

    def _call_back(self, epoch: int) -> None:
        """Hand the epoch's record of each network to the callback."""
        if (callback := self.settings.callback) is None:
            return
        for run, model in zip(self.runs, self.networks.models, strict=True):
            if run.status == "finished":
                callback(epoch, model, run.history[-1])

    def _active(self) -> list[bool]:
        return [run.status == "finished" for run in self.runs]


def _measures(loss: float, share: float) -> str:
    return f"loss {loss:.3f}, accuracy {share:.1%}"


def _summary(runs: Sequence[Run]) -> str:
    """Last numbers of the networks that are still training, their mean if several."""
    last = [run.history[-1] for run in runs if run.status == "finished"]
    if not last:
        return ""
    means = {
        name: sum(record[name] for record in last) / len(last)
        for name, value in last[0].items()
        if value is not None
    }
    text = _measures(means["train_loss"], means["train_accuracy"])
    if "validation_accuracy" in means:
        text += f", validation {means['validation_accuracy']:.1%}"
    return text
