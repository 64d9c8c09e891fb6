"""Layers and whole models between stock torch and CP form.

Conversions are exact or refuse; only the fit of a lower rank loses something. Every
one walks a model the same way: `layers_to_convert`, then `replace_layers`.
"""

import copy
import functools
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from cpnb.cp import CPForm, Rank, exact_rank, resolve_rank
from cpnb.initializers import FITS, resolve_init
from cpnb.layers import CP_KINDS, CPLayer, CPLinear, FactoredLayer  # noqa: F401

__all__ = ["canonicalize", "cp_layers", "from_layer", "step_gauge_", "to_dense"]

LOSS = 0.1  # share of the kernels' squared norm; a fit that loses more says so

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]
Ranks = Rank | Mapping[str, Rank]

_RELATED = (nn.modules.conv._ConvNd, nn.Linear, nn.LazyLinear, nn.Bilinear)


def from_layer(
    layer: Any,
    *,
    rank: Rank,
    init: str | Callable[..., CPForm] = "power",
    generator: torch.Generator | None = None,
) -> CPLayer:
    """Put a stock convolution or linear layer into CP form.

    All else is kept, with a copy of the bias; the source layer is not touched. A fit
    that loses more than a tenth of the kernel (in squared norm) gives a warning.

    Args:
        layer: A convolution of torch, perhaps a transposed one, or an `nn.Linear`.
        rank: As in `CPConv2d`, or a function such as ``cpnb.methods.fit_rank(0.1)``.
        init: ``"power"`` or ``"als"`` fit the layer's kernel and keep its norm; the
            random starts keep only its shape.
        generator: Source of randomness; torch's default one if None.

    Raises:
        TypeError: If the layer is of another type or has state that would be lost.

    >>> from_layer(nn.Linear(6, 4), rank=4)
    CPLinear(6, 4, rank=4 (1.33 of break-even 3))
    """
    reason = refusal(layer, CP_KINDS)
    if reason:
        raise TypeError(f"layer is a {type(layer).__name__}: {reason}.")
    new = _in_cp_form(layer, rank, init, generator)
    _tell_loss({"": layer}, {"": new})
    return new


def _in_cp_form(
    layer: Any, rank: Rank, init: Any, generator: torch.Generator | None
) -> CPLayer:
    start = resolve_init(init)
    # As the fits see it: without modes of size 1.
    kernel = layer.weight.detach()
    kernel = kernel.reshape([n for n in kernel.shape if n > 1] or [1])
    return converted(
        layer,
        CP_KINDS[type(layer)],
        rank=resolve_rank(rank, kernel.shape, kernel),
        init=start,
        generator=generator,
    )


def converted(
    layer: Any, kind: Any, *, init: Callable[..., Any], **options: Any
) -> Any:
    """Build the factored layer of class ``kind`` that stands for a stock layer.

    ``init`` is a start of that class, which is called with the layer's ``weight``.
    """
    new = kind(
        *kind.arguments(layer),
        init=functools.partial(init, weight=layer.weight.detach()),
        device=layer.weight.device,
        dtype=layer.weight.dtype,
        **options,
    )
    new.init = init
    for name, parameter in new.named_parameters():
        if name != "bias":
            parameter.requires_grad_(layer.weight.requires_grad)
    _copy_bias(layer.bias, new.bias)
    return new.train(layer.training)


