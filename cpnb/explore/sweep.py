"""Accuracy at every rank: truncations of one network, measured together, as a table."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from cpnb.convert import cp_layers
from cpnb.explore.fan_out import Meter, Ranks
from cpnb.explore.report import count_flops
from cpnb.layers import CPLayer
from cpnb.train.evaluation import every_layer, images_and_labels
from cpnb.train.records import write_text
from cpnb.truncation import KEYS, RankedLayer, kept_rank, ranked_layers

__all__ = ["GLOBAL", "RankSweep", "SweptLayer", "rank_sweep"]

GLOBAL = "*"
"""Stands in the place of a layer name for all CP layers, cut to one fraction."""

FORMAT = "cpnb rank sweep 3"
# A layer is swept at every rank up to ALL_RANKS, above that at about GRID of them.
ALL_RANKS, GRID = 128, 64


@dataclass(frozen=True)
class SweptLayer:
    """What a sweep remembers of one CP layer; FLOPs are for one image, as a chain."""

    rank: int
    break_even_rank: int
    kernel_norm: float
    dense_parameters: int
    fixed_parameters: int
    component_parameters: int
    component_flops: int


@dataclass(repr=False)
class RankSweep:
    """What `rank_sweep` measured; ranks that were not measured are gaps.

    Attributes:
        network, data: Class name of the network; name of the data set, if it has one.
        images: Number of images that were classified.
        key, refit: What ordered the components and λ after a cut, see `cpnb.truncate`.
        weights: Hash of the network's weights, see `check_model`.
        layers: The CP layers by name.
        other_parameters, other_flops: Those outside the CP layers, for one image.
        table: One row for each axis and place on it: ``axis`` (a layer name, or ``"*"``
            for all), ``keep`` (share of the components), ``rank`` and
            ``break_even_rank`` (for ``"*"`` sums over the layers), ``rank_NAME`` of
            every layer, ``accuracy``, ``right`` answers, ``relative_error`` (of the
            layer's kernel; for ``"*"`` of all together), and the network's
            ``parameters`` and ``flops`` (for one image, CP layers run as chains).
        methods: By axis ``"together"``, or ``"one by one"`` and why.
        status: ``"finished"`` or ``"interrupted"``.
    """

    network: str
    data: str | None
    images: int
    key: str
    refit: bool | str
    weights: str
    layers: dict[str, SweptLayer]
    other_parameters: int
    other_flops: int
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    methods: dict[str, str] = field(default_factory=dict)
    status: str = "finished"

    @property
    def ranks(self) -> Ranks:
        """Components of every CP layer of the whole network."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def dense_parameters(self) -> int:
        """Parameters of the network with dense layers."""
        inside = sum(layer.dense_parameters for layer in self.layers.values())
        return self.other_parameters + inside

    def ranks_at(self, keep: float) -> Ranks:
        """Components of every layer when each keeps a fraction of them."""
        return {name: kept_rank(rank, keep) for name, rank in self.ranks.items()}

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Parameters of the network at ``ranks``; layers left out are whole."""
        full = self._full(ranks)
        return self.other_parameters + sum(
            layer.fixed_parameters + full[name] * layer.component_parameters
            for name, layer in self.layers.items()
        )

    def flops(self, ranks: Mapping[str, int]) -> int:
        """FLOPs of the network at ``ranks`` for one image, CP layers run as chains."""
        full = self._full(ranks)
        each = (full[name] * x.component_flops for name, x in self.layers.items())
        return self.other_flops + sum(each)

    def accuracy(self, ranks: Mapping[str, int] | None = None) -> float | None:
        """Accuracy at ``ranks``, None if not measured; layers left out are whole."""
        rows: Any = self.table
        for name, rank in self._full(ranks or {}).items():
            rows = rows[rows[f"rank_{name}"] == rank]
        return float(rows["accuracy"].iloc[0]) if len(rows) else None

    def curve(self, axis: str) -> pd.DataFrame:
        """Rows of the table along one axis, ascending up to the whole network."""
        return self.table.loc[self.table["axis"] == axis].reset_index(drop=True)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a network other than the one that was measured."""
        if weights_hash(model) != self.weights:
            raise ValueError(
                f"sweep was made for a {self.network} with the CP ranks {self.ranks}, "
                f"but the {type(model).__name__} given has other weights. Sweep this "
                "network with rank_sweep(model, data)."
            )

    def save(self, path: str | Path) -> None:
        """Write a small JSON file."""
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        table = self.table.to_dict("list")
        content = {"format": FORMAT, **vars(self), "layers": layers, "table": table}
        write_text(path, json.dumps(content))

    @classmethod
    def load(cls, path: str | Path) -> RankSweep:
        """Read what `save` wrote."""
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(
                f"{path} is not a {FORMAT!r}, expected a file written by "
                "RankSweep.save. Make it again with rank_sweep(model, data).save(path)."
            )
        content["table"] = pd.DataFrame(content["table"])
        layers = content.pop("layers").items()
        return cls(**content, layers={name: SweptLayer(**x) for name, x in layers})

    def to_html(self, path: str | Path | None = None) -> str:
        """The table as a page with sliders, which needs no kernel; also written."""
        from cpnb.explore.page import sweep_page

        page = sweep_page(self, KEYS)
        if path is not None:
            write_text(path, page)
        return page

    def __repr__(self) -> str:
        """Points, layers, key and images; then what was not measured together."""
        ranks = ", ".join(f"{name or 'layer'} {r}" for name, r in self.ranks.items())
        lines = [
            f"RankSweep({len(self.table)} points of {ranks}; key={self.key!r}, "
            f"refit={self.refit!r}, images={self.images}, {self.status})"
        ]
        slow = {axis: how for axis, how in self.methods.items() if how != "together"}
        return "\n".join([*lines, *(f"  {axis}: {how}" for axis, how in slow.items())])

    def _full(self, ranks: Mapping[str, int]) -> Ranks:
        for name, rank in ranks.items():
            if name not in self.layers or not 1 <= rank <= self.layers[name].rank:
                raise ValueError(
                    f"ranks has {name!r}: {rank}, expected ranks from 1 up to those of "
                    f"the network, {self.ranks}."
                )
        return {**self.ranks, **ranks}


def rank_sweep(
    model: nn.Module,
    data: Any,
    *,
    ranks: Mapping[str, Iterable[float] | None] | None = None,
    key: str = "lam",
    refit: bool | str = False,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> RankSweep:
    """Measure the accuracy of a network at many ranks.

    Cuts one CP layer at a time, the others whole, and all of them to one fraction (axis
    ``"*"``). Every number is what `cpnb.truncate` and `cpnb.accuracy` give, but many
    ranks go through the network together: the layer adds component after component to
    its outputs and hands on those at all ranks as one batch. A network that cannot take
    it, because it mixes them with values from before the layer, is evaluated one by
    one, and `RankSweep.methods` says so. Ctrl-C returns what is done by then.

    Args:
        model: The network, or a CP layer alone. It is not changed.
        data: A data set, of which the validation split is classified, or a pair
            ``(images, labels)``.
        ranks: By axis, a layer name or ``"*"``, its ranks, or fractions of the
            components for ``"*"``; None for every rank of a layer of at most 128, about
            64 ranks of a larger one, and every percent. Without a mapping all layers
            and ``"*"``. The whole network is always among them.
        key: As in `cpnb.truncate`, like the rest. Keys on images take those of the
            training split, or of the pair.
        refit: Whether and how to re-solve λ after each cut.
        generator: Of the random key; `RankExplorer` cuts in the order of None.
        progress: Whether to show a progress bar.
    """
    from tqdm import tqdm

    layers = cp_layers(model)
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} without a CP layer, expected at least "
            "one. Convert it first with cpnb.canonicalize(model)."
        )
    ranks = dict.fromkeys((*layers, GLOBAL)) if ranks is None else ranks
    places = {axis: _places(axis, wanted, layers) for axis, wanted in ranks.items()}
    images, labels = images_and_labels(data)
    how = {"key": key, "refit": refit, "data": data, "generator": generator}
    ranked = ranked_layers(model, layers, progress=progress, **how)
    sweep = _unmeasured(model, data, images, ranked, key=key, refit=refit)
    plan = {axis: [_ranks_of(sweep, axis, x) for x in places[axis]] for axis in places}
    meter = Meter(model, ranked, images, labels)
    right = {_point(sweep.ranks): meter.one_by_one(sweep.ranks)}
    distinct = {_point(cut) for cuts in plan.values() for cut in cuts}
    total = len(images) * (len(distinct) - 1)
    unit: Any = {"unit": " images", "unit_scale": True}
    bar = tqdm(total=total, desc="rank sweep", disable=not progress, **unit)
    with bar, every_layer():
        try:
            for axis, cuts in plan.items():
                new = {_point(cut): cut for cut in cuts if _point(cut) not in right}
                if new:
                    sweep.methods[axis] = meter.prepare([*new.values()])
                for cut, count in meter.measure([*new.values()], bar.update):
                    right[_point(cut)] = count
        except KeyboardInterrupt:
            sweep.status = "interrupted"
    sweep.table = pd.DataFrame(
        _row(sweep, ranked, axis, place, right[_point(cut)])
        for axis in plan
        for place, cut in zip(places[axis], plan[axis], strict=True)
        if _point(cut) in right
    )
    return sweep


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        # The bytes are viewed as integers because numpy has no bfloat16.
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def default_ranks(rank: int, break_even_rank: int) -> list[int]:
    """Every rank up to 128; above, about 64, close together where they are small."""
    if rank <= ALL_RANKS:
        return list(range(1, rank + 1))
    half = GRID // 2
    geometric = {round(rank ** (step / half)) for step in range(half + 1)}
    linear = {round(rank * step / half) for step in range(1, half + 1)}
    return sorted(geometric | linear | {min(break_even_rank, rank)})


