"""Truncation: which components matter, λ of those that stay, and the cut itself.

`truncate` reads top to bottom: the ranks that are wanted, the order of the components
by a key, a refit of λ if asked for, the cut. `KEYS` is the table of orders.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cpnb.convert import Ranks, cp_layers, lost_state, replace_layers
from cpnb.cp import component_gram, resolve_rank
from cpnb.layers import CPConv, CPLayer, evaluation_mode, pad_factors

__all__ = ["KEYS", "kept_rank", "select_components", "truncate"]

IMAGES = 1000  # training images of a data set that are looked at
_BATCH = 50


def truncate(
    model: nn.Module,
    *,
    rank: Ranks | None = None,
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
        rank: Components to keep, said in any way that `cpnb.canonicalize` takes, for
            every layer (one that holds fewer keeps what it has), or a mapping from
            layer names (others stay whole), as `cpnb.methods.ranks_for` makes. A
            function such as ``fit_rank(0.1)`` says what a fresh fit would need.
        keep: Instead of ``rank``, the fraction of each layer's present components, in
            (0, 1]; ``⌊fraction · rank⌋``, at least one.
        key: What orders the components: a name in `KEYS`.
        refit: Re-solve λ for the components that stay by least squares: True or
            ``"weight"`` on the kernel, ``"data"`` on the outputs of the layer for the
            inputs that it has in the network.
        data: Images for what looks at them: a data set, of which 1,000 training images
            are used, or a split or a pair ``(images, labels)``, used whole.
        generator: Of the random key; None draws the same order every time.
        progress: Whether to show a bar when images take more than two seconds.

    Returns:
        A truncated copy; the source is not touched.

    Raises:
        TypeError: If there is no data for what looks at it, or a layer cannot be cut.
        ValueError: If a rank or a name is wrong, or λ is not finite.

    Source: Veeramacheneni et al. 2022, arXiv:2206.01509, whose code sorts by signed λ.

    >>> from cpnb import CPLinear
    >>> truncate(CPLinear(20, 10, rank=6), keep=0.5)
    CPLinear(20, 10, rank=3 (0.43 of break-even 7))
    """
    ranks = wanted_ranks(model, rank=rank, keep=keep)
    looking = {"data": data, "generator": generator, "progress": progress}
    ranked = ranked_layers(model, ranks, key=key, refit=refit, **looking)
    cut = {name: ranked[name].cut(count) for name, count in ranks.items()}
    return replace_layers(model, cut)


def wanted_ranks(
    model: nn.Module, *, rank: Ranks | None = None, keep: float | None = None
) -> dict[str, int]:
    """Components that `truncate` would keep, by layer, for the same arguments."""
    layers = cp_layers(model)
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} without CP layers. Call "
            "cpnb.canonicalize first."
        )
    if (rank is None) == (keep is None):
        raise ValueError(f"rank is {rank} and keep is {keep}, expected exactly one.")
    if keep is not None:
        return {name: kept_rank(layer.rank, keep) for name, layer in layers.items()}
    wanted: Any = rank if isinstance(rank, Mapping) else dict.fromkeys(layers, rank)
    unknown = [name for name in wanted if name not in layers]
    if unknown:
        raise ValueError(f"rank names {unknown}, expected some of {list(layers)}.")
    ranks = {}
    for name, one in wanted.items():
        layer = layers[name]
        ranks[name] = resolve_rank(one, layer.kernel_shape, layer.weight.detach())
        if ranks[name] > layer.rank and (wanted is rank or name == ""):
            raise ValueError(
                f"rank is {ranks[name]} for layer {name!r}, expected at most the "
                f"{layer.rank} components it holds."
            )
        ranks[name] = min(ranks[name], layer.rank)
    return ranks


