"""Train classifiers on tensors: one loop, seeded, with a record of each run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from cpnb._checks import check_count, check_module
from cpnb._training.batches import Pair, training_source
from cpnb._training.checkpoint import Checkpoint
from cpnb._training.loop import Training
from cpnb._training.networks import Single, check_trainable, trained
from cpnb._training.settings import Callback, Settings
from cpnb.augmentation import Augment
from cpnb.evaluation import preserved_flags
from cpnb.hooks import Hook, model_hooks
from cpnb.optimizers import MakeOptimizer, check_optimizer
from cpnb.records import Run, provenance


def fit(
    model: nn.Module,
    data: Any,
    *,
    validation: Pair | None = None,
    epochs: int = 30,
    batch_size: int = 32,
    optimizer: str | MakeOptimizer = "adam",
    lr: float = 0.003,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str | None = "cosine",
    seed: int = 0,
    augment: Augment | None = None,
    hooks: Sequence[Hook] = (),
    amp: bool | str = False,
    channels_last: bool = True,
    compile: bool = False,
    cuda_graph: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> Run:
    """Train a classifier in place with cross entropy.

    The default recipe suits dense and CP networks alike. Under ``"sgd"`` a CP network
    needs a smaller learning rate than a dense one: the gradient of σ and of each λ
    gathers the whole kernel.

    The same arguments, threads and device give the same weights: the seed decides the
    order of the images, their augmentation and the dropout, whose draws are the same on
    every device. Global random states are put back afterwards, and so is every
    submodule's ``training`` flag.

    Ctrl-C, or a loss that is not finite, ends the training. The model then keeps the
    weights of the last step, and the history holds the completed epochs. With a
    checkpoint the same call goes on after the last completed epoch, also after a crash,
    and ends with the same curve as if nothing had happened.

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
        schedule: ``"cosine"`` anneals the learning rate to 0; ``"step"`` divides it by
            ten after a half and again after three quarters of the steps;
            ``"one-cycle"`` lets it rise to ``lr`` over the first 30 % and fall to
            nearly 0; None keeps it constant.
        seed: Seed of the image order, of the augmentation and of dropout.
        augment: Random changes of the training images, such as
            ``Augment(crop=4, flip=True)``.
        hooks: Called around each step, after those that came with the model; see
            :class:`cpnb.hooks.Hook`.
        amp: Mixed precision: ``"bfloat16"``, ``"float16"`` with a scaled loss, or True
            for what the device is good at.
        channels_last: Store the colours of an image innermost, which convolution and
            pooling run faster on, unless the network fails on it, as one that calls
            ``view`` does.
        compile: Run the network through `torch.compile`; pays on a GPU, after a wait.
        cuda_graph: Capture the step in a CUDA graph and replay it; needs a CUDA device,
            no hooks and an optimizer by name.
        checkpoint: File that keeps the state after each epoch. If it is there already,
            the training goes on from it, or returns at once if it had ended.
        callback: Called as ``callback(epoch, model, record)`` after each epoch.
        progress: Show a text progress bar with images per second.

    Returns:
        The record of the run.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an impossible value, or the checkpoint is of
            another training. The model is unchanged.
    """
    check_module(model)
    seed = check_count(seed, "seed", least=0)
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        augment=augment,
        hooks=hooks,
        amp=amp,
        compile=compile,
        cuda_graph=cuda_graph,
        callback=callback,
    )
    chosen = check_optimizer(optimizer, lr, momentum, weight_decay)
    check_trainable(model)
    source = training_source(model, data, validation, channels_last, augment)
    hooks = [*model_hooks(model), *settings.hooks]
    settings.check_device(source.labels.device, hooks)
    recipe = {
        "model": type(model).__name__,
        "trained_parameters": sum(p.numel() for p in trained(model).values()),
        "data": getattr(data, "name", "pair of tensors"),
        "data_seed": getattr(data, "seed", None),
        "images": source.counts,
        **chosen,
        **settings.recipe(source.labels.device),
        "seed": seed,
        "hooks": [str(hook) for hook in hooks],
        "channels_last": source.channels_last,
    }
    run = Run("finished", [], recipe, provenance(source.labels.device))
    training = Training(Single(model), source, settings, [run], hooks)
    kept = None if checkpoint is None else Checkpoint(checkpoint, training)
    with _progress_bar(training.images, progress) as bar, preserved_flags(model):
        training.run(bar, kept)
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


def _progress_bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not progress, unit=" images", mininterval=0.5)
