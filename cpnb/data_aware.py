"""CP fits that spend their rank where the layer's inputs are."""

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpnb._checks import check_kernel
from cpnb.als import als, check_fit_options
from cpnb.cp import khatri_rao, normalize_columns, rebuild
from cpnb.decomposition import CPResult, decomposed
from cpnb.initializers import CPForm
from cpnb.ranks import Rank


def input_covariance(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Second moments of what a layer's kernel is multiplied with.

    Args:
        layer: An `nn.Linear`, or an `nn.Conv2d` with one group.
        inputs: A batch as the layer receives it.

    Returns:
        Mean outer product of the input patches (not centred), so that
        ``E‖Δy‖² = Σ_o ΔW_o S ΔW_oᵀ``. Shape ``(fan_in, fan_in)``, float64.

    Raises:
        TypeError: If the layer is of another kind.
        ValueError: If it has groups, or the inputs are not finite.
    """
    check_kernel(inputs, "inputs")
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, layer.in_features)
    elif isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise ValueError(f"layer has {layer.groups} groups, expected one.")
        rows = _patches(layer, inputs)
    else:
        raise TypeError(
            f"layer is a {type(layer).__name__}, expected an nn.Linear or nn.Conv2d."
        )
    rows = rows.detach().double()
    return rows.T @ rows / len(rows)


def data_aware_als(
    kernel: Tensor,
    rank: Rank,
    covariance: Tensor,
    *,
    sweeps: int = 20,
    ridge: float = 1e-6,
    tol: float = 1e-5,
    generator: torch.Generator | None = None,
) -> CPResult:
    """Alternating least squares on the error of the layer's *outputs*.

    Minimises ``Σ_o ΔW_o S ΔW_oᵀ``, the mean squared change of the outputs over the
    inputs behind S. Starts from `als`; mode 0 is solved for exactly, the others by
    conjugate gradients, so that the weighted error never grows.

    Args:
        kernel: Shape ``(out, in, *kernel_size)``, order ≥ 2.
        rank: Number of components, or any rank `cpnb.resolve_rank` takes.
        covariance: S, see `input_covariance`. Shape ``(fan_in, fan_in)``.
        sweeps: At most this many passes over all modes.
        ridge: Added to S as a fraction of its mean diagonal entry: directions the
            inputs do not reach still count a little.
        tol: Stop when a sweep lowers the weighted error by less than this fraction.
        generator: Source of the random starts; torch's default one if None.

    Returns:
        `CPResult`; ``info.weighted_error`` is the relative error of the outputs,
        ``info.relative_error`` that of the kernel.

    Raises:
        TypeError: If a tensor is not of floating-point type or ``rank`` no rank.
        ValueError: If a tensor is not finite or of the wrong shape, or a number is out
            of range.
    """
    rank = check_fit_options(
        kernel, rank, generator, sweeps=sweeps, ridge=ridge, tol=tol
    )
    check_kernel(covariance, "covariance")
    fan_in = kernel[0].numel()
    if covariance.shape != (fan_in, fan_in):
        raise ValueError(
            f"covariance has shape {tuple(covariance.shape)}, expected ({fan_in}, "
            f"{fan_in}) for a kernel of shape {tuple(kernel.shape)}. Make it with "
            "input_covariance."
        )
    began = time.perf_counter()
    first = als(kernel, rank, generator=generator)
    work = kernel.detach().double()
    moments = covariance.detach().to(work)
    moments = moments + ridge * moments.diagonal().mean() * torch.eye(
        fan_in, dtype=work.dtype, device=work.device
    )
    target = work.flatten(1) @ moments
    size = (target * work.flatten(1)).sum()
    factors = [f.double() for f in first.factors]
    factors[0] = factors[0] * first.lam.double()
    error, done = _output_error(work, factors, moments), 0
    while done < sweeps:
        done += 1
        factors = _weighted_sweep(factors, target, moments)
        before, error = error, _output_error(work, factors, moments)
        if before - error <= tol * before:
            break
    units, norms = normalize_columns(factors)
    lam = norms.prod(0)
    order = lam.argsort(descending=True)
    units = [u[:, order] for u in units]
    weighted = (error / size).clamp_min(0).sqrt().item()
    return decomposed(
        "data_aware_als", kernel, lam[order], units, done, began, weighted
    )


def data_aware(covariance: Tensor) -> Callable[..., CPForm]:
    """An initialiser for `from_layer` that fits the outputs instead of the kernel.

    ``from_layer(conv, rank=20, init=data_aware(input_covariance(conv, images)))``

    Args:
        covariance: See `input_covariance`.

    Returns:
        A function to pass as ``init=``.
    """
    return functools.partial(_fit_outputs, covariance=covariance)


def _fit_outputs(
    shape: tuple[int, ...],
    rank: int,
    *,
    covariance: Tensor,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    groups: int = 1,
) -> CPForm:
    if weight is None or groups != 1:
        raise ValueError(
            "init is data_aware, expected a layer with one group to convert: use it "
            "with from_layer."
        )
    kernel = weight.detach().to(device=device, dtype=dtype)
    result = data_aware_als(kernel, rank, covariance, generator=generator)
    kept = [n for n, size in enumerate(shape) if size > 1]
    # A mode of size 1 has the factor ±1: its sign goes into λ.
    signs = [result.factors[n][0] for n in range(len(shape)) if n not in kept]
    lam = functools.reduce(torch.mul, signs, result.lam)
    return lam, [result.factors[n] for n in kept]


def _patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Input patches of a convolution as rows. Shape ``(positions, fan_in)``."""
    margins = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    columns = F.unfold(
        F.pad(inputs, margins, mode=mode),
        layer.kernel_size,
        dilation=layer.dilation,
        stride=layer.stride,
    )
    return columns.movedim(1, 2).flatten(0, 1)


def _weighted_sweep(
    factors: list[Tensor], target: Tensor, moments: Tensor
) -> list[Tensor]:
    """One pass: mode 0 in closed form, the others by conjugate gradients."""
    columns = khatri_rao(factors[1:])
    gram = columns.T @ moments @ columns
    first = (target @ columns) @ torch.linalg.pinv(gram, hermitian=True)
    factors = _balanced([first, *factors[1:]])
    for n in range(1, len(factors)):
        normal = functools.partial(_normal, factors, n, moments)
        wanted = _project(target, factors, n)
        factors[n] = _conjugate_gradients(normal, wanted, factors[n])
    return factors


def _normal(factors: list[Tensor], n: int, moments: Tensor, value: Tensor) -> Tensor:
    """Normal operator of mode ``n``: from a factor to the gradient of its output."""
    others = [*factors[1:n], value, *factors[n + 1 :]]
    outputs = factors[0] @ (khatri_rao(others).T @ moments)
    return _project(outputs, factors, n)


def _project(outputs: Tensor, factors: list[Tensor], n: int) -> Tensor:
    """Contract ``(out, fan_in)`` with every factor but the n-th. Shape as factor n."""
    sizes = [len(f) for f in factors[1:]]
    contracted = (outputs.T @ factors[0]).view(*sizes, -1).movedim(n - 1, 0)
    rest = factors[1:n] + factors[n + 1 :]
    if not rest:
        return contracted
    return (contracted.flatten(1, -2) * khatri_rao(rest)).sum(1)


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor], wanted: Tensor, value: Tensor, steps: int = 15
) -> Tensor:
    residual = wanted - operator(value)
    direction, square = residual, residual.square().sum()
    for _ in range(steps):
        if square <= 1e-24 * wanted.square().sum():
            break
        image = operator(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:  # rounding: nothing left to gain
            break
        step = square / curvature
        value = value + step * direction
        residual = residual - step * image
        before, square = square, residual.square().sum()
        direction = residual + square / before * direction
    return value


def _balanced(factors: list[Tensor]) -> list[Tensor]:
    units, norms = normalize_columns(factors)
    return [u * norms.prod(0) ** (1 / len(factors)) for u in units]


def _output_error(kernel: Tensor, factors: list[Tensor], moments: Tensor) -> Tensor:
    ones = torch.ones_like(factors[0][0])
    difference = (kernel - rebuild(ones, factors)).flatten(1)
    return ((difference @ moments) * difference).sum()