def kept_rank(rank: int, keep: float) -> int:
    """Components that stay when a fraction is kept: ``⌊rank · keep⌋``, at least one.

    >>> kept_rank(10, 0.25), kept_rank(10, 0.7), kept_rank(10, 0.01)
    (2, 7, 1)
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}, expected a fraction in (0, 1].")
    return max(1, int(rank * keep + 1e-9))  # 0.7 · 10 is below 7 in floating point


def select_components(layer: CPLayer, index: Tensor | Sequence[int]) -> CPLayer:
    """Copy a CP layer with the components of an index only, in their present order."""
    return _keep(layer, torch.as_tensor(index, device=layer.lam.device).unique())


class RankedLayer:
    """A CP layer with its components in order: what is left of it at every rank.

    Attributes:
        layer: The layer; it stays as it is.
        order: Its components, the most important first. Shape ``(rank,)``.
        norm: Frobenius norm of its kernel.
        refit: Whether λ changes with the rank, for the least error, see `_refit`.
        factors: Unit factors in order, one per mode, also of size 1, in the dtype of
            the layer. Shapes ``(size_n, rank)``.
    """

    def __init__(
        self, layer: CPLayer, order: Tensor, gram: Tensor | None = None
    ) -> None:
        lam, units = _finite_components(layer)
        ordered = [unit[:, order].to(layer.lam.dtype) for unit in units]
        self.layer = layer
        self.order = order
        self.refit = gram is not None
        self.factors = pad_factors(layer.lam.detach(), ordered, layer.kernel_shape)
        self._lam = lam[order]
        self._overlap = _unit_gram(lam, units)[order][:, order]
        self._gram = None if gram is None else gram[order][:, order]
        self._refitted: dict[int, Tensor] = {}
        self.norm = self._size(self._lam)

    def lam(self, rank: int) -> Tensor:
        """λ of the first ``rank`` components with σ folded in, float64."""
        if self._gram is None or rank == len(self._lam):
            return self._lam[:rank]
        if rank not in self._refitted:
            index = torch.arange(rank, device=self._lam.device)
            self._refitted[rank] = _refit(self._lam, self._gram, index)
        return self._refitted[rank]

    def error(self, rank: int) -> float:
        """Relative error of the kernel at ``rank``, ``‖W-Ŵ‖/‖W‖``."""
        missing = self._lam.clone()
        missing[:rank] -= self.lam(rank)
        if not missing.any():
            return 0.0
        return self._size(missing) / self.norm if self.norm else math.inf

    def cut(self, rank: int) -> CPLayer:
        """A copy with the first ``rank`` components, in the order of the layer."""
        index, places = self.order[:rank].sort()
        lam = self.lam(rank)[places] if self.refit and rank < len(self._lam) else None
        return _keep(self.layer, index, lam)

    def _size(self, lam: Tensor) -> float:
        return (lam @ self._overlap @ lam).clamp_min(0).sqrt().item()


def ranked_layers(
    model: nn.Module,
    names: Iterable[str],
    *,
    key: str = "lam",
    refit: bool | str = False,
    data: Any = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> dict[str, RankedLayer]:
    """Some CP layers of a network, ready to be cut; arguments as in `truncate`."""
    layers = {name: cp_layers(model)[name] for name in names}
    for name, layer in layers.items():
        reason = lost_state(layer)
        if reason:
            raise TypeError(f"layer {name!r} is a {type(layer).__name__}: {reason}.")
    if key not in KEYS:
        raise ValueError(f"key is {key!r}, expected one of {tuple(KEYS)}.")
    if refit not in REFITS:
        raise ValueError(f"refit is {refit!r}, expected one of {REFITS}.")
    if data is None and (KEYS[key].needs_data or refit == "data"):
        raise TypeError(
            f"data is None, expected images for key {key!r} and refit {refit!r}: a "
            "data set, or a pair (images, labels) of tensors. Pass data=..."
        )
    look = _Look(model, layers, data, generator, progress)
    scores = KEYS[key].scores(look)
    orders = {n: s.argsort(descending=True, stable=True) for n, s in scores.items()}
    grams: Mapping[str, Tensor | None] = dict.fromkeys(layers)
    if refit == "data":
        grams = _output_grams(look)
    elif refit:
        grams = {n: _unit_gram(*_finite_components(one)) for n, one in layers.items()}
    return {n: RankedLayer(one, orders[n], grams[n]) for n, one in layers.items()}


@dataclass(frozen=True)
class _Look:
    """A network, some of its layers, and the images that a key looks at."""

    model: nn.Module
    layers: Mapping[str, CPLayer]
    data: Any
    generator: torch.Generator | None
    progress: bool

    def batches(self, what: str) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Images and labels where the network is, in parts, and how many in all."""
        from tqdm import tqdm

        split = getattr(self.data, "train", self.data)
        parts = () if isinstance(split, Tensor) else tuple(split)
        if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(
                f"data is a {type(self.data).__name__}, expected a data set, one of "
                "its splits, or a pair (images, labels) of tensors."
            )
        images, labels = parts
        if hasattr(split, "standardized"):
            images = split.standardized()
        if split is not self.data and len(labels) > IMAGES:
            places = torch.arange(IMAGES) * len(labels) // IMAGES  # they may be sorted
            images = images[places]
            labels = labels[places]
        like = next(self.model.parameters())
        pairs = list(zip(images.split(_BATCH), labels.split(_BATCH), strict=True))
        title = f"looking at data for {what}"
        for some, classes in tqdm(pairs, title, disable=not self.progress, delay=2):
            some = some.to(like if some.is_floating_point() else like.device)
            yield some, classes.to(like.device, torch.long), len(labels)