def canonicalize(
    model: nn.Module,
    *,
    rank: Ranks = "same",
    init: str | Callable[..., CPForm] = "power",
    skip: Skip = (),
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> nn.Module:
    """Copy a model with every convolution and linear layer in CP form.

    The present kernels are fitted; if that loses more than a tenth of them (in squared
    norm), a warning says how much. Layers already in CP form stay as they are. The
    source model is not touched.

    Args:
        model: Any module; also a single layer.
        rank: As in `from_layer`, for every layer, or a mapping from each layer's name;
            `cpnb.methods.ranks_for` makes one from a budget of the whole model.
        init: ``"power"`` or ``"als"`` fit the present kernels and keep their norms; the
            random starts, such as ``"unified"``, keep only their shapes.
        skip: Names of layers to leave alone, or a predicate ``(name, layer) -> bool``.
        generator: Source of randomness; torch's default one if None.
        progress: Whether to show a bar when it takes more than two seconds.

    Returns:
        A new model.

    Raises:
        TypeError: If a layer that is not skipped cannot be converted exactly.
        ValueError: If weights are tied, or there is nothing to convert.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> canonicalize(net, rank=8, skip="2")
    Sequential(
      (0): CPLinear(8, 8, rank=8 (2.00 of break-even 4))
      (1): ReLU()
      (2): Linear(in_features=8, out_features=2, bias=True)
    )
    """
    from tqdm import tqdm

    layers = layers_to_convert(model, skip, CP_KINDS)
    if not layers and not cp_layers(model):
        raise ValueError(
            f"model is a {type(model).__name__} with no convolution or linear layer to "
            "convert. Check the model and skip."
        )
    ranks = named_ranks(rank, layers)
    if isinstance(rank, Integral):  # small layers cannot use as many as others
        bounds = {n: exact_rank(layer.weight.shape) for n, layer in layers.items()}
        clipped = {n: bound for n, bound in bounds.items() if rank > 2 * bound}
        ranks |= clipped
        if clipped:
            warnings.warn(
                f"rank is {rank}, more than some layers can use: they get the ranks "
                f"{clipped}, at which every kernel is exact.",
                stacklevel=2,
            )
    new = {}
    for name in tqdm(layers, "fitting kernels", disable=not progress, delay=2):
        try:
            new[name] = _in_cp_form(layers[name], ranks[name], init, generator)
        except (ValueError, ArithmeticError) as error:
            error.add_note(f"This is about layer {name!r}.")
            raise
    _tell_loss(layers, new)
    return replace_layers(model, new)


def _tell_loss(layers: Mapping[str, Any], fitted: Mapping[str, CPLayer]) -> None:
    """Warn if fits of kernels lost more than a tenth of their squared norm."""
    kept, total = {}, {}
    for name, layer in layers.items():
        old, new = (x.weight.detach().double().flatten() for x in (layer, fitted[name]))
        if fitted[name].init in FITS and old.any():
            total[name] = old.square().sum().item()
            kept[name] = (old @ new).square().item() / (new.square().sum().item() or 1)
    share = sum(kept.values()) / (sum(total.values()) or 1)
    if kept and share < 1 - LOSS:
        worst = min(kept, key=lambda name: kept[name] / total[name])
        warnings.warn(
            f"the CP form keeps {share:.0%} of the squared norm of the kernels, and "
            f"{kept[worst] / total[worst]:.0%} of that of {worst or 'the layer'!r}. Of "
            "a trained network rank=cpnb.methods.fit_rank(0.1) keeps 99%.",
            stacklevel=3,
        )


def step_gauge_(model: nn.Module) -> nn.Module:
    """Store the CP layers of a model in the step gauge, in place; see `CPLayer.store`.

    The function stays the same. New layers are in this gauge already; it is meant for
    checkpoints of version 0.1, and for networks whose λ have changed much in training.
    Build a new optimizer afterwards: momentum belongs to the old lengths.

    >>> layer = step_gauge_(CPLinear(20, 10))
    >>> bool(layer.unit * layer.scale == 0.25)
    True
    """
    for name, layer in cp_layers(model).items():
        if any(map(nn.utils.parametrize.is_parametrized, layer.modules())):
            raise TypeError(
                f"layer {name!r} is parametrized: its columns are computed. Call "
                "cpnb.methods.remove_normalizer(model, keep_cp=True) first."
            )
        layer.store(*layer.components(torch.float64))
    return model


def to_dense(model: nn.Module) -> nn.Module:
    """Copy a model with every CP or low-rank layer as the stock layer it stands for.

    The result holds no trace of cpnb, so that anything that takes torch modules takes
    it. The source model is not touched.

    Args:
        model: Any module; also a single layer.

    >>> to_dense(nn.Sequential(CPLinear(8, 2)))
    Sequential(
      (0): Linear(in_features=8, out_features=2, bias=True)
    )
    """
    modules = model.named_modules()
    return replace_layers(
        model, {n: _stock_layer(m) for n, m in modules if isinstance(m, FactoredLayer)}
    )


def cp_layers(model: nn.Module) -> dict[str, CPLayer]:
    """The CP layers of a model by name, in the order of its modules.

    >>> list(cp_layers(nn.Sequential(CPLinear(8, 4), nn.ReLU(), CPLinear(4, 2))))
    ['0', '2']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module."
        )
    modules = model.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, CPLayer)}


def layers_to_convert(
    model: nn.Module, skip: Skip, kinds: Iterable[type]
) -> dict[str, Any]:
    """Convolutions and linear layers by name, but for those to skip; or refuse them."""
    skipped = skip_rule(model, skip)
    layers: dict[str, nn.Module] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _RELATED) and not skipped(name, layer)
    }
    for name, layer in layers.items():
        reason = refusal(layer, kinds)
        if reason:
            raise TypeError(
                f"layer {name!r} is a {type(layer).__name__}: {reason}. To leave it "
                f"alone, pass skip=({name!r},)."
            )
    return layers


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Copy a model with some of its submodules, by name, replaced; or refuse it."""
    if "" in layers:
        return layers[""]
    for owner, module in model.named_modules():
        # What a copy takes over; a parametrized module refuses to say its state.
        computed = nn.utils.parametrize.is_parametrized(module)
        held = vars(module) if computed else module.__getstate__()
        for name, value in held.items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise TypeError(
                    f"attribute {name!r} of module {owner!r} is a tensor computed from "
                    "parameters, as old-style weight_norm and pruning leave it, which "
                    "torch cannot copy. Call torch.nn.utils.remove_weight_norm or "
                    "torch.nn.utils.prune.remove first."
                )
            if _holds_module(value):
                raise TypeError(
                    f"attribute {name!r} of module {owner!r} is or has a function that "
                    "holds a module: a copy of the model would still compute with this "
                    "one's layers. Make the module an attribute and call that."
                )
    replaced = {name: model.get_submodule(name) for name in layers}
    _refuse_tied(model, replaced)
    # The replaced layers need no copying: the memo says their copies are the new ones.
    return copy.deepcopy(model, {id(replaced[n]): new for n, new in layers.items()})


def _holds_module(value: Any, kept: bool = False, seen: tuple[Any, ...] = ()) -> bool:
    """Whether a function keeps a module, either of them also in lists and dicts.

    ``kept`` says that a function keeps ``value``: a copy of the function keeps it, too.
    """
    if kept and isinstance(getattr(value, "__self__", value), nn.Module):
        return True
    parts: list[Any] = []
    if isinstance(value, functools.partial):  # which itself is copied
        parts = [value.func, *kept * (*value.args, *value.keywords.values())]
    elif isinstance(value, Mapping):
        parts = [*value.values()]
    elif isinstance(value, list | tuple):
        parts = [*value]
    elif isinstance(value, types.FunctionType):
        kept = True
        filled = [c for c in value.__closure__ or () if c != types.CellType()]
        parts = [*(cell.cell_contents for cell in filled), *(value.__defaults__ or ())]
        parts += (value.__kwdefaults__ or {}).values()
    seen = (*seen, id(value))
    return any(_holds_module(one, kept, seen) for one in parts if id(one) not in seen)


def skip_rule(model: nn.Module, skip: Skip) -> Callable[[str, nn.Module], bool]:
    """Turn names to skip into a predicate; refuse names that are no layer."""
    if callable(skip):
        return skip
    names = {skip} if isinstance(skip, str) else set(skip)
    kinds = (*_RELATED, FactoredLayer)
    modules = model.named_modules(remove_duplicate=False)  # a layer with two names
    known = {name: layer for name, layer in modules if isinstance(layer, kinds)}
    if names - known.keys():
        unknown = sorted(names - known.keys())
        raise ValueError(f"skip names {unknown}, expected some of {sorted(known)}.")
    skipped = {known[name] for name in names}
    return lambda name, layer: layer in skipped


def named_ranks(rank: Ranks, names: Iterable[str]) -> dict[str, Rank]:
    """One rank for each layer: the same for all, or from a mapping of just these."""
    names = list(names)
    if not isinstance(rank, Mapping):
        return dict.fromkeys(names, rank)
    if set(rank) != set(names):
        raise ValueError(
            f"rank lacks {sorted(set(names) - set(rank))} and has unknown "
            f"{sorted(set(rank) - set(names))}, expected exactly the layers to "
            f"convert: {names}. Layers to leave alone go in skip."
        )
    return dict(rank)


def refusal(layer: Any, kinds: Iterable[type]) -> str | None:
    """Why a layer cannot be converted exactly, or None if it can."""
    if type(layer) not in kinds and not nn.utils.parametrize.is_parametrized(layer):
        names = ", ".join(kind.__name__ for kind in kinds)
        return f"expected exactly one of {names}, and no subclass"
    return lost_state(layer)


def lost_state(layer: Any) -> str | None:
    """What a layer holds that its constructor did not put there, or None."""
    if any(map(nn.utils.parametrize.is_parametrized, layer.modules())):
        return (
            "it is parametrized; call cpnb.methods.remove_normalizer first, which "
            "computes the same (with keep_cp=True it leaves CP layers as such)"
        )
    if has_hooks(layer):
        return "it has hooks, which would be lost; remove them first"
    if isinstance(layer, FactoredLayer):
        plain = type(layer)(*layer.arguments(layer), rank=1, device="meta")
    else:
        plain = type(layer)(1, 1, 1, device="meta")
    known = {*vars(plain), *plain._parameters, *plain._buffers, *plain._modules}
    flags = {n for n, v in vars(layer).items() if isinstance(v, bool)}
    held = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules} - flags
    if held - known:
        own = ", ".join(sorted(held - known))
        return f"it has attributes of its own, {own}, which would be lost"
    return None


