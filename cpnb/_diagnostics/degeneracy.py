"""The degeneracy meter: are the components of a CP kernel huge and cancelling?

Everything is computed from the Gram matrix of the components, in float64; the kernel is
never built, so that the meter is cheap enough to run during training.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpnb._checks import check_cp, check_floating
from cpnb._tables import html_table, text_table
from cpnb.cp import component_gram, normalize_columns

# Dropping each component with probability ½ changes the kernel by (1 + energy)/4 of
# ‖W‖² on average. Above 3 that is worse than the zero kernel: cutting is meaningless.
# For two equal components it is a cosine below −2/3.
ENERGY_LIMIT = 3.0
# Half precision's rounding, which inference is known to tolerate: Σ|λ| ≤ 4096·‖W‖.
FLOAT32_LIMIT = 2.0**-11


@dataclass(frozen=True)
class Degeneracy:
    """What the components of one CP kernel do to each other.

    A component is ``λ_r`` times a rank-one term of norm 1; ‖W‖ is the norm of their
    sum. If a parameter is not finite, the numbers are NaN. ``lam_max`` saturates below
    1e8: from there on float64 itself cannot tell ‖W‖ from zero.

    Attributes:
        rank: Number of components.
        lam_max: ``max |λ_r| / ‖W‖``; at most 1 for orthogonal components.
        energy: ``Σ λ_r² / ‖W‖²``; 1 for orthogonal components, and for a zero kernel
            with λ = 0 it is 0.
        worst_cosine: Largest |cosine| between two components. Near 1 they point the
            same way, which is harmless if they add up.
        worst_cancellation: Most negative cosine with the signs of λ counted, 0 if
            there is none. Near −1 two components cancel: degeneracy.
        sensitivity: Expected ‖ΔW‖² per unit variance of independent noise on every
            entry of the norm-balanced factors: ``Σ_n size_n · Σ_r |λ_r|^(2 − 2/N)``.
        float32_error: Estimate of the relative error of the kernel if factors and λ
            are rounded to float32, ``2⁻²³ · Σ|λ_r| / ‖W‖``.
        finite: Whether every parameter is.
    """

    rank: int
    lam_max: float
    energy: float
    worst_cosine: float
    worst_cancellation: float
    sensitivity: float
    float32_error: float
    finite: bool

    @property
    def degenerate(self) -> bool:
        """Whether energy is above `ENERGY_LIMIT`, or something is not finite.

        So are close ALS fits of random kernels (energy 6 at break-even): their
        components are right together, but order and cuts by |λ| mean nothing.
        """
        return not self.energy <= ENERGY_LIMIT

    @property
    def float32_safe(self) -> bool:
        """Whether float32 error is at most `FLOAT32_LIMIT`."""
        return self.float32_error <= FLOAT32_LIMIT

    def to_row(self) -> dict[str, int | float | bool]:
        """The numbers and both flags as a dict."""
        flags = {"float32_safe": self.float32_safe, "degenerate": self.degenerate}
        return asdict(self) | flags


@torch.no_grad()
def degeneracy(lam: Tensor, factors: Sequence[Tensor]) -> Degeneracy:
    """Measure how much the components of a CP kernel cancel each other.

    Args:
        lam: Component weights, any sign. Shape ``(rank,)``.
        factors: One matrix per mode, columns of any norm; modes of size 1 may be left
            out. Shapes ``(size_n, rank)``.

    Returns:
        `Degeneracy`. Bad numbers do not raise; they make it ``degenerate``.

    Raises:
        TypeError: If a tensor is not of floating-point type.
        ValueError: If shapes disagree.

    Source: de Silva & Lim 2008, doi:10.1137/06066518X (degeneracy); Phan et al. 2020,
    arXiv:2008.05441 (sensitivity).

    >>> a, b = torch.eye(2).unbind()
    >>> near = a + 0.1 * b  # 10·near∘near∘near − 10·a∘a∘a is almost aab + aba + baa
    >>> pair = torch.stack([near, a], 1)
    >>> found = degeneracy(torch.tensor([10.0, -10.0]), [pair, pair, pair])
    >>> found.degenerate, round(found.worst_cancellation, 3), round(found.lam_max, 1)
    (True, -0.985, 5.8)
    """
    check_floating(lam, "lam")
    if len(factors):
        check_cp(lam, factors)
    lam = lam.detach().double()
    modes = [factor.detach().double() for factor in factors]
    # A mode of size 1 is a number per component: it has no direction and no factor.
    for number in (factor for factor in modes if factor.shape[0] == 1):
        lam = lam * number[0]
    modes = [factor for factor in modes if factor.shape[0] > 1]
    gram, order = lam.new_ones(len(lam), len(lam)), len(modes)
    if modes:
        units, norms = normalize_columns(modes)
        lam, gram = lam * norms.prod(0), component_gram(units)
    finite = bool(lam.isfinite().all() and gram.isfinite().all())
    if not finite:
        return Degeneracy(len(lam), *[float("nan")] * 6, finite=False)
    # Without a common factor in λ no square can overflow or vanish.
    peak = lam.abs().max()
    scale = torch.where(peak > 0, peak, 1)
    lam = lam / scale
    weight, signs = lam.abs(), lam.sign()
    total = weight.sum()
    floor = torch.finfo(lam.dtype).eps * total.square()
    norm = torch.where(peak > 0, torch.maximum(lam @ gram @ lam, floor), 1).sqrt()
    # A component of weight 0 points nowhere, so its sign 0 takes it out.
    cosines = (signs[:, None] * gram * signs).fill_diagonal_(0)
    rows = sum(factor.shape[0] for factor in modes)
    power = 2 - 2 / max(order, 1)
    numbers = torch.stack(
        [
            weight.max() / norm,
            weight.square().sum() / norm.square(),
            cosines.abs().max().clamp(max=1),
            cosines.min().clamp(-1, 0),
            # 0⁰ is 0 here: without weight a component takes no noise to the kernel.
            rows * (weight.pow(power) * (weight > 0)).sum() * scale.pow(power),
            torch.finfo(torch.float32).eps * total / norm,
        ]
    )
    return Degeneracy(len(lam), *numbers.tolist(), finite=True)


@dataclass(frozen=True)
class DegeneracyReport:
    """The degeneracy of every CP layer of a model.

    Attributes:
        layers: `Degeneracy` by layer name.
    """

    layers: dict[str, Degeneracy]

    @property
    def degenerate(self) -> bool:
        """Whether any layer is."""
        return any(found.degenerate for found in self.layers.values())

    @property
    def float32_safe(self) -> bool:
        """Whether every layer is."""
        return all(found.float32_safe for found in self.layers.values())

    def to_rows(self) -> list[dict[str, Any]]:
        """One dict per layer."""
        return [{"layer": name} | d.to_row() for name, d in self.layers.items()]

    def __str__(self) -> str:
        """A table in plain text."""
        cells = _cells(self)
        return text_table(cells, left=(0, len(cells[0]) - 1))

    def _repr_html_(self) -> str:
        return html_table(_cells(self))


def degeneracy_report(
    model: nn.Module | tuple[Tensor, Sequence[Tensor]],
) -> DegeneracyReport:
    """Measure every CP layer of a model.

    Args:
        model: A CP layer, a module that holds some, or a pair ``(lam, factors)``.

    Returns:
        The report; print it, show it in a notebook, or take its ``to_rows()``.

    Raises:
        ValueError: If there is no CP layer.

    Watch it while a network trains:

    >>> from cpnb import CPLinear, fit
    >>> net = nn.Sequential(CPLinear(20, 10, rank=6), nn.ReLU(), CPLinear(10, 4))
    >>> seen = []
    >>> def watch(epoch, model, record):
    ...     seen.append(degeneracy_report(model))
    >>> data = torch.randn(32, 20), torch.arange(32) % 4
    >>> run = fit(net, data, epochs=2, callback=watch, progress=False)
    >>> [report.degenerate for report in seen]
    [False, False]
    """
    # The layers start from decompositions, which use this module: import them late.
    from cpnb.surgery import cp_layers

    if isinstance(model, tuple):
        return DegeneracyReport({"CP": degeneracy(*model)})
    layers = cp_layers(model)
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} without CP layers. Call "
            "cpnb.canonicalize first."
        )
    return DegeneracyReport(
        {
            name or type(layer).__name__: degeneracy(*layer.components(torch.float64))
            for name, layer in layers.items()
        }
    )


def _cells(report: DegeneracyReport) -> list[list[str]]:
    head = ["layer", "components", "max |λ|/‖W‖", "Σλ²/‖W‖²", "worst cosine"]
    table = [[*head, "cancellation", "sensitivity", "float32 error", "verdict"]]
    for name, found in report.layers.items():
        numbers = [found.lam_max, found.energy]
        cosines = [found.worst_cosine, found.worst_cancellation]
        rest = [found.sensitivity, found.float32_error]
        table.append(
            [
                *(name, str(found.rank)),
                *(f"{value:.3g}" for value in numbers),
                *(f"{value:.3f}" for value in cosines),
                *(f"{value:.2g}" for value in rest),
                _verdict(found),
            ]
        )
    return table


def _verdict(found: Degeneracy) -> str:
    if not found.finite:
        return "not finite"
    faults = []
    if found.degenerate:
        faults.append("degenerate")
    if not found.float32_safe:
        faults.append("unsafe in float32")
    return ", ".join(faults) or "healthy"