def _by_size(look: _Look) -> dict[str, Tensor]:
    return {n: _finite_components(one)[0].abs() for n, one in look.layers.items()}


def _by_removal(look: _Look) -> dict[str, Tensor]:
    scores = {}
    for name, layer in look.layers.items():
        lam, units = _finite_components(layer)
        # M[r,s] = ⟨component r, component s⟩: removing a set costs its sum of M.
        overlap = lam[:, None] * _unit_gram(lam, units) * lam
        cost = overlap.diagonal().clone()
        scores[name] = torch.zeros_like(cost)
        for step in range(len(lam)):
            worst = cost.argmin()
            scores[name][worst] = step
            cost += 2 * overlap[worst]
            cost[worst] = torch.inf
    return scores


def _by_position(look: _Look) -> dict[str, Tensor]:
    return {name: -torch.arange(layer.rank) for name, layer in look.layers.items()}


def _by_draw(look: _Look) -> dict[str, Tensor]:
    source, seed = look.generator, 0
    if source is not None:
        seed = int(torch.randint(2**62, (), generator=source, device=source.device))
    # Seeded anew for each layer, so that the order of one does not depend on which
    # others are cut.
    scores = {}
    for name, layer in look.layers.items():
        draw = torch.Generator().manual_seed(seed)
        scores[name] = -torch.randperm(layer.rank, generator=draw).argsort()
    return scores


def _by_gradient(look: _Look) -> dict[str, Tensor]:
    lams = {
        f"{name}.lam".lstrip("."): layer.lam.detach().requires_grad_()
        for name, layer in look.layers.items()
    }
    slopes = {name: torch.zeros_like(lam) for name, lam in lams.items()}
    with evaluation_mode(look.model), torch.enable_grad():
        for images, labels, count in look.batches("gradients"):
            scores = functional_call(look.model, lams, (images,))
            loss = F.cross_entropy(scores, labels, reduction="sum") / count
            parts = torch.autograd.grad(
                loss, list(lams.values()), allow_unused=True, materialize_grads=True
            )
            for slope, part in zip(slopes.values(), parts, strict=True):
                slope += part
    changes = [(lams[name].detach() * slopes[name]).abs() for name in lams]
    return dict(zip(look.layers, changes, strict=True))


def _by_activation(look: _Look) -> dict[str, Tensor]:
    return {
        name: _finite_components(look.layers[name])[0].square() * gram.diagonal()
        for name, gram in _output_grams(look).items()
    }


