"""How stretched are the kernels: singular values, row norms, component weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpnb._checks import check_floating
from cpnb._diagnostics.measuring import has_kernel, weighted_layers
from cpnb._tables import html_table, text_table
from cpnb.evaluation import evaluation_mode


def entropy_rank(values: Tensor) -> Tensor:
    """Effective rank ``exp(−Σ p ln p)``, ``p = s/Σs``, of singular values s.

    Args:
        values: Not negative. Shape ``(n,)``.

    Returns:
        Scalar: how many equal values would be as spread out; 1 if all are zero.

    Source: Roy & Vetterli 2007, "The effective rank", EUSIPCO.
    """
    share = values / torch.where(values.sum() > 0, values.sum(), 1)
    return torch.special.entr(share).sum().exp()


def _entropy_rank(values: Sequence[float]) -> float:
    return entropy_rank(torch.tensor(values, dtype=torch.float64)).item()


@dataclass(frozen=True, repr=False)
class Spectrum:
    """The singular values of a kernel's unfolding W₍₁₎, one row per output.

    If the kernel has NaN or infinite entries, its numbers are NaN.

    Attributes:
        shape: Of the kernel.
        singular_values: In descending order. With groups those of all groups together,
            which are those of the block-diagonal matrix from inputs to outputs.
        row_norms: The 2-norm of each output's row.
        rank: Number of singular values that rounding cannot have made, as there are
            ``½ √(rows + columns + 1) · eps`` times the largest.
        lam: Sizes |σλ| of the components of a CP layer, in descending order; None for
            other layers.
    """

    shape: tuple[int, ...]
    singular_values: tuple[float, ...]
    row_norms: tuple[float, ...]
    rank: int
    lam: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        """The shape and what follows from the values, not the values."""
        return (
            f"Spectrum({'×'.join(map(str, self.shape))}: "
            f"κ {self.condition_number:.3g}, "
            f"effective rank {self.effective_rank:.1f}, "
            f"stable rank {self.stable_rank:.1f} of {len(self.singular_values)})"
        )

    @property
    def condition_number(self) -> float:
        """κ, the largest singular value over the smallest; ∞ below full rank."""
        largest, smallest = self.singular_values[0], self.singular_values[-1]
        full = self.rank == len(self.singular_values)
        return largest / smallest if full or math.isnan(largest) else math.inf

    @property
    def effective_rank(self) -> float:
        """``exp(−Σ p ln p)`` with ``p = s/Σs``: how many equal values would do."""
        return entropy_rank(
            torch.tensor(self.singular_values, dtype=torch.double)
        ).item()

    @property
    def stable_rank(self) -> float:
        """``‖W‖_F² / ‖W‖₂²``, 0 for a zero kernel."""
        largest = self.singular_values[0]
        if largest == 0:
            return 0.0
        return sum((value / largest) ** 2 for value in self.singular_values)

    @property
    def row_spread(self) -> float:
        """The largest row norm over the smallest; ∞ if a row is zero."""
        smallest = min(self.row_norms)
        return math.inf if smallest == 0 else max(self.row_norms) / smallest

    @property
    def effective_components(self) -> float | None:
        """The effective rank's formula on |λ|; None for layers that are not CP."""
        return None if self.lam is None else _entropy_rank(self.lam)

    def to_row(self) -> dict[str, Any]:
        """The numbers as a dict."""
        names = ("rank", "condition_number", "effective_rank", "stable_rank")
        names += ("row_spread", "effective_components")
        return {"shape": self.shape} | {name: getattr(self, name) for name in names}


