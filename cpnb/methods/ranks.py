"""Ranks from a budget of parameters or an error, and training that orders them."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cpnb.convert import CP_KINDS, Skip, cp_layers, layers_to_convert, to_dense
from cpnb.cp import cp_parameters, resolve_rank
from cpnb.decompose import CPResult, als, power_method


def ranks_for(
    model: nn.Module,
    share: float,
    *,
    form: Literal["cp", "low_rank"] = "cp",
    skip: Skip = (),
) -> dict[str, int]:
    """Ranks with which a model holds at most a share of its dense parameters.

    Every layer gets the same fraction of its break-even rank, the largest in (0, 1]
    that stays within the budget (rounded, at least one component).

    Args:
        model: Stock layers to convert, or CP layers to truncate, which get at most the
            components they have.
        share: Of all parameters of the dense model, skipped layers included; (0, 1].
        form: What the layers are to become.
        skip: Layers to leave alone, as in `cpnb.canonicalize`.

    Returns:
        A rank by name, for ``rank=`` of `cpnb.canonicalize`, `cpnb.truncate` or
        (low-rank) `cpnb.factorize`.

    Raises:
        ValueError: If the budget is too small even for rank 1 in each layer.

    >>> ranks_for(nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3)), 0.5)
    {'0': 25, '1': 64}
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected a share in (0, 1].")
    dense = to_dense(model)
    layers: dict[str, Any] = layers_to_convert(dense, skip, CP_KINDS)
    sizes = {n: (m.weight.shape, getattr(m, "groups", 1)) for n, m in layers.items()}
    held, rank_at = _FORMS[form]
    most = {name: layer.rank for name, layer in cp_layers(model).items()}
    total = sum(parameter.numel() for parameter in dense.parameters())
    kept = total - sum(layer.weight.numel() for layer in layers.values())

    def ranks_at(fraction: float) -> dict[str, int]:
        ranks = {name: rank_at(fraction, *size) for name, size in sizes.items()}
        return {name: min(rank, most.get(name, rank)) for name, rank in ranks.items()}

    def spent(fraction: float) -> int:
        ranks = ranks_at(fraction).items()
        return kept + sum(held(rank, *sizes[name]) for name, rank in ranks)

    low, high = math.ulp(0.0), 1.0  # rank 1 everywhere, and break-even
    if (needed := spent(low)) > share * total:
        raise ValueError(
            f"share is {share}, a budget of {share * total:,.0f} of {total:,} "
            f"parameters, but rank 1 in each of {len(layers)} layers takes {needed:,} "
            f"with all that stays. Expected at least {needed / total:.4f}."
        )
    if spent(high) <= share * total:
        return ranks_at(high)
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if spent(middle) <= share * total else (low, middle)
    return ranks_at(low)


def fit_rank(
    error: float, *, method: Literal["power", "als"] = "power"
) -> Callable[[Tensor], int]:
    """The smallest rank whose fit is as close as asked, as a function of the kernel.

    Args:
        error: Relative error ``‖W − Ŵ‖/‖W‖`` to reach, in (0, 1).
        method: ALS usually needs fewer components than the power method, and more time.

    Returns:
        A function for ``rank=``; a ValueError where the fit cannot be that close.

    >>> fit_rank(0.1)(torch.diag(torch.tensor([9.0, 1.0, 0.1])))
    2
    """
    if not 0 < error < 1:
        raise ValueError(f"error is {error}, expected a number in (0, 1).")
    return functools.partial(_smallest_rank, error=error, method=method)


