"""Train a classifier: one loop, seeded, with a record of each run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpnb.layers import evaluation_mode
from cpnb.train.batches import Augment, Batches
from cpnb.train.data import Split, as_split
from cpnb.train.evaluation import check_scores, measure
from cpnb.train.optim import MakeOptimizer, make_optimizer, make_schedule
from cpnb.train.records import MEASURES, Run, provenance

_LOOK = 50  # steps between two looks at the losses, each of which waits for the device
_CALLS = ("start", "before_forward", "before_step", "after_step", "after_epoch", "stop")


def fit(
    model: nn.Module,
    data: Any,
    *,
    validation: Split | tuple[Tensor, Tensor] | None = None,
    epochs: int = 30,
    batch_size: int = 32,
    optimizer: str | MakeOptimizer = "adam",
    lr: float = 0.003,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str | None = "cosine",
    seed: int = 0,
    augment: Augment | None = None,
    hooks: Sequence[Any] = (),
    amp: bool = False,
    compile: bool | str = False,
    callback: Callable[[int, nn.Module, dict[str, Any]], Any] | None = None,
    progress: bool = True,
) -> Run:
    """Train a classifier in place with cross entropy.

    The same arguments, threads and device give the same weights, on a GPU up to the
    order of its sums. Global random states and ``training`` flags are put back. Of a
    network in train mode submodules in eval mode stay so; of one in eval mode those
    that are frozen: no parameter needs a gradient. Ctrl-C, or a loss that is not
    finite, ends the training with the weights of the last step.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``.
        data: A data set, whose test split is not read, or a split or pair to train on.
        validation: Split or pair to evaluate after each epoch, else the data set's.
        epochs: Passes over the training images.
        batch_size: Images per step; one left over joins the batch before.
        optimizer: ``"adam"``, ``"sgd"``, ``"rmsprop"``, or a function that makes one of
            a list of parameters, for which the next three arguments do not count.
        lr: Learning rate.
        momentum: Momentum of ``"sgd"``; the other optimizers have none.
        weight_decay: Decay of kernels and directions, see `param_groups`.
        schedule: ``"cosine"``, ``"step"``, None: see `make_schedule`.
        seed: Seed of the image order, of the augmentation and of dropout.
        augment: Random changes of the images, such as ``Augment(crop=4, flip=True)``.
        hooks: Objects with any of the methods ``start(model, optimizer)``,
            ``before_forward(model, step)``, ``before_step(model, optimizer, step)``,
            ``after_step(model, optimizer, step)``, ``after_epoch(model, optimizer)``
            and ``stop(model)``; steps count from 0. Those the model brings come first.
        amp: Mixed precision in bfloat16.
        compile: Use `torch.compile`, perhaps in a mode such as ``"reduce-overhead"``.
        callback: Called as ``callback(epoch, model, record)`` after each epoch.
        progress: Show a text progress bar with images per second.
    """
    from tqdm import tqdm

    hooks = [*getattr(model, "training_hooks", ()), *hooks]
    for hook in hooks:
        if not any(hasattr(hook, name) for name in _CALLS):
            raise TypeError(f"{hook!r} in hooks has none of {', '.join(_CALLS)}.")
    chosen = make_optimizer(optimizer, model, lr, momentum, weight_decay)
    if validation is None:
        validation = getattr(data, "validation", None)
    held_out = None if validation is None else as_split(validation)
    train = as_split(data, "train")
    batches = Batches(model, train, held_out, batch_size, seed, augment)
    rates = make_schedule(schedule, chosen, epochs * len(batches))
    forward: Callable[..., Any] = model
    if compile:
        forward = torch.compile(model, mode=None if compile is True else compile)
    recipe = {
        "model": type(model).__name__,
        "data": getattr(data, "name", "pair of tensors"),
        "data_seed": getattr(data, "seed", None),
        "images": [len(split.labels) for split in (train, held_out) if split],
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer if isinstance(optimizer, str) else type(chosen).__name__,
        "lr": float(chosen.param_groups[0]["lr"]),
        "momentum": momentum if optimizer == "sgd" else None,
        "weight_decay": weight_decay if isinstance(optimizer, str) else None,
        "schedule": schedule,
        "seed": seed,
        "augment": None if augment is None else asdict(augment),
        "hooks": [str(hook) for hook in hooks],
        "amp": amp,
        "compile": compile,
    }
    device = batches.labels.device
    run = Run("interrupted", [], recipe, provenance(device))  # unless it is not
    modes = _training_modes(model)
    # Added up on the device, as to read a number back would be to wait for it: loss,
    # right answers, images, and steps before the loss was not finite.
    totals = torch.zeros(4, device=device)
    total = epochs * len(train.labels)
    bar = tqdm(total=total, disable=not progress, unit=" images", mininterval=0.5)
    with bar, _session(model, chosen, hooks, seed, device), suppress(KeyboardInterrupt):
        for epoch in range(1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            start = time.perf_counter()
            first = (epoch - 1) * len(batches)
            used_rates = []
            totals.zero_()
            for module, mode in modes.items():
                module.training = mode
            for step, (images, labels) in enumerate(batches.epoch(), first):
                used_rates.append(float(rates.get_last_lr()[0]))
                _call(hooks, "before_forward", model, step)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    scores = forward(images)
                check_scores(scores, len(labels), 1)
                loss = F.cross_entropy(scores.float() if amp else scores, labels)
                model.zero_grad()
                loss.backward()
                _call(hooks, "before_step", model, chosen, step)
                chosen.step()
                _call(hooks, "after_step", model, chosen, step)
                rates.step()
                totals[0] += loss.detach() * len(labels)
                totals[1] += (scores.detach().argmax(1) == labels).sum()
                totals[2] += len(labels)
                totals[3] += totals[0].isfinite()
                bar.update(len(labels))
                if len(used_rates) % _LOOK == 0:
                    record = _record(epoch, totals)
                    bar.set_postfix_str(_text(record), refresh=False)
                    if not isfinite(record["train_loss"]):
                        break
            _call(hooks, "after_epoch", model, chosen)
            record = _record(epoch, totals)
            record["seconds"] = time.perf_counter() - start
            if batches.held_out is not None and isfinite(record["train_loss"]):
                mean, right, _ = measure(model, batches.held_out)
                record["validation_loss"] = mean
                record["validation_accuracy"] = right / len(batches.held_out.labels)
            bar.set_postfix_str(_text(record), refresh=False)
            if not isfinite(record["train_loss"] + (record["validation_loss"] or 0)):
                broken = min(int(totals[3]), len(used_rates) - 1)
                run.status = "diverged"
                run.message = _advice(epoch, first + broken, used_rates[broken])
                bar.set_description(f"diverged in epoch {epoch}")
                break
            run.history.append(record)
            if callback is not None:
                callback(epoch, model, record)
        else:
            run.status = "finished"
    return run


def fast_mode() -> bool:
    """Whether the environment asks for short runs with ``CPNB_FAST=1``."""
    return os.environ.get("CPNB_FAST", "0").lower() not in ("", "0", "false", "no")


def _training_modes(model: nn.Module) -> dict[nn.Module, bool]:
    """Which modules are in train mode during training, see `fit`."""
    modes = {m: m.training or not model.training for m in model.modules()}
    for module in modes:
        needed = [p.requires_grad for p in module.parameters()]
        if needed and not any(needed) and not module.training:
            modes |= dict.fromkeys(module.modules(), False)
    return modes


@contextmanager
def _session(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    hooks: Sequence[Any],
    seed: int,
    device: torch.device,
) -> Iterator[None]:
    """Seed what dropout reads, start the hooks; at the end put back and stop all."""
    devices = [device] if device.type == "cuda" else []
    with evaluation_mode(model), torch.random.fork_rng(devices), ExitStack() as stack:
        # Not torch.manual_seed, which also seeds devices whose state is not put back.
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        for hook in hooks:
            _call([hook], "start", model, optimizer)
            stack.callback(_call, [hook], "stop", model)
        yield


def _call(hooks: Sequence[Any], name: str, *arguments: Any) -> None:
    for hook in hooks:
        if hasattr(hook, name):
            getattr(hook, name)(*arguments)


def _record(epoch: int, totals: Tensor) -> dict[str, Any]:
    """The epoch so far; see `Run.history`."""
    loss, accuracy = (totals[:2] / totals[2]).tolist()
    measured = {"train_loss": loss, "train_accuracy": accuracy}
    return {"epoch": epoch, **dict.fromkeys(MEASURES), **measured}


def _text(record: dict[str, Any]) -> str:
    text = f"loss {record['train_loss']:.3f}, accuracy {record['train_accuracy']:.1%}"
    if record["validation_accuracy"] is not None:
        text += f", validation {record['validation_accuracy']:.1%}"
    return text


def _advice(epoch: int, step: int, rate: float) -> str:
    return (
        f"The loss was no longer finite at step {step} (in epoch {epoch}), at a "
        f"learning rate of {rate:.3g}. Build the network anew and try a smaller lr, "
        f"such as {rate / 10:.1g}."
    )
