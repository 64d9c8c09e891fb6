"""Starts for a CP kernel: from nothing, or from a dense kernel.

Every initialiser has one signature, ``f(shape, rank, *, weight, groups, generator,
device, dtype) -> (lam, factors)``, and returns one factor per mode of size > 1.
``CPConv2d(..., init=...)`` takes a name from `INITIALIZERS` or any such function, for
example ``functools.partial(unified, mode="fan_out")``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cpnb.cp import CPForm, normalize_columns, rebuild
from cpnb.decompose import als, power_method, random_units

__all__ = ["INITIALIZERS", "gaussian", "unified", "uniform"]

PHI = {"relu": 0.5, "linear": 1.0}  # share of the signal power that passes


def unified(
    shape: Sequence[int],
    rank: int,
    *,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: Literal["relu", "linear"] = "relu",
    groups: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **_: Any,
) -> CPForm:
    """Random unit columns with one λ that gives the *rebuilt* kernel its variance.

    ``λ = √(O/(φR))`` for fan-in and ``√(I/(φR))`` for fan-out, φ = ½ for ReLU and 1 for
    linear, so that ``Var(W) = 1/(φ·fan)``: Kaiming's variance, at every rank.

    Args:
        shape: Kernel shape ``(out, in / groups, *kernel_size)``.
        rank: Number of components R.
        mode: Keep the variance of activations (``"fan_in"``) or of gradients.
        nonlinearity: What follows the layer.
        groups: Groups of the convolution.
        generator: Source of randomness; torch's default one if None.
        device: Of the result.
        dtype: Of the result.

    Returns:
        ``lam`` of shape ``(rank,)`` and unit factors ``(size_n, rank)``.

    Source: Pan et al. 2022, arXiv:2205.15307 (fan-in and fan-out rules); the
    unit-column form is re-derived from them, not read in the paper.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    factors = [random_units(n, rank, generator, like) for n in shape if n > 1]
    # For O = I = 1 the kernel is Σ ±λ: the sign is all the randomness there is.
    signs = 1 if factors else random_units(1, rank, generator, like)[0]
    channels = {"fan_in": shape[0], "fan_out": shape[1] * groups}[mode]
    lam = like.new_full((rank,), math.sqrt(channels / (PHI[nonlinearity] * rank)))
    return lam * signs, factors


def gaussian(shape: Sequence[int], rank: int, **options: Any) -> CPForm:
    """Columns with entries ~ N(0, 2/R), at unit length, λ = 1: the Gaussian start.

    The paper's forward normalises the columns, which cancels the 2/R: the kernel has
    variance ``R / (O·I·K_h·K_w)`` whatever the activation needs.

    Args: see `unified`. Source: Veeramacheneni et al. 2022, arXiv:2206.01509.
    """
    lam, draws = _drawn("normal_", shape, rank, **options)
    return lam, normalize_columns(draws)[0] if draws else []


def uniform(shape: Sequence[int], rank: int, **options: Any) -> CPForm:
    """Columns with entries ~ U(±√(6/R)), at unit length, λ = 1: the uniform start.

    The kernel's variance is that of `gaussian`.

    Args: see `unified`. Source: Veeramacheneni et al. 2022, arXiv:2206.01509.
    """
    lam, draws = _drawn("uniform_", shape, rank, **options)
    return lam, normalize_columns([2 * d - 1 for d in draws])[0] if draws else []


def _drawn(
    kind: str,
    shape: Sequence[int],
    rank: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **_: Any,
) -> CPForm:
    like = torch.empty(0, device=device, dtype=dtype)
    draws = [draw(kind, (n, rank), generator, like) for n in shape if n > 1]
    return like.new_ones(rank), draws


def power(shape: Sequence[int], rank: int, **options: Any) -> CPForm:
    """`power_method` on the dense weight, or on torch's default start for the shape.

    Rescaled to the norm of that weight. Args: see `unified`. Source: Veeramacheneni et
    al. 2022, arXiv:2206.01509.
    """
    return _fitted(power_method, shape, rank, **options)


def fitted_als(shape: Sequence[int], rank: int, **options: Any) -> CPForm:
    """`als` on the dense weight, or on torch's default start for the shape.

    Rescaled to the norm of that weight. Args: see `unified`. Source: Kolda & Bader
    2009, doi:10.1137/07070111X.
    """
    return _fitted(als, shape, rank, **options)


INITIALIZERS: dict[str, Callable[..., CPForm]] = {
    "unified": unified,
    "gaussian": gaussian,
    "uniform": uniform,
    "power": power,
    "als": fitted_als,
}


FITS = (power, fitted_als)  # of a kernel, where there is one


def resolve_init(init: str | Callable[..., CPForm]) -> Callable[..., CPForm]:
    """Look an initialiser up by name; a callable is passed through."""
    if callable(init):
        return init
    if init not in INITIALIZERS:
        raise ValueError(
            f"init is {init!r}, expected one of {sorted(INITIALIZERS)} or a function "
            "with the signature of cpnb.initializers.unified."
        )
    return INITIALIZERS[init]


def dense_start(
    size: Sequence[int], fan_in: int, generator: torch.Generator | None, like: Tensor
) -> Tensor:
    """Torch's default start of a kernel or bias, U(±1/√fan_in)."""
    return (2 * draw("uniform_", size, generator, like) - 1) / math.sqrt(fan_in)


def draw(
    kind: str, size: Sequence[int], generator: torch.Generator | None, like: Tensor
) -> Tensor:
    """Draw by a method such as ``"normal_"``, in float64 where the generator lives.

    The result has the device and dtype of ``like``, and shape ``size``.
    """
    device = generator.device if generator is not None else like.device
    empty = torch.empty(tuple(size), device=device, dtype=torch.float64)
    return getattr(empty, kind)(generator=generator).to(like)


def _fitted(
    method: Callable[..., Any],
    shape: Sequence[int],
    rank: int,
    *,
    weight: Tensor | None = None,
    groups: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CPForm:
    if weight is None:
        like = torch.empty(0, device=device, dtype=dtype)
        weight = dense_start(shape, math.prod(shape[1:]), generator, like)
    weight = weight.detach().to(device=device, dtype=dtype)
    kernel = weight.reshape([n for n in shape if n > 1])
    if kernel.ndim > 1 and kernel.any():
        result = method(kernel, rank, generator=generator)
        norm = rebuild(result.lam, result.factors).norm()
        return result.lam * (kernel.norm() / norm), result.factors
    # A number or a vector is its own first component; a zero kernel has none.
    lam = kernel.new_zeros(rank)
    lam[0] = kernel.norm() if kernel.ndim else kernel
    factors = [random_units(n, rank, generator, kernel) for n in kernel.shape]
    if kernel.ndim and kernel.any():
        factors[0][:, 0] = kernel / lam[0]
    return lam, factors
