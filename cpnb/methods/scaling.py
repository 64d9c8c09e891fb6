"""Scaling-based weight normalization: move weights along the symmetry of ReLU.

A positive scale of a layer's outputs passes through everything but layers, which take
it back; what meets in a sum has one in common. Whether that was true is then measured.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from cpnb.convert import cp_layers
from cpnb.cp import relative_error
from cpnb.layers import CPLayer, FactoredLayer

if TYPE_CHECKING:
    import pandas as pd

Values = dict[str, Tensor]

LIMIT = 1e6  # no single sweep scales a unit by more, up or down
FIXED = 0  # the unit of everything that keeps its scale, such as input and output
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, FactoredLayer)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # here a scale ends
_TOLERANCE = 1e-6  # for scores in float64, whose rounding stays far below

# The power of the gradient in each entry of an optimizer's state; none in RMSprop's
# momentum, which adds up steps g/√v.
_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
_POWERS: dict[type[Optimizer], dict[str, int]] = {
    SGD: {"momentum_buffer": 1},
    Adam: _ADAM,
    AdamW: _ADAM,
    RMSprop: {"square_avg": 2, "grad_avg": 1},
}


def rescale_(
    model: nn.Module,
    images: Tensor,
    *,
    mode: str = "unit",
    c: float = 1.0,
    optimizer: Optimizer | None = None,
) -> pd.DataFrame:
    """Rescale a model in place, node by node, without changing what it computes.

    From input to output, the weights W_j and the bias of each hidden unit j before a
    ReLU are multiplied by d_j > 0 and the weights V_j that read it divided by d_j:

    - ``"unit"``, SBWN: ``d_j = c / ‖W_j‖``; the last layer collects what that takes.
    - ``"balanced"``, Equi-normalization: ``d_j = √(‖V_j‖ / (c‖W_j‖))``. Repeated
      with c = 1 it minimises ``Σ‖W‖²``.

    Units that meet in a sum share one scale. A norm takes the place of the layer before
    it: its weight γ_j is the row, β_j the bias. CP layers keep their rank and the norms
    of their columns. Outputs, and rows or columns of zeros, have d = 1.

    Args:
        model: Takes batches, ``(n, features)`` or ``(n, channels, ...)``.
        images: A few inputs, on which a copy has to keep its scores.
        mode: ``"unit"`` or ``"balanced"``.
        c: Norm of the rows; or, balanced, how many times as long the columns are.
        optimizer: SGD, Adam, AdamW or RMSprop of the model, whose state follows.

    Returns:
        Line per row: ``layer``, ``row``, ``norm_before``, ``norm_after``, ``scale``.

    Raises:
        ValueError: If the function would change, as with a sigmoid between two layers.

    Source: Yuan, Xiao 2019, doi:10.1109/ACCESS.2018.2890373 (SBWN; its scales are
    re-derived from the abstract); Stock et al. 2019, arXiv:1902.10416.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> table = rescale_(net, torch.randn(4, 2), c=2.0)
    >>> table.query("layer == '0'").norm_after.round(3).tolist()
    [2.0, 2.0, 2.0]
    """
    import pandas as pd

    rescaling = Rescaling(images, mode, c)
    rescaling.start(model, optimizer)
    rows = [(la.name, n) for la in rescaling.layers for n in range(la.rows.numel())]
    table = pd.DataFrame(rows, columns=["layer", "row"])
    table["norm_before"] = rescaling.row_norms(model).cpu().numpy()
    scales = rescaling.sweep_(model, optimizer)
    table["norm_after"] = rescaling.row_norms(model).cpu().numpy()
    return table.assign(scale=scales.cpu().numpy())


class Layer(NamedTuple):
    """A layer by name, with the units (channels that carry a scale) of its weights."""

    name: str
    rows: Tensor  # units it writes, (groups, out / groups)
    columns: Tensor  # units it reads, (groups, in / groups); a norm's are FIXED

    def squares(self, model: nn.Module) -> Tensor:
        """Squared norms by row and column: ``(groups, out / groups, in / groups)``."""
        weight: Any = model.get_submodule(self.name).weight
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        shape = (*self.rows.shape, self.columns.shape[1], -1)
        return weight.square().reshape(shape).sum(3)


@dataclass(eq=False)
class Rescaling:
    """Training hook: `rescale_` every so many steps, or every ``"epoch"``."""

    images: Tensor = field(repr=False)
    mode: str = "unit"
    c: float = 1.0
    every: int | str = 1

    def start(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Read and check the connections of the model, once for all sweeps."""
        if self.mode not in ("unit", "balanced"):
            raise ValueError(f'mode is {self.mode!r}, expected "unit" or "balanced".')
        if optimizer is not None and type(optimizer) not in _POWERS:
            names = ", ".join(kind.__name__ for kind in _POWERS)
            raise ValueError(
                f"optimizer is {type(optimizer).__name__}, expected one of {names}, "
                "whose state is known to follow. Or rescale before it is built."
            )
        self.layers = _read_layers(model)
        self._rows = torch.cat([layer.rows.flatten() for layer in self.layers])
        self._counts = torch.bincount(self._rows)
        # Units whose scales are chosen together, with their writers and readers.
        self._steps: list[tuple[Tensor, list[Layer], list[Layer]]] = []
        seen = self._rows.new_tensor([FIXED])
        for layer in self.layers:
            new = layer.rows[~torch.isin(layer.rows, seen)].unique()
            seen = torch.cat([seen, new])
            writers = [la for la in self.layers if torch.isin(la.rows, new).any()]
            readers = [la for la in self.layers if torch.isin(la.columns, new).any()]
            self._steps.append((new, writers, readers))
        self._check(model)

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Rescale, if it is time to."""
        if self.every != "epoch" and (step + 1) % int(self.every) == 0:
            self.sweep_(model, optimizer)

    def after_epoch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Rescale, if it is to be once an epoch."""
        if self.every == "epoch":
            self.sweep_(model, optimizer)

    @torch.no_grad()
    def row_norms(self, model: nn.Module) -> Tensor:
        """Norms of the rows of all layers, one after the other."""
        squares = [layer.squares(model).sum(2).flatten() for layer in self.layers]
        return torch.cat(squares).sqrt()

    @torch.no_grad()
    def sweep_(self, model: nn.Module, optimizer: Optimizer | None) -> Tensor:
        """Choose scales from the input to the output, apply them, and say the rows'."""
        squares = {layer.name: layer.squares(model) for layer in self.layers}
        counts = self._counts.to(squares[self.layers[0].name])
        scales = torch.ones_like(counts)
        for units, writers, readers in self._steps:
            rows, columns = torch.zeros_like(scales), torch.zeros_like(scales)
            for name, out, into in writers:
                norms = (squares[name] @ (1 / scales[into].square())[..., None])[..., 0]
                norms = norms * scales[out].square()
                rows.index_add_(0, out.flatten(), norms.flatten())
            for name, out, into in readers:
                norms = (scales[out].square()[:, None] @ squares[name])[:, 0]
                norms = norms / scales[into].square()
                columns.index_add_(0, into.flatten(), norms.flatten())
            if self.mode == "unit":
                chosen = self.c / (rows / counts)[units].sqrt()
            else:
                chosen = (columns / rows)[units].sqrt().div(self.c).sqrt()
            # A zero row or column, or one that is not finite, stays as it is.
            usable = chosen.isfinite() & (chosen > 0)
            scales[units] = torch.where(usable, chosen.clamp(1 / LIMIT, LIMIT), 1)
        _apply_(model, self.layers, scales, optimizer)
        return scales[self._rows]

    @torch.no_grad()
    def _check(self, model: nn.Module) -> None:
        """Raise unless the scores stay, in float64 and with random weights."""
        generator = torch.Generator().manual_seed(0)
        twin = copy.deepcopy(model).double().eval()
        for parameter in twin.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 2
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * math.sqrt(2 / fan))
        for layer in cp_layers(twin).values():  # the units of σ and λ make it tiny
            layer.unit.mul_(math.sqrt(2 * len(layer.weight)) / layer.weight.norm())
        images = self.images[:16].to(next(twin.parameters()))
        scores = twin(images)
        drawn = torch.rand(len(self._counts), generator=generator)
        scales = (4 ** (2 * drawn - 1)).to(images)  # from ¼ to 4

        def keeps_scores(units: Tensor) -> bool:
            chosen = torch.ones_like(scales)
            chosen[units] = scales[units]
            chosen[FIXED] = 1
            scaled = copy.deepcopy(twin)
            _apply_(scaled, self.layers, chosen, None)
            return bool(relative_error(scores, scaled(images)) < _TOLERANCE)

        if not keeps_scores(self._rows):
            names = [la.name for la in self.layers if not keeps_scores(la.rows)]
            raise ValueError(
                f"the scores change when the outputs of {' or '.join(names)} are "
                "scaled, expected between layers only what a positive scale passes "
                "through, such as ReLU, pooling and sums, and layers that are called "
                "once with weights of their own. Leave such a model as it is."
            )