def has_hooks(layer: nn.Module) -> bool:
    """Whether a layer or one of its parameters has hooks."""
    own = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    others = (parameter._backward_hooks for parameter in layer.parameters())
    return any((*own, layer._backward_pre_hooks, *others))


def _refuse_tied(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse to change layers that share a parameter, or its memory, with another."""

    def place(parameter: Tensor) -> tuple[Any, Any]:
        if nn.parameter.is_lazy(parameter):
            return id(parameter), 0
        return parameter.untyped_storage()._cdata, parameter.storage_offset()

    owners: dict[tuple[Any, Any], list[str]] = {}
    for prefix, module in model.named_modules():  # a layer used twice comes once
        for name, parameter in module.named_parameters(prefix, recurse=False):
            owners.setdefault(place(parameter), []).append(name)
    for name, layer in layers.items():
        for parameter in layer.parameters():
            shared = owners[place(parameter)]
            if len(shared) > 1:
                raise ValueError(
                    f"layer {name!r} shares a parameter: {' and '.join(shared)} are "
                    "the same tensor, which layers of their own would untie. "
                    "Pass the layers in skip, or untie them first."
                )


def _stock_layer(layer: Any) -> nn.Module:
    reason = lost_state(layer)
    if reason:
        raise TypeError(f"layer is a {type(layer).__name__}: {reason}.")
    with torch.enable_grad():  # to see whether any part of it is trained
        weight = layer.weight
    stock: Any = nn.utils.skip_init(
        layer.stock, *layer.arguments(layer), device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        stock.weight.copy_(weight)
    stock.weight.requires_grad_(weight.requires_grad)
    _copy_bias(layer.bias, stock.bias)
    return stock.train(layer.training)


@torch.no_grad()
def _copy_bias(source: Tensor | None, target: Tensor | None) -> None:
    if source is not None and target is not None:
        target.copy_(source)
        target.requires_grad_(source.requires_grad)