def _smallest_rank(kernel: Tensor, error: float, method: str) -> int:
    if kernel.ndim < 2 or not kernel.any():
        return 1
    fits: dict[str, Callable[..., CPResult]] = {"als": als, "power": power_method}
    fit = fits[method]
    most = kernel.numel() // max(kernel.shape)  # enough for an exact fit of any kernel

    def missed(rank: int) -> float:
        generator = torch.Generator(kernel.device).manual_seed(0)
        return fit(kernel, rank, generator=generator).relative_error

    below, rank = 0, 1
    while (reached := missed(rank)) > error:
        if rank == most:
            hint = "Ask for less" if method == "als" else 'Take method="als"'
            raise ValueError(
                f"error is {error}, but the fit of method {method!r} leaves "
                f"{reached:.3g} with {most} components, enough for an exact fit of any "
                f"kernel of shape {tuple(kernel.shape)}. {hint}."
            )
        below, rank = rank, min(most, 2 * rank)
    while rank - below > 1:
        middle = (below + rank) // 2
        below, rank = (middle, rank) if missed(middle) > error else (below, middle)
    return rank


def unfolded_shape(shape: Iterable[int], groups: int = 1) -> tuple[int, int]:
    """Rows (out, height) and columns (in, width) of each group's low-rank matrix."""
    out, channels, height, width = (*shape, 1, 1)[:4]
    return out // groups * height, channels * width


def low_rank_at(fraction: float, shape: Iterable[int], groups: int) -> int:
    """Rank at a fraction of the break-even rank of each group's matrix, at least 1."""
    rows, columns = unfolded_shape(shape, groups)
    return max(1, round(fraction * math.ceil(rows * columns / (rows + columns))))


# Parameters of a layer's kernel at a rank, and its rank at a fraction of break-even.
_FORMS: dict[str, tuple[Callable[..., int], Callable[..., int]]] = {
    "cp": (
        lambda rank, shape, groups: cp_parameters(shape, rank),
        lambda fraction, shape, groups: resolve_rank(fraction, shape),
    ),
    "low_rank": (
        lambda rank, shape, groups: groups * rank * sum(unfolded_shape(shape, groups)),
        low_rank_at,
    ),
}


@dataclass(eq=False)
class NestedRank:
    """A training hook: make the first components of every CP layer work alone.

    Every second step trains the whole network. In every other one each CP layer uses
    only its first components, their number drawn anew for every layer and step.
    The later a component comes, the less often it is trained, always with those before
    it. So components order themselves by importance, and ``truncate`` with
    ``key="nested"``, which keeps the first ones, costs little.

    Attributes:
        smallest: Smallest share of a layer's components in a shortened step, in (0, 1].
        seed: Seed of the draws, which depend on it and the number of the step only.

    Source: ordered prefixes as in nested dropout (Rippel et al. 2014, arXiv:1402.0915);
    for CP components our own construction.

    >>> from cpnb import CPLinear, fit
    >>> net, data = CPLinear(20, 4), (torch.randn(64, 20), torch.arange(64) % 4)
    >>> fit(net, data, epochs=2, hooks=[NestedRank()], progress=False).status
    'finished'
    """

    smallest: float = 0.3
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.smallest <= 1:
            raise ValueError(f"smallest is {self.smallest}, expected one in (0, 1].")

    def start(self, model: nn.Module, optimizer: Any) -> None:
        """Refuse a network without CP layers."""
        if not cp_layers(model):
            raise ValueError(
                f"model is a {type(model).__name__} without CP layers, whose ranks "
                "NestedRank could shorten. Call cpnb.canonicalize first."
            )

    def before_forward(self, model: nn.Module, step: int) -> None:
        """Choose how many components each layer uses in this step."""
        self.stop(model)
        if step % 2 == 0:
            return
        layers = cp_layers(model).values()
        generator = torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + step) % 2**63)
        shares = torch.rand(len(layers), generator=generator).tolist()
        for layer, share in zip(layers, shares, strict=True):
            least = math.ceil(self.smallest * layer.rank)
            layer.active_rank = least + int(share * (layer.rank - least + 1))

    def after_step(self, model: nn.Module, optimizer: Any, step: int) -> None:
        """Do as `stop`."""
        self.stop(model)

    def stop(self, model: nn.Module) -> None:
        """Give every layer its full rank back."""
        for layer in cp_layers(model).values():
            layer.active_rank = None
