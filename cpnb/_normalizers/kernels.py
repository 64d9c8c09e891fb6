"""Centred, standardised and orthogonal kernels; those torch has no module for."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cpnb._checks import check_count
from cpnb._normalizers.base import (
    LEARNABLE,
    RELU_GAIN,
    Gain,
    Reparametrization,
    drawing_from,
    frobenius,
    inverse_root,
    per_layer,
    reparametrized,
)
from cpnb.surgery import Skip

# Each iteration amplifies rounding in the null space of a centred matrix by half.
ONI_CAP = 7
ORTHOGONAL_MAPS = ("householder", "cayley", "matrix_exp")


def _one_column(matrix: Tensor) -> str | None:
    one = "has a single weight per output, which centring turns into zero."
    return one if matrix.shape[1] == 1 else None


def center(matrix: Tensor) -> Tensor:
    """Subtract its mean from every row."""
    return matrix - matrix.mean(-1, keepdim=True)


def standardize(matrix: Tensor) -> Tensor:
    """Rows of mean 0, over their standard deviation (of a sample) plus 1e-5."""
    centered = center(matrix)
    variance = centered.square().sum(-1, keepdim=True) / (matrix.shape[-1] - 1)
    alive = variance > 0  # the root has no gradient at 0
    deviation = torch.where(alive, variance, 1).sqrt() * alive
    return centered / (deviation + 1e-5)


def newton_orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """Centre the rows, then push all singular values up towards 1 (ONI).

    ``S = ZZᵀ + 1e-5 I`` of the centred Z, over its norm; ``B ← 1.5 B − 0.5 B³S`` from
    the identity, towards ``S^(−1/2)``; then ``BZ``. With more rows than columns the
    same from the right, with ZᵀZ.

    Args:
        matrix: Shape ``(..., rows, columns)``.
        iterations: At least 1.

    Returns:
        The same shape, no singular value above 1.
    """
    centered = center(matrix)
    tall = matrix.shape[-2] > matrix.shape[-1]
    flat = centered.mT if tall else centered
    eye = torch.eye(flat.shape[-2], dtype=matrix.dtype, device=matrix.device)
    gram = flat @ flat.mT + 1e-5 * eye
    norm = torch.linalg.matrix_norm(gram, keepdim=True)
    gram = gram / norm
    # The same B with Y = BS beside it: B alone loses what BS = SB, and then diverges
    # in float32 within ten steps (Higham 2008, Functions of Matrices, chapter 6).
    root = 1.5 * eye - 0.5 * gram
    product = gram @ root
    for n in range(1, iterations):
        step = 1.5 * eye - 0.5 * root @ product
        root = step @ root
        if n < iterations - 1:
            product = product @ step
    flat = root @ flat / norm.sqrt()
    return flat.mT if tall else flat


def qr_orthogonal(matrix: Tensor) -> Tensor:
    """The Q of the QR decomposition with a positive diagonal: orthonormal columns.

    By Cholesky, ``VᵀV = RᵀR`` and ``Q = VR⁻¹``. NaN where V lacks full rank.

    Args:
        matrix: Shape ``(..., rows, columns)``; the rows become orthonormal if there are
            fewer of them.

    Returns:
        The same shape.
    """
    wide = matrix.shape[-2] < matrix.shape[-1]
    tall = matrix.mT if wide else matrix
    lower, failed = torch.linalg.cholesky_ex(tall.mT @ tall)
    lower = torch.where(failed[..., None, None] == 0, lower, math.nan)
    tall = torch.linalg.solve_triangular(lower.mT, tall, upper=True, left=False)
    return tall.mT if wide else tall


class Centered(Reparametrization):
    """``g·(v − mean)/‖v − mean‖`` per row, g starting at that norm."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        rows = center(layer.weight.detach().flatten(1))
        norms = torch.linalg.vector_norm(rows, dim=1).view(self.groups, -1, 1)
        self.set_gain(norms, learned=True, trained=layer.weight.requires_grad)

    def constrain(self, matrix: Tensor) -> Tensor:
        """Centred rows of norm 1."""
        rows = center(matrix)
        return rows * inverse_root(rows.square().sum(-1, keepdim=True))


class Standardized(Reparametrization):
    """See `standardize`; with ``scaled``, over the root of the fan-in too."""

    def __init__(self, layer: nn.Module, scaled: bool) -> None:
        super().__init__(layer)
        self.scaled = scaled

    def constrain(self, matrix: Tensor) -> Tensor:
        """Standardised rows."""
        rows = standardize(matrix)
        return rows / math.sqrt(matrix.shape[-1]) if self.scaled else rows


