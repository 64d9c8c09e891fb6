"""Conversion of layers and whole models between stock torch and CP form."""

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from cpnb._checks import check_module
from cpnb.base import CPLayer
from cpnb.conv import CPConv1d, CPConv2d, CPConv3d
from cpnb.conversion import convert_layer, is_weighted, refusal
from cpnb.initializers import CPForm
from cpnb.linear import CPLinear
from cpnb.lowrank_base import LowRankLayer
from cpnb.ranks import ModelRule, Rank

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]
_KINDS = {kind._stock: kind for kind in (CPConv1d, CPConv2d, CPConv3d, CPLinear)}


def from_layer(
    layer: nn.Module,
    *,
    rank: Rank | ModelRule,
    init: str | Callable[..., CPForm] = "power",
    generator: torch.Generator | None = None,
) -> CPLayer:
    """Put a stock convolution or linear layer into CP form.

    Stride, padding, dilation, groups, padding mode, device, dtype, training flag and a
    copy of the bias are kept; the source layer is not touched.

    Args:
        layer: An `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` or `nn.Linear`.
        rank: As in `CPConv2d`, or a rule such as ``FitRank(0.1)`` or
            ``ParameterRatio(0.3)``.
        init: ``"power"`` or ``"als"`` fit the layer's kernel; the random starts keep
            only its shape.
        generator: Source of randomness; torch's default one if None.

    Returns:
        The CP layer.

    Raises:
        TypeError: If the layer is of another type, parametrized or has hooks.
        ValueError: If its kernel has NaN or infinite entries, or ``rank`` or ``init``
            is out of range.

    >>> from_layer(nn.Linear(6, 4), rank=4)
    CPLinear(6, 4, rank=4 (1.33 of break-even 3))
    """
    kind = _KINDS.get(type(layer), CPLinear)
    return convert_layer(kind, layer, rank=rank, init=init, generator=generator)


def canonicalize(
    model: nn.Module,
    *,
    rank: Rank | ModelRule | Mapping[str, Rank | ModelRule] = "same",
    init: str | Callable[..., CPForm] = "unified",
    skip: Skip = (),
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Copy a model with every convolution and linear layer in CP form.

    Layers already in CP form stay as they are. The source model is not touched.

    Args:
        model: Any module; also a single layer.
        rank: As in `from_layer`, for every layer, or a mapping from each layer's name.
            A budget such as ``ParameterRatio(0.3)`` or ``FlopRatio(0.3, shape)`` is
            that of the whole model, within a mapping that of one layer.
        init: ``"power"`` or ``"als"`` fit the present kernels; the random starts, as
            for a network trained from scratch, keep only their shapes.
        skip: Names of layers to leave alone, or a predicate ``(name, layer) -> bool``.
        generator: Source of randomness; torch's default one if None.

    Returns:
        A new model.

    Raises:
        TypeError: If a layer that is not skipped cannot be converted exactly.
        ValueError: If weights are tied, a name is unknown, or there is nothing to
            convert.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> canonicalize(net, rank=3, skip="2")
    Sequential(
      (0): CPLinear(8, 8, rank=3 (0.75 of break-even 4))
      (1): ReLU()
      (2): Linear(in_features=8, out_features=2, bias=True)
    )
    """
    check_module(model)
    skipped = skip_rule(model, skip)
    names = [
        name
        for name, layer in model.named_modules()
        if is_weighted(layer) and not skipped(name, layer)
    ]
    if not names and not cp_layers(model):
        raise ValueError(
            f"model is a {type(model).__name__} with no convolution or linear layer to "
            "convert. Check the model and skip."
        )
    refuse_tied(model, names)
    for name in names:
        layer = model.get_submodule(name)
        reason = refusal(layer)
        if reason:
            raise TypeError(
                f"layer {name!r} is a {type(layer).__name__}: {reason}. To leave it "
                f"alone, pass skip=({name!r},)."
            )
    if isinstance(rank, ModelRule):
        ranks = rank.counts(model, names) if names else {}
    else:
        ranks = named_ranks(rank, names)
    converted = {
        name: from_layer(
            model.get_submodule(name), rank=ranks[name], init=init, generator=generator
        )
        for name in names
    }
    return replace_layers(model, converted)


def to_dense(model: nn.Module) -> nn.Module:
    """Copy a model with every CP or low-rank layer as the stock layer it stands for.

    The result holds no trace of cpnb, so that anything that takes torch modules takes
    it. The source model is not touched.

    Args:
        model: Any module; also a single layer.

    Returns:
        A new model that computes the same function.

    >>> to_dense(nn.Sequential(CPLinear(8, 2)))
    Sequential(
      (0): Linear(in_features=8, out_features=2, bias=True)
    )
    """
    check_module(model)
    dense = {
        layer: layer.to_dense()
        for layer in model.modules()
        if isinstance(layer, CPLayer | LowRankLayer)
    }
    return replace_layers(
        model,
        {
            name: dense[layer]
            for name, layer in model.named_modules(remove_duplicate=False)
            if layer in dense
        },
    )


def cp_layers(model: nn.Module) -> dict[str, CPLayer]:
    """The CP layers of a model by name, in the order of its modules.

    >>> list(cp_layers(nn.Sequential(CPLinear(8, 4), nn.ReLU(), CPLinear(4, 2))))
    ['0', '2']
    """
    check_module(model)
    modules = model.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, CPLayer)}


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Copy a model with some of its submodules, by name, replaced."""
    if "" in layers:
        return layers[""]
    # The replaced layers need no copying: the memo says their copies are the new ones.
    memo = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    return copy.deepcopy(model, memo)


def skip_rule(model: nn.Module, skip: Skip) -> Callable[[str, nn.Module], bool]:
    """Turn names to skip into a predicate; refuse names that are no layer."""
    if callable(skip):
        return skip
    if not isinstance(skip, Iterable):
        raise TypeError(
            f"skip is {skip!r}, expected layer names or a predicate (name, layer) -> "
            "bool."
        )
    names = {skip} if isinstance(skip, str) else set(skip)
    modules = model.named_modules(remove_duplicate=False)
    known = {
        name
        for name, layer in modules
        if is_weighted(layer) or isinstance(layer, CPLayer | LowRankLayer)
    }
    if names - known:
        raise ValueError(
            f"skip names {sorted(names - known)}, expected some of {sorted(known)}."
        )
    return lambda name, layer: name in names


def refuse_tied(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to change layers that share a parameter with another one."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        for parameter in model.get_submodule(name).parameters(recurse=False):
            shared = owners[id(parameter)]
            if len(shared) > 1:
                raise ValueError(
                    f"layer {name!r} shares a parameter: {' and '.join(shared)} are "
                    "the same tensor, which layers of their own would untie. "
                    "Pass the layers in skip, or untie them first."
                )


def named_ranks(
    rank: Rank | ModelRule | Mapping[str, Rank | ModelRule], names: list[str]
) -> dict[str, Rank | ModelRule]:
    """One rank for each layer: the same for all, or from a mapping of just these."""
    if not isinstance(rank, Mapping):
        return dict.fromkeys(names, rank)
    if set(rank) != set(names):
        missing, unknown = set(names) - set(rank), set(rank) - set(names)
        raise ValueError(
            f"rank lacks {sorted(missing)} and has unknown {sorted(unknown)}, "
            f"expected exactly the layers to convert: {names}. "
            "Layers to leave alone go in skip."
        )
    return dict(rank)
