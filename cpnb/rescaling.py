"""Rescaling: move weights along the symmetry that leaves the function as it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from cpnb._checks import check_count, check_module, check_positive
from cpnb._rescaling.plan import Plan
from cpnb._rescaling.state import check_optimizer
from cpnb._tables import html_table, text_table
from cpnb.hooks import Hook

MODES = ("unit", "balanced")


@dataclass(frozen=True, repr=False)
class RescalingReport:
    """What `rescale_` did to each layer, by name.

    A norm such as batch norm counts as a layer whose rows have one weight each.

    Attributes:
        scales: What each row was multiplied by. Shapes ``(out,)``.
        before: Norms of the rows before. Shapes ``(out,)``.
        after: The same, after.
        train_error: 0, or with ``before_norm`` the largest relative change of a batch
            norm's output in training, to first order in its ``eps``, if the batch has
            the running variance.
    """

    scales: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    train_error: float = 0.0

    def __repr__(self) -> str:
        """A table in plain text."""
        return text_table(self._cells())

    def _repr_html_(self) -> str:
        return html_table(self._cells())

    def _cells(self) -> list[list[str]]:
        table = [["layer", "row norms before", "after", "scales"]]
        for name in self.scales:
            columns = self.before[name], self.after[name], self.scales[name]
            table.append([name, *map(_range, columns)])
        return table


def rescale_(
    model: nn.Module,
    *,
    mode: str = "unit",
    c: float = 1.0,
    optimizer: Optimizer | None = None,
    before_norm: bool = False,
) -> RescalingReport:
    """Rescale a model in place, node by node, without changing what it computes.

    A hidden unit j that is followed by ReLU may carry any scale d_j > 0: its weights
    and bias are multiplied by d_j, the weights that read it divided by d_j. The output
    is the same to rounding, in training and in evaluation; what training makes of the
    new weights is not. One sweep from input to output chooses

    - ``"unit"``: ``d_j = c / ‖W_j‖``, rows of norm c; what that takes collects in the
      last layer. This is SBWN, re-derived from the abstract.
    - ``"balanced"``: ``d_j = √(‖V_j‖ / (c‖W_j‖))``, with V_j the column that reads the
      unit. Repeated sweeps with c = 1 minimise ``Σ‖W‖²``. This is Equi-normalization.

    Scales pass through ReLU and its leaky kin, pooling, dropout, zero padding,
    flatten and sums; whatever lets no scale pass is refused. Units that meet in a sum
    share one scale, chosen from all rows and columns that meet there (the root mean
    square of their norms in the mode ``"unit"``). A norm layer takes the place of the
    layer before it: its weight γ_j is the row, β_j the bias. A CP layer takes the
    scales in the rows of its factors, which keep their column norms, and in λ, a
    low-rank layer in the rows of U and V. The output layer has no scale of its own, and
    rows or columns of zeros have d = 1.

    Args:
        model: Takes batches, ``(n, features)`` or ``(n, channels, ...)``.
        mode: ``"unit"`` or ``"balanced"``.
        c: Norm of the rows; or, balanced, how many times as long the columns are.
        optimizer: Of the model: SGD, Adam, AdamW or RMSprop. Its state follows, so that
            training goes on as that of the same function: what is linear in the
            gradient is divided by the scale of the parameter, what is quadratic by its
            square. So do the gradients that are there. For the factors of a CP layer
            second moments are followed up to the terms off the diagonal.
        before_norm: Also give rows before a batch norm the norm c, which it cancels
            but for its ``eps``: exactly in evaluation, and in training up to the
            ``train_error`` of the report.

    Returns:
        Scales and row norms by layer.

    Raises:
        TypeError: If an argument is of the wrong type, or the optimizer unknown.
        ValueError: If an argument is out of range, a weight is not finite, or the model
            does something that no scale passes, such as a sigmoid between two layers,
            a layer called twice, or shared weights. Nothing has changed then.

    Source: Yuan, Xiao 2019, doi:10.1109/ACCESS.2018.2890373 (SBWN; its scales are
    re-derived from the abstract); Stock, Graham, Gribonval, Jégou 2019,
    arXiv:1902.10416 (Equi-normalization).

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> rescale_(net, c=2.0).after["0"].round(decimals=3)
    tensor([2., 2., 2.])
    """
    check_module(model)
    c = _check_settings(mode, c)
    if optimizer is not None:
        check_optimizer(optimizer, model)
    plan = Plan(model, before_norm)
    plan.check_finite()
    scales, before = plan.scales(mode, c), plan.row_norms()
    error = max(layer.train_error(scales) for layer in plan.layers)
    plan.apply_(scales, optimizer, gradients=True)
    return RescalingReport(plan.by_layer(scales), before, plan.row_norms(), error)


class Rescaling(Hook):
    """Rescale after optimizer steps, together with the optimizer's state.

    Args:
        mode: As in `rescale_`.
        c: As in `rescale_`.
        every: Steps from one sweep to the next, 1 for a sweep after each step; or
            ``"epoch"`` for a single one after the last step of an epoch.
        before_norm: As in `rescale_`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range. `start` raises as `rescale_` does
            for the model and the optimizer.

    Source: as `rescale_`.

    >>> Rescaling("balanced", every=100)
    Rescaling(mode='balanced', c=1.0, every=100)
    """

    def __init__(
        self,
        mode: str = "unit",
        c: float = 1.0,
        *,
        every: int | str = 1,
        before_norm: bool = False,
    ) -> None:
        self.mode, self.c = mode, _check_settings(mode, c)
        if isinstance(every, str) and every != "epoch":
            raise ValueError(f"every is {every!r}, expected 'epoch' or steps >= 1.")
        self.every = every if every == "epoch" else check_count(every, "every")
        self.before_norm = before_norm
        self._plan: Plan | None = None

    def start(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Read the connections of the model, once for all steps."""
        check_optimizer(optimizer, model)
        self._plan = Plan(model, self.before_norm)

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Rescale, if it is time to. Weights that are not finite stay as they are."""
        if self.every != "epoch" and (step + 1) % self.every == 0:
            self._sweep(optimizer)

    def after_epoch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Rescale, if it is to be once an epoch."""
        if self.every == "epoch":
            self._sweep(optimizer)

    def _sweep(self, optimizer: Optimizer) -> None:
        scales = self._plan.scales(self.mode, self.c)
        # The gradients have had their step.
        self._plan.apply_(scales, optimizer, gradients=False)

    def stop(self, model: nn.Module) -> None:
        """Let go of the model."""
        self._plan = None

    def __repr__(self) -> str:
        """Class and settings."""
        text = f"mode={self.mode!r}, c={self.c}, every={self.every!r}"
        if self.before_norm:
            text += ", before_norm=True"
        return f"{type(self).__name__}({text})"


def _check_settings(mode: str, c: float) -> float:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {MODES}.")
    return check_positive(c, "c")


def _range(values: Tensor) -> str:
    low, high = values.min().item(), values.max().item()
    return f"{low:.3g} to {high:.3g}"