class NewtonOrthogonal(Reparametrization):
    """See `newton_orthogonal`."""

    def __init__(self, layer: nn.Module, iterations: int) -> None:
        super().__init__(layer)
        self.iterations = iterations

    def constrain(self, matrix: Tensor) -> Tensor:
        """Nearly orthogonal matrix."""
        return newton_orthogonal(matrix, self.iterations)


class QROrthogonal(Reparametrization):
    """See `qr_orthogonal`."""

    def constrain(self, matrix: Tensor) -> Tensor:
        """Orthogonal matrix."""
        return qr_orthogonal(matrix)

    def right_inverse(self, kernel: Tensor) -> Tensor:
        """Start from the orthogonal matrix itself, also below full rank."""
        matrix = kernel.reshape(self.groups, kernel.shape[0] // self.groups, -1)
        wide = matrix.shape[-2] < matrix.shape[-1]
        q, r = torch.linalg.qr((matrix.mT if wide else matrix).double())
        q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).unsqueeze(-2)
        return (q.mT if wide else q).reshape(kernel.shape).to(kernel.dtype)


class Reshaped(Reparametrization):
    """Gain and shape of a kernel, after torch's parametrisation of its matrices."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.shape = layer.weight.shape

    def forward(self, matrix: Tensor) -> Tensor:
        """Map ``(groups, out / groups, fan_in)`` to the shape of the kernel."""
        return (self.gain * matrix).reshape(self.shape)


def centered(model: nn.Module, skip: Skip) -> nn.Module:
    """Centred weight norm."""

    def normalise(layer: nn.Module) -> nn.Module:
        return reparametrized(layer, Centered(layer))

    return per_layer(model, skip, normalise, reason=_one_column)


def standardized(
    model: nn.Module, skip: Skip, *, gain: Gain | None = None, output: bool = False
) -> nn.Module:
    """Weight standardisation."""

    def normalise(layer: nn.Module) -> nn.Module:
        return reparametrized(layer, Standardized(layer, gain is not None), gain)

    return per_layer(model, skip, normalise, reason=_one_column, output=output)


def oni(
    model: nn.Module, skip: Skip, *, iterations: int = 5, gain: Gain = RELU_GAIN
) -> nn.Module:
    """Orthogonalisation by Newton's iteration."""
    count = check_count(iterations, "iterations")
    if count > ONI_CAP:
        raise ValueError(
            f"iterations is {count}, expected at most {ONI_CAP}: each amplifies "
            "rounding in the null space of the centred kernel by half."
        )

    def normalise(layer: nn.Module) -> nn.Module:
        return reparametrized(layer, NewtonOrthogonal(layer, count), gain)

    return per_layer(model, skip, normalise, reason=_one_column)


def orthogonal(
    model: nn.Module,
    skip: Skip,
    *,
    orthogonal_map: str | None = None,
    gain: Gain = LEARNABLE,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Orthonormal rows, or columns where there are fewer, times a gain."""
    if orthogonal_map not in (None, *ORTHOGONAL_MAPS):
        raise ValueError(
            f"orthogonal_map is {orthogonal_map!r}, expected None or one of "
            f"{ORTHOGONAL_MAPS}."
        )

    def normalise(layer: nn.Module) -> nn.Module:
        if orthogonal_map is None:
            return reparametrized(layer, QROrthogonal(layer), gain)
        return _mapped(layer, orthogonal_map, gain, generator)

    return per_layer(model, skip, normalise)


def _mapped(
    layer: nn.Module, kind: str, gain: Gain, generator: torch.Generator | None
) -> nn.Module:
    """Torch's own orthogonal matrices, one per group, then gain and shape."""
    shape, weight, norm = Reshaped(layer), layer.weight, frobenius(layer.weight)
    matrices = weight.detach().reshape(shape.groups, len(weight) // shape.groups, -1)
    layer.weight = nn.Parameter(matrices, weight.requires_grad)
    # Without a fixed matrix beside them, the other maps could not start anywhere.
    fixed = kind != "householder"
    with drawing_from(generator, weight.device):
        parametrizations.orthogonal(layer, "weight", kind, use_trivialization=fixed)
    # Decay would pull ±1 on its diagonal below 1, which torch then cuts to 0.
    layer.parametrizations["weight"].no_decay = ("original",)
    return reparametrized(layer, shape, gain, norm)
