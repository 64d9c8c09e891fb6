"""Whole models in low-rank form: one share of the parameters, one way to start."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from cpnb._checks import check_module
from cpnb.budgets import ParameterRatio
from cpnb.conversion import is_weighted, refusal
from cpnb.lowrank import LowRankConv2d, LowRankLinear
from cpnb.lowrank_base import LowRankLayer, clipped_rank
from cpnb.matrices import Factors, matrix_rank, unfold, unfolded_shape
from cpnb.ranks import Rank
from cpnb.surgery import Skip, named_ranks, refuse_tied, replace_layers, skip_rule

_KINDS: dict[type[nn.Module], type[LowRankLayer]] = {
    nn.Conv2d: LowRankConv2d,
    nn.Linear: LowRankLinear,
}


def factorize(
    model: nn.Module,
    *,
    rank: Rank | ParameterRatio | Mapping[str, Rank],
    init: str | Callable[..., Factors] = "spectral",
    middle: bool = False,
    skip: Skip | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Copy a model with its convolutions and linear layers in low-rank form.

    With ``rank=ParameterRatio(0.1)`` the whole model, dense layers included, holds at
    most a tenth of its parameters: every factorized layer gets the same fraction of its
    break-even rank, found by bisection.

    Args:
        model: Any module of stock layers; not touched. Also a single layer, with
            ``skip=()``.
        rank: As in `LowRankConv2d`, for every layer, or a mapping from each layer's
            name; or a share of the whole model's parameters.
        init: ``"spectral"`` splits the model's present kernels, be they trained or at
            their start; ``"kaiming"`` keeps only their shapes.
        middle: Whether each layer has a square matrix between its two, ``U M Vᵀ``.
        skip: Layers that stay dense: names, or a predicate ``(name, layer) -> bool``.
            None skips the first and the last layer, as the paper does (see
            `first_and_last`); ``()`` skips none.
        generator: Source of randomness; torch's default one if None.

    Returns:
        A new model.

    Raises:
        TypeError: If a layer that is not skipped cannot be converted exactly.
        ValueError: If weights are tied, a name is unknown, the budget is too small, or
            there is nothing to convert.

    Source: Khodak et al. 2021, arXiv:2105.01029. Its released code takes one fraction
    of ``out · height`` instead of break-even.

    >>> from cpnb import ResNet
    >>> net = ResNet(32, width=2)
    >>> small = factorize(net, rank=ParameterRatio(0.1))
    >>> sizes = [sum(p.numel() for p in m.parameters()) for m in (net, small)]
    >>> sizes, round(sizes[1] / sizes[0], 4)
    ([1849898, 180458], 0.0976)
    >>> small.stage3[4].conv2.rank, small.conv1.kernel_size
    (18, (3, 3))
    """
    check_module(model)
    skipped = skip_rule(model, first_and_last(model) if skip is None else skip)
    names = [
        name
        for name, layer in model.named_modules()
        if is_weighted(layer) and not skipped(name, layer)
    ]
    if not names:
        raise ValueError(
            f"model is a {type(model).__name__} with no convolution or linear layer to "
            "factorize. Check the model and skip; without skip the first and the last "
            "layer stay dense, skip=() takes them in."
        )
    refuse_tied(model, names)
    for name in names:
        layer = model.get_submodule(name)
        reason = refusal(layer)
        if reason is None and type(layer) not in _KINDS:
            reason = "expected a Conv2d or a Linear"
        if reason:
            raise TypeError(
                f"layer {name!r} is a {type(layer).__name__}: {reason}. To leave it "
                "dense, add its name to skip."
            )
    ranks = _ranks_by_name(rank, model, names, middle)
    layers = {
        name: _KINDS[type(layer)].from_layer(
            layer, rank=ranks[name], init=init, middle=middle, generator=generator
        )
        for name, layer in ((name, model.get_submodule(name)) for name in names)
    }
    return replace_layers(model, layers)


def first_and_last(model: nn.Module) -> tuple[str, ...]:
    """Names of the first and the last convolution or linear layer of a model.

    In the order in which the model registers them: usually the layer that sees the
    image and the classifier, which factorization gains little from.

    >>> first_and_last(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 2)))
    ('0', '2')
    """
    check_module(model)
    names = [name for name, layer in model.named_modules() if is_weighted(layer)]
    return tuple(dict.fromkeys((*names[:1], *names[-1:])))


def _ranks_by_name(
    rank: Rank | ParameterRatio | Mapping[str, Rank],
    model: nn.Module,
    names: list[str],
    middle: bool,
) -> dict[str, int]:
    if isinstance(rank, ParameterRatio):

        def held(layer: nn.Module, rank: int) -> int:
            rows, columns = _matrix_shape(layer)
            inner = rank if middle else 0
            return getattr(layer, "groups", 1) * rank * (rows + columns + inner)

        def rank_at(layer: nn.Module, fraction: float) -> int:
            return matrix_rank(fraction, _matrix_shape(layer), middle=middle)

        return rank.share(model, names, held=held, rank_at=rank_at)
    counts = {}
    for name, wanted in named_ranks(rank, names).items():
        layer = model.get_submodule(name)
        shape = _matrix_shape(layer)
        matrices = unfold(layer.weight.detach(), getattr(layer, "groups", 1))
        count = matrix_rank(wanted, shape, matrices, middle=middle)
        counts[name] = clipped_rank(count, shape, f"layer {name!r}")
    return counts


def _matrix_shape(layer: nn.Module) -> tuple[int, int]:
    return unfolded_shape(layer.weight.shape, getattr(layer, "groups", 1))
