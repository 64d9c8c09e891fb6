"""Train a classifier on tensors: one loop, seeded, with a record of the run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from cpnb._checks import check_count, check_module
from cpnb._training.batches import Pair, batches_of, training_pairs
from cpnb.evaluation import evaluate, preserved_flags
from cpnb.hooks import Hook, check_hooks, model_hooks, running
from cpnb.optimizers import build_optimizer
from cpnb.randomness import seeded
from cpnb.records import Run, provenance

SCHEDULES = (None, "cosine")

Callback = Callable[[int, nn.Module, dict[str, float | None]], Any]


def fit(
    model: nn.Module,
    data: Any,
    *,
    validation: Pair | None = None,
    epochs: int = 30,
    batch_size: int = 32,
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer] = "adam",
    lr: float = 0.003,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str | None = "cosine",
    seed: int = 0,
    hooks: Sequence[Hook] = (),
    channels_last: bool = True,
    callback: Callback | None = None,
    progress: bool = True,
) -> Run:
    """Train a classifier in place with cross entropy.

    The default recipe suits dense and CP networks alike. Under ``"sgd"`` a CP network
    needs a smaller learning rate than a dense one: the gradient of σ and of each λ
    gathers the whole kernel.

    The same arguments, threads and device give the same weights: the seed decides the
    order of the images and the dropout. Global random states are put back afterwards,
    and so is every submodule's ``training`` flag.

    Ctrl-C, or a loss that is not finite, ends the training. The model then keeps the
    weights of the last step, and the history holds the completed epochs.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``. Trained on the
            device and in the dtype it has; parameters without ``requires_grad`` stay.
        data: A data set, or a pair ``(images, labels)`` to train on. The test split
            is never read.
        validation: Pair to evaluate after each epoch, instead of the data set's
            validation split.
        epochs: Passes over the training images.
        batch_size: Images per step; the last batch of an epoch may be smaller, and
            takes in a single image left over, which batch norm could not do with.
        optimizer: ``"adam"``, ``"sgd"``, ``"rmsprop"``, or a function that turns a
            list of parameters into an optimizer and thereby replaces ``lr``,
            ``momentum`` and ``weight_decay``.
        lr: Learning rate.
        momentum: Momentum of ``"sgd"``; the other optimizers have none.
        weight_decay: Weight decay.
        schedule: ``"cosine"`` anneals the learning rate to 0; None keeps it constant.
        seed: Seed of the image order and of dropout.
        hooks: Called around each step, after those that came with the model; see
            :class:`cpnb.hooks.Hook`.
        channels_last: Store the colours of an image innermost, which convolution and
            pooling run faster on, unless the network fails on it, as one that calls
            ``view`` does.
        callback: Called as ``callback(epoch, model, record)`` after each epoch.
        progress: Show a text progress bar with images per second.

    Returns:
        The record of the run.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an impossible value. The model is unchanged.
    """
    check_module(model)
    epochs = check_count(epochs, "epochs")
    batch_size = check_count(batch_size, "batch_size")
    seed = check_count(seed, "seed", least=0)
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule is {schedule!r}, expected None or "cosine".')
    hooks = [*model_hooks(model), *check_hooks(hooks)]
    if callback is not None and not callable(callback):
        raise TypeError(
            f"callback is a {type(callback).__name__}, expected a function of epoch, "
            "model and record."
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    descent, settings = build_optimizer(optimizer, trained, lr, momentum, weight_decay)

    pairs, channels_last = training_pairs(model, data, validation, channels_last)
    labels = pairs[0][1]
    steps = epochs * len(batches_of(torch.arange(len(labels)), batch_size))
    cosine = CosineAnnealingLR(descent, steps) if schedule == "cosine" else None
    run = Run(
        status="finished",
        history=[],
        recipe={
            "model": type(model).__name__,
            "trained_parameters": sum(parameter.numel() for parameter in trained),
            "data": getattr(data, "name", "pair of tensors"),
            "data_seed": getattr(data, "seed", None),
            "images": [len(labels) for _, labels in pairs],
            "epochs": epochs,
            "batch_size": batch_size,
            **settings,
            "schedule": schedule,
            "seed": seed,
            "hooks": [str(hook) for hook in hooks],
            "channels_last": channels_last,
        },
        provenance=provenance(labels.device),
    )
    shuffle = torch.Generator().manual_seed(seed)
    with (
        _progress_bar(epochs * len(labels), progress) as bar,
        seeded(seed, labels.device),
        preserved_flags(model),
        running(hooks, model, descent),
    ):
        try:
            for epoch in range(1, epochs + 1):
                bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
                start = time.perf_counter()
                order = torch.randperm(len(labels), generator=shuffle)
                batches = batches_of(order.to(labels.device), batch_size)
                first = (epoch - 1) * len(batches)
                loss, share = _train_epoch(
                    model, pairs[0], batches, descent, cosine, hooks, first, bar
                )
                seconds = time.perf_counter() - start
                held_out = evaluate(model, pairs[1]) if len(pairs) > 1 else {}
                record = {
                    "epoch": epoch,
                    "train_loss": loss,
                    "train_accuracy": share,
                    "validation_loss": held_out.get("loss"),
                    "validation_accuracy": held_out.get("accuracy"),
                    "seconds": seconds,
                }
                if not math.isfinite(loss + held_out.get("loss", 0.0)):
                    run.status = "diverged"
                    break
                run.history.append(record)
                bar.set_postfix_str(_summary(record), refresh=False)
                if callback is not None:
                    callback(epoch, model, record)
        except KeyboardInterrupt:
            run.status = "interrupted"
        if run.status != "finished":
            bar.set_description(f"{run.status} in epoch {len(run.history) + 1}")
    return run


def fast_mode() -> bool:
    """Whether the environment asks for short runs with ``CPNB_FAST=1``.

    Raises:
        ValueError: If ``CPNB_FAST`` is neither a yes nor a no.
    """
    value = os.environ.get("CPNB_FAST", "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise ValueError(f"CPNB_FAST is {value!r}, expected 1 or 0.")


def _train_epoch(
    model: nn.Module,
    pair: Pair,
    batches: Sequence[Tensor],
    descent: Optimizer,
    cosine: CosineAnnealingLR | None,
    hooks: Sequence[Hook],
    first: int,
    bar: Any,
) -> tuple[float, float]:
    """One step per batch of indices; mean loss and accuracy as they were on the way."""
    images, labels = pair
    loss_sum, correct = torch.zeros((2, 1), device=labels.device).unbind()
    model.train()
    for step, index in enumerate(batches, first):
        for hook in hooks:
            hook.before_forward(model, step)
        target = labels[index]
        scores = model(images[index])
        loss = F.cross_entropy(scores, target)
        descent.zero_grad()
        loss.backward()
        for hook in hooks:
            hook.before_step(model, descent, step)
        descent.step()
        for hook in hooks:
            hook.after_step(model, descent, step)
        if cosine is not None:
            cosine.step()
        # Added up on the device: to read a number back would be to wait for it.
        loss_sum += loss.detach() * len(index)
        correct += (scores.detach().argmax(1) == target).sum()
        bar.update(len(index))
    return loss_sum.item() / len(labels), correct.item() / len(labels)


def _summary(record: dict[str, float | None]) -> str:
    text = f"loss {record['train_loss']:.3f}, accuracy {record['train_accuracy']:.1%}"
    if record["validation_accuracy"] is not None:
        text += f", validation {record['validation_accuracy']:.1%}"
    return text


def _progress_bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not progress, unit=" images", mininterval=0.5)
