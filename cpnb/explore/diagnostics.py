"""Look into a network: is it well conditioned, and how sharp is its loss?

Nothing is changed: parameters, gradients and flags are afterwards what they were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cpnb.layers import CPLayer, evaluation_mode
from cpnb.train.evaluation import images_and_labels, moved

__all__ = ["spectrum", "spectrum_report", "step_spectrum", "top_hessian_eigenvalue"]

_CHUNK = 1000  # images per pass


class Spectrum(NamedTuple):
    """Numbers of a kernel's unfolding, one row per output.

    Attributes:
        singular_values: s in descending order. With groups those of all together, which
            are those of the block-diagonal matrix from inputs to outputs.
        condition_number: κ, the largest over the smallest; ∞ if the smallest is no more
            than rounding makes, ``½ √(rows + columns + 1) · eps`` times the largest.
        effective_rank: ``exp(−Σ p ln p)``, ``p = s/Σs``. Roy & Vetterli 2007, EUSIPCO.
        stable_rank: ``‖W‖_F² / ‖W‖₂²``, 0 for a zero kernel.
        row_spread: The largest 2-norm of a row over the smallest; ∞ if one is zero.
    """

    singular_values: Tensor
    condition_number: float
    effective_rank: float
    stable_rank: float
    row_spread: float


@torch.no_grad()
def spectrum(kernel: Tensor | nn.Module) -> Spectrum:
    """Measure the singular values of a kernel, unfolded with one row per output.

    Args:
        kernel: A kernel of shape ``(out, in, *size)`` or a matrix ``(out, in)``, or any
            layer with such a ``weight``, also with groups or transposed.

    >>> found = spectrum(torch.diag(torch.tensor([3.0, 3.0, 1.0])))
    >>> round(found.condition_number, 3), round(found.stable_rank, 3)
    (3.0, 2.111)
    >>> spectrum(torch.ones(4, 3)).condition_number
    inf
    """
    weight: Any = kernel
    if isinstance(kernel, CPLayer):
        # In float64, so that rounding does not fill up a kernel of lower rank.
        weight = copy.deepcopy(kernel).double().weight
    elif isinstance(kernel, nn.Module):
        with evaluation_mode(kernel):  # where looking does not change a parametrization
            weight = kernel.weight
    blocks = weight.unflatten(0, (getattr(kernel, "groups", 1), -1))
    if getattr(kernel, "transposed", False):  # stored as (in, out / groups, …)
        blocks = blocks.transpose(1, 2)
    eps = torch.finfo(blocks.dtype).eps
    blocks = blocks.flatten(2).double().cpu()
    values = torch.linalg.svdvals(blocks).flatten().sort(descending=True).values
    largest, smallest = values[0].item(), values[-1].item()
    rounding = 0.5 * math.sqrt(sum(blocks.shape[1:]) + 1) * eps * largest
    share = values / (values.sum() or 1)
    rows = blocks.norm(dim=2)
    return Spectrum(
        singular_values=values,
        condition_number=math.inf if smallest <= rounding else largest / smallest,
        effective_rank=torch.special.entr(share).sum().exp().item(),
        stable_rank=(values / (largest or 1)).square().sum().item(),
        row_spread=(rows.max() / rows.min()).item() if rows.min() else math.inf,
    )


def spectrum_report(model: nn.Module) -> pd.DataFrame:
    """Measure the spectrum of every layer of a model that has a kernel.

    A layer made of layers, as one of low rank, counts once if it has a ``weight``.

    Returns:
        By layer name the ``shape`` of the kernel and the numbers of `Spectrum`.
    """
    rows = {}
    inside: set[nn.Module] = set()
    with evaluation_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if module in inside or not isinstance(weight, Tensor) or weight.ndim < 2:
                continue
            inside.update(module.modules())
            shape = {"shape": "×".join(map(str, weight.shape))}
            rows[name or type(module).__name__] = shape | spectrum(module)._asdict()
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.drop(columns="singular_values", errors="ignore")


class StepSpectrum(NamedTuple):
    """How far steps of gradient descent move a kernel; for a dense layer both are 1."""

    largest: float  # eigenvalue of J Jᵀ
    mean: float  # of its eigenvalues


def step_spectrum(
    layer: nn.Module, *, generator: torch.Generator | None = None
) -> StepSpectrum:
    """Compare steps of a layer's parameters with those of a dense kernel.

    With J the Jacobian of the kernel by the parameters, a step of SGD at the rate η
    moves the kernel by ``−η J Jᵀ G``, G its gradient: by ``−η G`` in a dense layer.

    Args:
        layer: Any layer with a ``weight``, such as a CP, a low-rank or a
            weight-normalised one; parameters that need no gradient do not move.
        generator: Source of the start and of 30 probes; torch's default one if None.

    Source: re-derived here; Hutchinson 1990, doi:10.1080/03610919008812866 (the mean).

    >>> step_spectrum(nn.Linear(4, 3))
    StepSpectrum(largest=1.0, mean=1.0)
    """
    from scipy.sparse import linalg

    holder: Any = nn.Module()
    holder.layer = copy.deepcopy(layer).double().cpu()  # where SciPy computes
    holder.forward = lambda: holder.layer.weight
    named = [pair for pair in holder.named_parameters() if pair[1].requires_grad]
    values = {name: p for name, p in named if not name.endswith("bias")}
    kernel, pull = torch.func.vjp(lambda p: functional_call(holder, p, ()), values)[:2]
    # J from the linear Jᵀ, since torch's weight norm has no forward derivative.
    push = torch.func.vjp(lambda move: pull(move)[0], torch.zeros_like(kernel))[1]

    def product(direction: np.ndarray) -> np.ndarray:
        back = pull(torch.from_numpy(direction).view_as(kernel))
        return push(back[0])[0].detach().flatten().numpy()

    size = kernel.numel()
    start, *signs = _draw((31, size), generator).sign().cpu().numpy()
    operator = linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
    largest = linalg.eigsh(operator, 1, v0=start, tol=1e-3)[0].item()
    mean = sum(sign @ product(sign) for sign in signs) / (size * len(signs))
    return StepSpectrum(largest, float(mean))


class TopEigenvalue(NamedTuple):
    """The largest eigenvalue of a Hessian H, and what it took."""

    value: float  # with its sign: the sharpest upward curve
    residual: float  # ‖Hv − value·v‖; some eigenvalue of H is no further from value
    products: int  # of the Hessian and a vector


def top_hessian_eigenvalue(
    model: nn.Module,
    data: Any,
    *,
    tolerance: float = 0.01,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> TopEigenvalue:
    """Find the largest eigenvalue of the Hessian of the mean cross entropy.

    H is that for all parameters with ``requires_grad``, as the model stores them; a
    Lanczos iteration multiplies it with vectors.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``.
        data: A data set, of which the training split is used, or a pair
            ``(images, labels)``.
        tolerance: Residual, relative to the eigenvalue, at which the search ends.
        generator: Source of the start vector; torch's default one if None.
        progress: Count the products in a text progress bar.

    Source: Pearlmutter 1994, doi:10.1162/neco.1994.6.1.147 (the product).
    """
    from scipy.sparse import linalg
    from tqdm import tqdm

    parameters = [p for p in model.parameters() if p.requires_grad]
    chunks = _chunks(model, data)
    count = sum(len(labels) for _, labels in chunks)
    bar: Any = tqdm(desc="Hessian-vector products", disable=not progress, leave=False)
    products = 0

    def flat_gradient(value: Tensor, **options: Any) -> Tensor:
        options |= {"allow_unused": True, "materialize_grads": True}
        parts = torch.autograd.grad(value, parameters, **options)
        return torch.cat([part.flatten() for part in parts])

    def slope(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(model(images), labels, reduction="sum") / count
        return flat_gradient(loss, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        bar.update()
        direction = torch.from_numpy(vector.ravel()).to(parameters[0])
        total = torch.zeros_like(direction)
        for gradient in kept or (slope(*chunk) for chunk in chunks):
            total += flat_gradient(gradient @ direction, retain_graph=True)
        return total.double().cpu().numpy()

    size = sum(p.numel() for p in parameters)
    start = _draw((size,), generator).cpu().numpy()
    hessian = linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
    with evaluation_mode(model), torch.enable_grad(), bar:
        # The graph of a single chunk is kept; of many, only one fits in memory.
        kept = [slope(*chunks[0])] if len(chunks) == 1 else []
        (value,), vector = linalg.eigsh(hessian, 1, which="LA", tol=tolerance, v0=start)
        residual = np.linalg.norm(product(vector) - value * vector[:, 0])
    return TopEigenvalue(float(value), float(residual), products)


def _chunks(model: nn.Module, data: Any) -> list[tuple[Tensor, Tensor]]:
    """Training images and labels in chunks, where the model is."""
    images, labels = images_and_labels(data, "train")
    images = moved(model, images)
    labels = labels.to(images.device, torch.long)
    return list(zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True))


def _draw(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """A Gaussian draw, float64, the same on every device."""
    device = generator.device if generator is not None else "cpu"
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