class _Tracer(fx.Tracer):
    """Stops at modules with parameters of their own, CP layers among them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = next(m.parameters(recurse=False), None)
        return own is not None or super().is_leaf_module(m, module_qualified_name)


def _read_layers(model: nn.Module) -> list[Layer]:
    """Layers in the order of the forward, with the units they write and read."""
    parent = [FIXED]

    def root(unit: int) -> int:
        while parent[unit] != unit:
            unit = parent[unit]
        return unit

    def tie(signal: tuple[int, ...], other: tuple[int, ...]) -> None:
        """Give channels that meet one scale; a single channel meets all others."""
        other = other * len(signal) if len(other) == 1 else other
        for a, b in zip(signal, other, strict=False):
            low, high = sorted((root(a), root(b)))
            parent[high] = low

    def fresh(count: int) -> tuple[int, ...]:
        parent.extend(range(len(parent), len(parent) + count))
        return tuple(parent[-count:])

    signals: dict[fx.Node, tuple[int, ...]] = {}  # units of a value's channels
    records: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = []
    for node in _Tracer().trace(model).nodes:
        name = str(node.target)
        module: Any = model.get_submodule(name) if node.op == "call_module" else None
        arriving = [signals[source] for source in node.all_input_nodes]
        signal = max(arriving, key=len, default=(FIXED,))
        if isinstance(module, _WEIGHTED):
            if any(map(is_parametrized, module.modules())):
                raise ValueError(
                    f"layer {name!r} is normalised, its weight computed anew in every "
                    "forward. Call cpnb.methods.remove_normalizer first."
                )
            if getattr(module, "transposed", False):
                raise ValueError(
                    f"layer {name!r} is transposed, expected layers whose kernels have "
                    "a row for each output."
                )
            weight: Any = module.weight
            out, size = weight.shape[:2]
            groups: Any = getattr(module, "groups", 1)
            pixels, rest = divmod(size * groups, len(signal))
            if rest or not pixels:  # not what these channels become when flattened
                tie(signal, (FIXED,))
                signal, pixels = (FIXED,), size * groups
            read = tuple(unit for unit in signal for _ in range(pixels))
            if isinstance(module, CPLayer) and size > 1:
                for group in range(groups):  # they share the factor of the inputs
                    tie(read[:size], read[group * size : (group + 1) * size])
            signal = fresh(out)
            records.append((name, signal, read, groups))
        elif isinstance(module, _NORMS):
            tie(signal, (FIXED,))
            if module.weight is not None:
                signal = fresh(len(module.weight))
                records.append((name, signal, (FIXED,) * len(signal), len(signal)))
        else:
            for other in arriving:
                tie(signal, other)
        if node.op == "output":
            tie(signal, (FIXED,))
        signals[node] = signal
    roots = torch.tensor([root(unit) for unit in range(len(parent))])
    roots = roots.to(next(model.parameters()).device)
    return [
        Layer(name, *(roots[[*units]].view(groups, -1) for units in (written, read)))
        for name, written, read, groups in records
    ]


def _apply_(
    model: nn.Module, layers: list[Layer], scales: Tensor, optimizer: Optimizer | None
) -> None:
    """Multiply rows by their units' scales, divide columns; take the state along."""
    for name, out, into in layers:
        layer = model.get_submodule(name)
        rows, columns = scales[out], scales[into]
        parameters = dict(layer.named_parameters())
        old = {name: parameter.detach() for name, parameter in parameters.items()}
        factors = _factors(layer, old, rows, columns)
        new = _scaled(layer, old, rows, columns)
        undo = partial(_scaled, layer, rows=1 / rows, columns=1 / columns)
        memory = optimizer.state if optimizer else {}
        for entry, power in _POWERS[type(optimizer)].items() if optimizer else ():
            state = {n: memory[p].get(entry) for n, p in parameters.items()}
            held = {n: moment for n, moment in state.items() if moment is not None}
            moments = {n: m / factors[n].square() for n, m in held.items()}
            if power == 1 and held:  # as gradients, by the chain rule from old to new
                zeros = {n: torch.zeros_like(value) for n, value in new.items()}
                (moments,) = torch.func.vjp(undo, new)[1](zeros | held)
            for n, moment in held.items():
                moment.copy_(moments[n])
        for name, parameter in parameters.items():
            parameter.copy_(new[name])


