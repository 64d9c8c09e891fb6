"""Truncation: drop components of trained CP layers, and say honestly what it costs."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from cpnb._checks import check_count
from cpnb.base import CPLayer
from cpnb.importance import ranked_layers
from cpnb.refit import finite_components, keep_components, refit_lam, unit_gram
from cpnb.surgery import cp_layers, replace_layers

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_HINT = " For a fraction use keep."


def truncate(
    model: nn.Module,
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    key: str = "lam",
    refit: bool | str = False,
    data: Any = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> nn.Module:
    """Copy a model, or one CP layer, with only its most important components.

    Components stay in their order. The parameters are new: build a new optimizer before
    fine-tuning.

    Args:
        model: A CP layer or a module that holds some.
        rank: Components to keep: an int for every layer (a layer that holds fewer keeps
            what it has), or a mapping from layer names (others stay whole).
        keep: Instead of ``rank``, the fraction of each layer's present components, in
            (0, 1]; ``⌊fraction · rank⌋``, at least one.
        key: ``"lam"`` keeps the largest |λ|, as the paper; ``"greedy"`` removes one
            component at a time, always the one that changes the kernel least;
            ``"nested"`` keeps the first ones, after training with `cpnb.NestedRank`.
            ``"gradient"``, ``"hessian"`` and ``"activation"`` look at images,
            ``"random"`` is a control: see `component_order`.
        refit: Re-solve λ for the components that stay by least squares: True or
            ``"weight"`` on the kernel, ``"data"`` on the outputs of the layer for the
            inputs that it has in the whole network.
        data: Images for what looks at them: a data set, of which 1,000 training images
            are used, or a split or a pair ``(images, labels)``, used whole.
        generator: Of the random key; None draws the same order every time.
        progress: Whether to show a bar when images take more than two seconds.

    Returns:
        A truncated copy; the source is not touched.

    Raises:
        TypeError: If ``rank`` is not an int or a mapping of ints, or there is no data
            for what looks at it.
        ValueError: If neither or both of ``rank`` and ``keep`` are given, one is out of
            range, ``key``, ``refit`` or a layer name is unknown, or λ is not finite.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509 (its code sorts by signed λ;
    this sorts by |λ|).

    >>> from cpnb.layers import CPLinear
    >>> truncate(CPLinear(20, 10, rank=6), keep=0.5)
    CPLinear(20, 10, rank=3 (0.43 of break-even 7))
    """
    ranks = wanted_ranks(model, rank=rank, keep=keep)
    ranked = ranked_layers(
        model,
        ranks,
        key=key,
        refit=refit,
        data=data,
        generator=generator,
        progress=progress,
    )
    cut = {name: ranked[name].cut(count) for name, count in ranks.items()}
    return replace_layers(model, cut)


def wanted_ranks(
    model: nn.Module,
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
) -> dict[str, int]:
    """Components that `truncate` would keep, by layer, for the same arguments.

    Raises:
        TypeError: As `truncate`.
        ValueError: As `truncate`.
    """
    layers = cp_layers(model)
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} without CP layers. Call "
            "cpnb.canonicalize first."
        )
    if (rank is None) == (keep is None):
        raise ValueError(f"rank is {rank} and keep is {keep}, expected exactly one.")
    if rank is None:
        return {name: kept_rank(layer.rank, keep) for name, layer in layers.items()}
    return _ranks_by_layer(rank, layers)


def kept_rank(rank: int, keep: float) -> int:
    """Components that stay of ``rank`` when a fraction is kept: at least one.

    ``⌊rank · keep⌋``, with a margin for fractions that floating point rounds down.

    Raises:
        ValueError: If ``keep`` is not in (0, 1].

    >>> kept_rank(10, 0.25), kept_rank(10, 0.7), kept_rank(10, 0.01)
    (2, 7, 1)
    """
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"keep is {keep!r}, expected a fraction in (0, 1].")
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}, expected a fraction in (0, 1].")
    return max(1, int(rank * keep + 1e-9))


@torch.no_grad()
def select_components(
    layer: CPLayer,
    index: Tensor | Sequence[int],
    *,
    refit: bool = False,
    gram: Tensor | None = None,
) -> CPLayer:
    """Copy a CP layer with the given components only, in their present order.

    Args:
        layer: A CP layer.
        index: Distinct component indices, in any order, at least one.
        refit: Re-solve λ by least squares on the kernel, ``Γ_SS λ' = Γ_S: λ``.
        gram: Re-solve λ with this matrix for Γ: that of `output_gram` makes it least
            squares on the outputs. Shape ``(rank, rank)``.

    Returns:
        A copy of rank ``len(index)``.

    Raises:
        ValueError: If ``index`` is empty, repeats itself or is out of range.
    """
    index = torch.as_tensor(index, device=layer.lam.device)
    if index.ndim != 1 or (len(index) and index.dtype not in _INTEGERS):
        raise ValueError(f"index is {index.tolist()}, expected a list of ints.")
    index = index.long().sort().values
    if not len(index) or len(index.unique()) < len(index) or index[0] < 0:
        raise ValueError(
            f"index is {index.tolist()}, expected distinct component indices, at least "
            "one."
        )
    if index[-1] >= layer.rank:
        raise ValueError(f"index has {index[-1]}, expected less than {layer.rank}.")
    lam = None
    if refit or gram is not None:
        whole, units = finite_components(layer)
        gram = unit_gram(whole, units) if gram is None else gram.to(whole)
        lam = refit_lam(whole, gram, index) if len(index) < layer.rank else None
    return keep_components(layer, index, lam)


def _ranks_by_layer(
    rank: int | Mapping[str, int], layers: Mapping[str, CPLayer]
) -> dict[str, int]:
    if not isinstance(rank, Mapping):
        count = check_count(rank, "rank", hint=_HINT)
        if list(layers) == [""]:
            rank = {"": count}
        else:
            return {name: min(count, layer.rank) for name, layer in layers.items()}
    unknown = [name for name in rank if name not in layers]
    if unknown:
        raise ValueError(f"rank names {unknown}, expected some of {list(layers)}.")
    counts = {
        name: check_count(n, f"rank[{name!r}]", hint=_HINT) for name, n in rank.items()
    }
    for name, count in counts.items():
        if count > layers[name].rank:
            raise ValueError(
                f"rank is {count} for layer {name!r}, expected at most the "
                f"{layers[name].rank} components it holds."
            )
    return counts
