"""Train classifiers on tensors: one loop, seeded, with a record of each run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from cpnb._data.splits import Split
from cpnb._training.batches import Pair, training_source
from cpnb._training.loop import Training
from cpnb._training.members import check_members, choose_way
from cpnb._training.networks import Single, Stacked, trained
from cpnb._training.running import run_all
from cpnb._training.settings import Callback, Settings
from cpnb.augmentation import Augment
from cpnb.hooks import Hook, model_hooks
from cpnb.optimizers import MakeOptimizer, check_optimizer
from cpnb.records import Run, provenance


def fit(
    model: nn.Module | Sequence[nn.Module],
    data: Any,
    *,
    validation: Split | Pair | None = None,
    epochs: int = 30,
    batch_size: int = 32,
    optimizer: str | MakeOptimizer = "adam",
    lr: float | Sequence[float] = 0.003,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str | None = "cosine",
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    augment: Augment | None = None,
    hooks: Sequence[Hook] = (),
    amp: bool | str = False,
    channels_last: bool = True,
    compile: bool = False,
    cuda_graph: bool = False,
    vectorise: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> Run | list[Run]:
    """Train a classifier in place with cross entropy, or several from many seeds.

    The default recipe suits dense and CP networks alike. Under ``"sgd"`` a CP network
    needs a smaller learning rate than a dense one: the gradient of σ and of each λ
    gathers the whole kernel.

    The same arguments, threads and device give the same weights, on a GPU up to the
    order of its sums: the seed decides the order of the images, their augmentation and
    the dropout, whose draws are the same on every device. Global random states are put
    back afterwards, and so is every submodule's ``training`` flag.

    Ctrl-C, or a loss that is not finite, ends the training. The model then keeps the
    weights of the last step, and the history holds the completed epochs. With a
    checkpoint the same call goes on after the last completed epoch, also after a crash,
    and ends with the same curve as if nothing had happened.

    Several networks of one architecture may train in one vectorised graph, each from
    its seed, at its rate, with its own images, dropout and batch statistics, and with
    the results that it would have alone, but for rounding. The recipe says which way
    was taken and why.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``. Trained on the
            device and in the dtype it has; parameters without ``requires_grad`` stay.
            Or a list of such modules.
        data: A data set, or a split or a pair ``(images, labels)`` to train on. The
            test split is never read.
        validation: Split or pair to evaluate after each epoch, instead of the data
            set's validation split.
        epochs: Passes over the training images.
        batch_size: Images per step; the last batch of an epoch may be smaller, and
            takes in a single image left over, which batch norm could not do with.
        optimizer: ``"adam"``, ``"sgd"``, ``"rmsprop"``, or a function that turns a
            list of parameters into an optimizer and thereby replaces ``lr``,
            ``momentum`` and ``weight_decay``.
        lr: Learning rate; for a list of modules also one for each.
        momentum: Momentum of ``"sgd"``; the other optimizers have none.
        weight_decay: Decay of kernels and directions, not of biases and scales; see
            :func:`cpnb.param_groups`.
        schedule: ``"cosine"`` anneals the learning rate to 0; ``"step"`` divides it by
            ten after a half and again after three quarters of the steps;
            ``"one-cycle"`` lets it rise to ``lr`` over the first 30 % and fall to
            nearly 0; None keeps it constant.
        seed: Seed of the image order, of the augmentation and of dropout.
        seeds: For a list of modules one seed for each, instead of ``seed``.
        augment: Random changes of the training images, such as
            ``Augment(crop=4, flip=True)``.
        hooks: Called around each step, after those that came with the model; see
            :class:`cpnb.hooks.Hook`.
        amp: Mixed precision: ``"bfloat16"``, ``"float16"`` with a scaled loss, or True
            for what the device is good at.
        channels_last: Store the colours of an image innermost, which convolution and
            pooling run faster on, unless the network fails on it, as one that calls
            ``view`` does.
        compile: Run the network through `torch.compile`, which takes a while at first.
        cuda_graph: Capture the step in a CUDA graph and replay it; needs a CUDA device,
            no hooks and an optimizer by name.
        vectorise: Whether several networks train in one graph. None does so on a GPU,
            if a trial step gives each network what it computes alone. On a CPU it pays
            for networks as small as those for the digits only.
        checkpoint: File that keeps the state at the start and after each epoch. If it
            is there already, the training goes on from it, or returns at once if it had
            ended. What a layer remembers neither in a parameter nor in a buffer is not
            kept. Networks that train one after the other have a file each, with ``-0``,
            ``-1``, … in their names.
        callback: Called as ``callback(epoch, model, record)`` after each epoch, of each
            network. The checkpoint holds the epoch also if it raises.
        progress: Show a text progress bar with images per second.

    Returns:
        The record of the run; for a list of modules a list of records. ``seconds`` are
        then the time of all over their number, so that images per second over all are
        all images over all seconds, in either way.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an impossible value, or the checkpoint is of
            another training or damaged. The models are unchanged.
    """
    models, seeds, rates = check_members(model, seed, seeds, lr)
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
    chosen = [check_optimizer(optimizer, r, momentum, weight_decay) for r in rates]
    source = training_source(models, data, validation, channels_last, augment)
    all_hooks = [[*model_hooks(member), *settings.hooks] for member in models]
    settings.check_device(source.labels.device, any(all_hooks))
    where, way = provenance(source.labels.device), {}
    if len(models) > 1:
        way = choose_way(vectorise, models, seeds, source, settings, any(all_hooks))
    runs = [
        Run(
            status="finished",
            history=[],
            recipe={
                "model": type(member).__name__,
                "trained_parameters": sum(p.numel() for p in trained(member).values()),
                "data": getattr(data, "name", "pair of tensors"),
                "data_seed": getattr(data, "seed", None),
                "images": source.counts,
                **chosen[n],
                **settings.recipe(source.labels.device),
                "seed": seeds[n],
                "hooks": [str(hook) for hook in all_hooks[n]],
                "channels_last": source.channels_last,
                **way,
            },
            provenance=dict(where),
        )
        for n, member in enumerate(models)
    ]
    if way.get("members") == "vectorised":
        trainings = [Training(Stacked(models), source, settings, runs, [])]
    else:
        trainings = [
            Training(Single(member), source, settings, [run], own)
            for member, run, own in zip(models, runs, all_hooks, strict=True)
        ]
    run_all(trainings, checkpoint, progress)
    return runs[0] if model is models[0] else runs


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