@torch.no_grad()
def spectrum(kernel: Tensor | nn.Module) -> Spectrum:
    """Singular values of a kernel, unfolded with one row per output.

    Args:
        kernel: A kernel of shape ``(out, in, *size)`` or a matrix ``(out, in)``, or a
            layer with a ``weight``: a convolution, also with groups or transposed, a
            linear layer, a CP layer, a layer of low rank, a parametrized layer.

    Returns:
        `Spectrum`. Bad numbers do not raise; they make its numbers NaN.

    Raises:
        TypeError: If ``kernel`` is neither, or not of floating-point type.
        ValueError: If the kernel has fewer than two modes or an empty one.

    >>> found = spectrum(torch.diag(torch.tensor([3.0, 3.0, 1.0])))
    >>> round(found.condition_number, 3), round(found.stable_rank, 3)
    (3.0, 2.111)
    >>> spectrum(torch.ones(4, 3)).condition_number
    inf
    """
    lam = None
    if isinstance(kernel, nn.Module):
        with evaluation_mode(kernel):  # where looking at a weight does not change it
            lam, blocks, shape = _of_layer(kernel)
    else:
        check_floating(kernel, "kernel")
        shape = tuple(kernel.shape)
        if kernel.ndim < 2 or not kernel.numel():
            raise ValueError(
                f"kernel has shape {shape}, expected two modes or more, none empty."
            )
        blocks = kernel.detach().flatten(1)[None]
    eps = torch.finfo(blocks.dtype).eps
    blocks = blocks.double().cpu()
    if blocks.isfinite().all():
        values = torch.linalg.svdvals(blocks).flatten().sort(descending=True).values
    else:
        values = blocks.new_full((len(blocks) * min(blocks.shape[1:]),), torch.nan)
    limit = 0.5 * math.sqrt(sum(blocks.shape[1:]) + 1) * eps * values[0]
    return Spectrum(
        shape,
        tuple(values.tolist()),
        tuple(blocks.norm(dim=2).flatten().tolist()),
        int((values > limit).sum()),
        lam,
    )


def _of_layer(
    layer: nn.Module,
) -> tuple[tuple[float, ...] | None, Tensor, tuple[int, ...]]:
    """|λ| or None, unfolding of shape (groups, rows, columns), shape of the kernel."""
    # CP layers start from decompositions, which use this package: import them late.
    from cpnb.base import CPLayer
    from cpnb.execution import build_kernel

    lam = None
    if not has_kernel(layer):
        raise TypeError(
            f"kernel is a {type(layer).__name__} without a weight of two modes or "
            "more, expected a layer. For a whole model call cpnb.spectrum_report."
        )
    if isinstance(layer, CPLayer):
        # In float64, so that rounding does not fill up a kernel of lower rank.
        weights, units = layer.components(torch.float64)
        kernel = build_kernel(weights, units, layer.kernel_shape, channels_last=False)
        lam = tuple(weights.detach().abs().sort(descending=True).values.tolist())
    else:
        kernel = layer.weight
    shape, groups = tuple(kernel.shape), getattr(layer, "groups", 1)
    blocks = kernel.detach().unflatten(0, (groups, -1))
    if getattr(layer, "transposed", False):  # stored as (in, out / groups, …)
        blocks = blocks.transpose(1, 2)
    return lam, blocks.flatten(2), shape


@dataclass(frozen=True, repr=False)
class SpectrumReport:
    """The spectrum of every layer of a model.

    Attributes:
        layers: `Spectrum` by layer name.
    """

    layers: dict[str, Spectrum]

    def to_rows(self) -> list[dict[str, Any]]:
        """One dict per layer."""
        return [{"layer": name} | s.to_row() for name, s in self.layers.items()]

    def __repr__(self) -> str:
        """A table in plain text."""
        return text_table(self._cells())

    def _repr_html_(self) -> str:
        return html_table(self._cells())

    def _cells(self) -> Sequence[Sequence[str]]:
        head = ["layer", "shape", "κ", "effective rank", "stable rank", "of"]
        table = [[*head, "row norms max/min", "components", "effective components"]]
        for name, found in self.layers.items():
            cp, components = found.lam is not None, found.effective_components
            table.append(
                [
                    name,
                    "×".join(map(str, found.shape)),
                    f"{found.condition_number:.3g}",
                    f"{found.effective_rank:.1f}",
                    f"{found.stable_rank:.1f}",
                    str(len(found.singular_values)),
                    f"{found.row_spread:.3g}",
                    str(len(found.lam)) if cp else "",
                    f"{components:.1f}" if cp else "",
                ]
            )
        return table


def spectrum_report(model: nn.Module) -> SpectrumReport:
    """Measure the spectrum of every layer of a model that has a kernel.

    Args:
        model: Any module; also a single layer. What a layer is: see `spectrum`.

    Returns:
        The report; print it, show it in a notebook, or take its ``to_rows()``.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If it has no layer with a kernel.

    >>> net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    >>> for layer in (net[0], net[2]):
    ...     _ = nn.init.eye_(layer.weight)
    >>> print(spectrum_report(net[2]).to_rows()[0]["condition_number"])
    1.0
    """
    return SpectrumReport(
        {name: spectrum(layer) for name, layer in weighted_layers(model).items()}
    )
