"""Rules that share out a whole model's parameters or FLOPs over its layers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cpnb.evaluation import evaluation_mode
from cpnb.probing import received
from cpnb.ranks import ModelRule, cp_parameters, resolve_rank
from cpnb.surgery import from_layer


@dataclass(frozen=True)
class ParameterRatio(ModelRule):
    """Ranks with which a model holds at most a share of its parameters.

    Every layer gets the same fraction of its break-even rank, the largest in (0, 1]
    that stays within the budget (rounded, at least one component). All parameters of
    the model count, also those of layers that are left alone.

    Attributes:
        ratio: Share of the given model's parameters, in (0, 1].

    Raises:
        ValueError: If ``ratio`` is out of range.

    >>> from cpnb import canonicalize
    >>> net = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> small = canonicalize(net, rank=ParameterRatio(0.5))
    >>> [layer.rank for layer in (small[0], small[2])]
    [25, 64]
    >>> [sum(p.numel() for p in model.parameters()) for model in (net, small)]
    [11584, 5785]
    """

    ratio: float

    def __post_init__(self) -> None:
        """Check the range."""
        _check_ratio(self.ratio)

    def counts(self, model: nn.Module, names: Iterable[str]) -> dict[str, int]:
        """Ranks within the budget; see `ModelRule`."""
        return self.share(model, names, held=_cp_held, rank_at=_cp_rank)

    def share(
        self,
        model: nn.Module,
        names: Iterable[str],
        *,
        held: Callable[[nn.Module, int], int],
        rank_at: Callable[[nn.Module, float], int],
    ) -> dict[str, int]:
        """Ranks within the budget, for any way to factorize a layer.

        Args:
            model: As in `counts`.
            names: As in `counts`.
            held: Parameters, without the bias, that a layer has at a rank.
            rank_at: A layer's rank at a fraction of its break-even rank.

        Returns:
            A rank by name.

        Raises:
            ValueError: If the budget is too small even for rank 1 in each layer.
        """
        layers = {name: model.get_submodule(name) for name in names}
        total = sum(parameter.numel() for parameter in model.parameters())
        kept = total - sum(layer.weight.numel() for layer in layers.values())

        def spent(ranks: Mapping[str, int]) -> int:
            return kept + sum(held(layers[name], rank) for name, rank in ranks.items())

        return _share_out(self, layers, spent, total, "parameters", rank_at)


@dataclass(frozen=True)
class FlopRatio(ModelRule):
    """Ranks with which a model takes at most a share of its FLOPs.

    As `ParameterRatio`, with the FLOPs of one inference, CP layers run as chains
    (``forward_mode="chain"``), as `torch.utils.flop_counter` counts them.

    Attributes:
        ratio: Share of the given model's FLOPs, in (0, 1].
        input_shape: Shape of the input, batch axis included.

    Raises:
        ValueError: If ``ratio`` is out of range.

    >>> from cpnb import canonicalize
    >>> net = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> small = canonicalize(net, rank=FlopRatio(0.5, (1, 8, 16, 16)))
    >>> [layer.rank for layer in (small[0], small[2])]
    [21, 55]
    """

    ratio: float
    input_shape: Sequence[int]

    def __post_init__(self) -> None:
        """Check the range."""
        _check_ratio(self.ratio)

    def counts(self, model: nn.Module, names: Iterable[str]) -> dict[str, int]:
        """Ranks within the budget; see `ModelRule`. Runs the model in eval mode."""
        layers = {name: model.get_submodule(name) for name in names}
        total, shapes = _run(model, layers, self.input_shape)
        kept, slope = total, dict.fromkeys(layers, 0)
        for name, layer in layers.items():
            # A chain's FLOPs are proportional to its rank.
            fixed = torch.Generator(layer.weight.device).manual_seed(0)
            twin = from_layer(layer, rank=1, init="unified", generator=fixed)
            twin.forward_mode = "chain"
            for shape in shapes[name]:
                images = layer.weight.new_zeros(shape)
                kept -= _flops(layer, images)
                slope[name] += _flops(twin, images)

        def spent(ranks: Mapping[str, int]) -> int:
            return kept + sum(slope[name] * rank for name, rank in ranks.items())

        return _share_out(self, layers, spent, total, "FLOPs", _cp_rank)


def _cp_held(layer: nn.Module, rank: int) -> int:
    return cp_parameters(layer.weight.shape, rank)


def _cp_rank(layer: nn.Module, fraction: float) -> int:
    return resolve_rank(fraction, layer.weight.shape)


def _share_out(
    rule: ParameterRatio | FlopRatio,
    layers: Mapping[str, nn.Module],
    spent: Callable[[Mapping[str, int]], int],
    total: int,
    unit: str,
    rank_at: Callable[[nn.Module, float], int],
) -> dict[str, int]:
    """Ranks at the largest common fraction of break-even that stays within budget."""
    budget = rule.ratio * total

    def ranks_at(fraction: float) -> dict[str, int]:
        return {name: rank_at(layer, fraction) for name, layer in layers.items()}

    least = spent(dict.fromkeys(layers, 1))
    if least > budget:
        raise ValueError(
            f"rank is {rule}, a budget of {budget:,.0f} of {total:,} {unit}, but rank "
            f"1 in each of {len(layers)} layers takes {least:,} with all that stays. "
            f"Expected a ratio of at least {least / total:.4f}."
        )
    if spent(ranks_at(1.0)) <= budget:
        return ranks_at(1.0)
    within, beyond = 0.0, 1.0
    while (middle := (within + beyond) / 2) not in (within, beyond):
        if spent(ranks_at(middle)) <= budget:
            within = middle
        else:
            beyond = middle
    return ranks_at(within) if within else dict.fromkeys(layers, 1)


def _run(
    model: nn.Module, layers: Mapping[str, nn.Module], shape: Sequence[int]
) -> tuple[int, dict[str, list[tuple[int, ...]]]]:
    """FLOPs of one inference, and the input shapes each layer met in it."""
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in layers}

    def note(name: str) -> Callable[..., None]:
        return lambda _, *given: shapes[name].append(tuple(received(*given).shape))

    handles = [
        layer.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        images = next(iter(layers.values())).weight.new_zeros(tuple(shape))
        with evaluation_mode(model):
            return _flops(model, images), shapes
    except RuntimeError as error:
        raise ValueError(
            f"input_shape is {tuple(shape)}, which the model does not take: {error} "
            "Expected the shape of one batch, batch axis included."
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _flops(module: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images)
    return counter.get_total_flops()


def _check_ratio(ratio: float) -> None:
    if isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ValueError(f"ratio is {ratio}, expected a share in (0, 1].")