@torch.no_grad()
def _output_grams(look: _Look) -> dict[str, Tensor]:
    """G of each layer, for which ``dᵀGd`` is the mean squared change of its outputs.

    d is a change of λ with σ folded in; the mean is over the images. Shapes ``(rank,
    rank)``, float64; zero for a layer that is not used.
    """
    grams = {n: one.lam.new_zeros(()).double() for n, one in look.layers.items()}
    seen = 0

    def add(name: str, layer: Any, args: tuple, kwargs: dict) -> None:
        inputs = (*args, *kwargs.values())[0]
        lam, units = layer.components()
        padded = pad_factors(lam, units, layer.kernel_shape)
        outputs, others = layer.by_role(padded)
        if isinstance(layer, CPConv):
            hidden = layer.branches(inputs, others).flatten(3)  # (n, groups, rank, hw)
        else:
            hidden = (inputs.flatten(0, -2) @ others[0]).T[None, None]
        rows = hidden.permute(1, 2, 0, 3).flatten(2).double()
        mix = outputs.unflatten(0, (layer.groups, -1)).double()
        grams[name] = grams[name] + ((rows @ rows.mT) * (mix.mT @ mix)).sum(0)

    with evaluation_mode(look.model), ExitStack() as hooks:
        for name, layer in look.layers.items():
            hook = functools.partial(add, name)
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        for images, *_ in look.batches("outputs"):
            look.model(images)
            seen += len(images)
    return {n: g.expand(2 * (look.layers[n].rank,)) / seen for n, g in grams.items()}


class Key(NamedTuple):
    """One way to order components: a label, a number for each, whether it needs data.

    ``scores`` takes a `_Look` and gives a tensor by layer; what has most, stays.
    """

    label: str
    scores: Callable[[_Look], dict[str, Tensor]]
    needs_data: bool = False


# "lam" is the paper's (arXiv:2206.01509), "gradient" is λ·∂loss/∂λ (Molchanov et al.
# 2017, arXiv:1611.06440), "nested" for training with `cpnb.NestedRank`. The others, and
# their use for components, are our own.
KEYS: dict[str, Key] = {
    "lam": Key("the largest |λ|", _by_size),
    "greedy": Key("the least change of the kernel, one by one", _by_removal),
    "nested": Key("the first ones", _by_position),
    "gradient": Key("the largest change of the loss, first order", _by_gradient, True),
    "activation": Key("what adds most to the outputs", _by_activation, True),
    "random": Key("drawn, as a control", _by_draw),
}
REFITS = (False, True, "weight", "data")


def _finite_components(layer: CPLayer) -> tuple[Tensor, list[Tensor]]:
    """λ with σ folded in and unit factors, in float64, without gradients."""
    with torch.no_grad():
        lam, units = layer.components(torch.float64)
    if not all(t.isfinite().all() for t in (lam, *units)):
        raise ValueError(
            f"the {type(layer).__name__} has NaN or infinite parameters, expected "
            "finite ones. Go back to a checkpoint from before training diverged."
        )
    return lam, units


def _unit_gram(lam: Tensor, units: Sequence[Tensor]) -> Tensor:
    """Inner products Γ between unit components. Shape ``(rank, rank)``."""
    if not units:  # every mode of size 1: each component is the number λ_r
        return lam.new_ones(len(lam), len(lam))
    return component_gram(units)


def _refit(lam: Tensor, gram: Tensor, index: Tensor) -> Tensor:
    """λ' of the kept components with the least error against all of them.

    Minimises ``dᵀ gram d``, where d is λ − λ' on them and λ on the others: with Γ the
    squared error of the kernel, with `_output_grams` that of the layer's outputs.
    """
    dropped = torch.ones_like(lam, dtype=torch.bool)
    dropped[index] = False
    inverse = torch.linalg.pinv(gram[index][:, index], hermitian=True)
    moved = inverse @ (gram[index] @ (lam * dropped))
    error = lam * dropped
    before = error @ gram @ error
    error[index] = -moved
    # Where the kept components are all but dependent, rounding may make it worse.
    return lam[index] + moved * (error @ gram @ error <= before)


@torch.no_grad()
def _keep(layer: CPLayer, index: Tensor, lam: Tensor | None = None) -> CPLayer:
    """Copy a layer with some of its components, as they are or with other σλ."""
    cut = copy.deepcopy(layer)
    cut.resize(len(index))
    present, units = layer.components(torch.float64)
    cut.store(present[index] if lam is None else lam, [u[:, index] for u in units])
    return cut