def _places(
    axis: str, wanted: Iterable[float] | None, layers: Mapping[str, CPLayer]
) -> Sequence[float]:
    """Ascending ranks of a layer, or fractions for ``"*"``; the last is the whole."""
    if axis == GLOBAL:
        percents = [percent / 100 for percent in range(1, 101)]
        return sorted({1.0, *map(float, percents if wanted is None else wanted)})
    if axis not in layers:
        known = [*layers, GLOBAL]
        raise ValueError(f"ranks names layer {axis!r}, expected some of {known}.")
    rank = layers[axis].rank
    if wanted is None:
        return default_ranks(rank, layers[axis].break_even_rank)
    places = sorted({rank, *map(int, wanted)})
    if wrong := [place for place in places if not 1 <= place <= rank]:
        raise ValueError(f"ranks[{axis!r}] holds {wrong}, expected 1 to {rank}.")
    return places


def _ranks_of(sweep: RankSweep, axis: str, place: float) -> Ranks:
    every = axis == GLOBAL
    return sweep.ranks_at(place) if every else {**sweep.ranks, axis: int(place)}


def _point(ranks: Ranks) -> tuple[int, ...]:
    return tuple(ranks.values())


def _unmeasured(
    model: nn.Module,
    data: Any,
    images: Tensor,
    ranked: Mapping[str, RankedLayer],
    **options: Any,
) -> RankSweep:
    """All of a sweep that needs no evaluation."""
    flops = count_flops(model, images[:1], chains=True)
    layers = {}
    for name, found in ranked.items():
        layer = found.layer
        component = layer.parameters_at(2) - layer.parameters_at(1)
        layers[name] = SweptLayer(
            rank=layer.rank,
            break_even_rank=layer.break_even_rank,
            kernel_norm=found.norm,
            dense_parameters=layer.dense_parameters,
            fixed_parameters=layer.parameters_at(1) - component,
            component_parameters=component,
            component_flops=flops[name] // layer.rank,
        )
    inside = {p for found in ranked.values() for p in found.layer.parameters()}
    return RankSweep(
        network=type(model).__name__,
        data=getattr(data, "name", None),
        images=len(images),
        weights=weights_hash(model),
        layers=layers,
        other_parameters=sum(p.numel() for p in model.parameters() if p not in inside),
        other_flops=flops[""] - sum(flops[name] for name in layers),
        **options,
    )


def _row(
    sweep: RankSweep,
    ranked: Mapping[str, RankedLayer],
    axis: str,
    place: float,
    right: int,
) -> dict[str, Any]:
    ranks = _ranks_of(sweep, axis, place)
    cut = {name: sweep.layers[name] for name in ranks if axis in (GLOBAL, name)}
    norms = [layer.kernel_norm for layer in cut.values()]
    lost = [ranked[n].error(ranks[n]) * layer.kernel_norm for n, layer in cut.items()]
    rank = sum(ranks[name] for name in cut)
    return {
        "axis": axis,
        "keep": place if axis == GLOBAL else rank / sweep.layers[axis].rank,
        "rank": rank,
        "break_even_rank": sum(layer.break_even_rank for layer in cut.values()),
        **{f"rank_{name}": count for name, count in ranks.items()},
        "accuracy": right / sweep.images,
        "right": right,
        "relative_error": math.hypot(*lost) / (math.hypot(*norms) or 1.0),
        "parameters": sweep.parameters(ranks),
        "flops": sweep.flops(ranks),
    }