def _scaled(layer: Any, values: Values, rows: Tensor, columns: Tensor) -> Values:
    factors = _factors(layer, values, rows, columns)
    return {name: value * factors[name] for name, value in values.items()}


def _factors(layer: Any, values: Values, rows: Tensor, columns: Tensor) -> Values:
    """What to multiply parameters by that rows are multiplied and columns divided."""
    factors = dict.fromkeys(values, rows.new_ones(())) | {"bias": rows.flatten()}
    if isinstance(layer, CPLayer):
        scales = [rows.flatten(), 1 / columns[0]]
        if layer.kernel_shape[1] == 1:  # each row has one column, without a factor
            scales = [(rows / columns).flatten()]
        if layer.kernel_shape[0] == 1:  # no factor of the outputs
            factors["scale"] = scales.pop(0)[0]
        for n, scale in enumerate(scales):
            square = values[f"factors.{n}"] ** 2
            before = square.sum(0)
            after = scale.square() @ square
            growth = torch.where(before > 0, after / before, 1).sqrt()
            factors["lam"] = factors["lam"] * growth  # the columns keep their norms
            factors[f"factors.{n}"] = scale[:, None] / growth
    elif isinstance(layer, FactoredLayer):  # U Vᵀ
        for name, scale in (("left", rows), ("right", 1 / columns)):
            window = len(values[name]) // scale.numel()
            factors[name] = scale.flatten().repeat_interleave(window)[:, None]
    else:
        factor = (rows[:, :, None] / columns[:, None]).flatten(0, 1)
        shape = (*factor.shape, 1, 1, 1)[: values["weight"].ndim]
        factors["weight"] = factor.reshape(shape)
    return factors
