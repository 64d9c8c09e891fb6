"""Starts for a CP kernel: from nothing (random) or from a dense kernel (fitted).

Every initialiser has one signature,
``f(shape, rank, *, weight, groups, generator, device, dtype) -> (lam, factors)``, and
returns one factor per mode of size > 1. `CPConv2d(..., init=...)` takes a name from
`INITIALIZERS` or any such function, for example
``functools.partial(cpnb.unified, mode="fan_out")``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cpnb._checks import check_count
from cpnb.als import als
from cpnb.decomposition import power_method, random_units
from cpnb.unified import reproducing_transformation

CPForm = tuple[Tensor, list[Tensor]]


def unified(
    shape: Sequence[int],
    rank: int,
    *,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: Literal["relu", "linear"] = "relu",
    weight: Tensor | None = None,
    groups: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CPForm:
    """Random unit columns with one λ that gives the *rebuilt* kernel its variance.

    ``λ = √(O/(φR))`` for fan-in and ``√(I/(φR))`` for fan-out, φ = ½ for ReLU and 1 for
    linear, so that ``Var(W) = 1/(φ·fan)``: Kaiming's variance, at every rank.

    Args:
        shape: Kernel shape ``(out, in / groups, *kernel_size)``.
        rank: Number of components R.
        mode: Keep the variance of activations (``"fan_in"``) or of gradients.
        nonlinearity: What follows the layer.
        weight: Ignored; here because fitted starts use it.
        groups: Groups of the convolution.
        generator: Source of randomness; torch's default one if None.
        device: Of the result.
        dtype: Of the result.

    Returns:
        ``lam`` of shape ``(rank,)`` and unit factors ``(size_n, rank)``.

    Raises:
        TypeError: If ``rank`` is no int.
        ValueError: If ``rank`` or a size is below 1, or a name unknown.

    Source: Pan et al. 2022, arXiv:2205.15307 (fan-in and fan-out rules); the
    unit-column form is re-derived from them, not read in the paper.
    """
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f'mode is {mode!r}, expected "fan_in" or "fan_out".')
    if nonlinearity not in ("relu", "linear"):
        raise ValueError(
            f'nonlinearity is {nonlinearity!r}, expected "relu" or "linear".'
        )
    like = torch.empty(0, device=device, dtype=dtype)
    factors = [random_units(n, rank, generator, like) for n in _sizes(shape, rank)]
    # For O = I = 1 the kernel is Σ ±λ: the sign is all the randomness there is.
    signs = 1 if factors else random_units(1, rank, generator, like)[0]
    # Fan-out is fan-in of the convolution that the backward pass is equivalent to.
    backward = reproducing_transformation(shape, groups=groups)
    channels = (shape if mode == "fan_in" else backward)[0]
    phi = 0.5 if nonlinearity == "relu" else 1.0
    lam = like.new_full((rank,), math.sqrt(channels / (phi * rank)))
    return lam * signs, factors


def gaussian(
    shape: Sequence[int],
    rank: int,
    *,
    weight: Tensor | None = None,
    groups: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CPForm:
    """Factor entries ~ N(0, 2/R), λ = 1: the paper's Gaussian start.

    Columns are normalised in the forward, which cancels the 2/R: the rebuilt kernel has
    variance ``R / (O·I·K_h·K_w)`` whatever the activation needs.

    Args: see `unified`. Source: Veeramacheneni et al. 2022, arXiv:2206.01509.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    draws = [_draw("normal_", n, rank, generator, like) for n in _sizes(shape, rank)]
    factors = [draw * math.sqrt(2 / rank) for draw in draws]
    return like.new_ones(rank), factors


def uniform(
    shape: Sequence[int],
    rank: int,
    *,
    weight: Tensor | None = None,
    groups: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CPForm:
    """Factor entries ~ U(−√(6/R), √(6/R)), λ = 1: the paper's uniform start.

    The rebuilt kernel's variance is that of `gaussian`, to within the column norms'
    fluctuation.

    Args: see `unified`. Source: Veeramacheneni et al. 2022, arXiv:2206.01509.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    draws = [_draw("uniform_", n, rank, generator, like) for n in _sizes(shape, rank)]
    bound = math.sqrt(6 / rank)
    return like.new_ones(rank), [(2 * draw - 1) * bound for draw in draws]


def power(shape: Sequence[int], rank: int, **options: Any) -> CPForm:
    """`power_method` on the dense weight, or on torch's default start for the shape.

    Args: see `unified`. Source: Veeramacheneni et al. 2022, arXiv:2206.01509.
    """
    return _fitted(power_method, shape, rank, **options)


def fitted_als(shape: Sequence[int], rank: int, **options: Any) -> CPForm:
    """`als` on the dense weight, or on torch's default start for the shape.

    Args: see `unified`. Source: Kolda & Bader 2009, doi:10.1137/07070111X.
    """
    return _fitted(als, shape, rank, **options)


INITIALIZERS: dict[str, Callable[..., CPForm]] = {
    "unified": unified,
    "gaussian": gaussian,
    "uniform": uniform,
    "power": power,
    "als": fitted_als,
}


def resolve_init(init: str | Callable[..., CPForm]) -> Callable[..., CPForm]:
    """Look an initialiser up by name; a callable is passed through.

    Raises:
        ValueError: If the name is unknown.
    """
    if callable(init):
        return init
    if init not in INITIALIZERS:
        raise ValueError(
            f"init is {init!r}, expected one of {sorted(INITIALIZERS)} or a function "
            "with the signature of cpnb.unified."
        )
    return INITIALIZERS[init]


def dense_start(
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Torch's default start for conv and linear layers, U(±1/√fan_in)."""
    like = torch.empty(0, device=device, dtype=dtype)
    fan_in = math.prod(shape[1:])
    draw = _draw("uniform_", shape[0], fan_in, generator, like)
    return ((2 * draw - 1) / math.sqrt(fan_in)).view(tuple(shape))


def dense_bias(
    shape: Sequence[int], generator: torch.Generator | None, like: Tensor
) -> Tensor:
    """Torch's default start for the bias of a layer with this kernel, U(±1/√fan_in)."""
    draw = _draw("uniform_", 1, shape[0], generator, like)[0]
    return (2 * draw - 1) / math.sqrt(math.prod(shape[1:]))


def _sizes(shape: Sequence[int], rank: int) -> list[int]:
    """Sizes of the modes that carry a factor, after a check of both arguments."""
    check_count(rank, "rank")
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"shape is {tuple(shape)}, expected (out, in / groups, *kernel_size), "
            "every size >= 1."
        )
    return [n for n in shape if n > 1]


def _draw(
    kind: str, size: int, count: int, generator: torch.Generator | None, like: Tensor
) -> Tensor:
    device = generator.device if generator is not None else like.device
    empty = torch.empty(size, count, device=device, dtype=torch.float64)
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
        weight = dense_start(shape, generator, device, dtype)
    weight = weight.detach().to(device=device, dtype=dtype)
    sizes = _sizes(shape, rank)
    if not sizes:  # one number, no direction to fit: the first component holds it
        lam = torch.zeros(rank, device=weight.device, dtype=weight.dtype)
        lam[0] = weight.flatten()[0]
        return lam, []
    kernel = weight.reshape(sizes)
    if kernel.ndim > 1 and kernel.any():
        result = method(kernel, rank, generator=generator)
        return result.lam, result.factors
    # A vector is its own first component; a zero kernel has none, only directions.
    lam = kernel.new_zeros(rank)
    factors = [random_units(n, rank, generator, kernel) for n in sizes]
    if kernel.any():
        lam[0] = kernel.norm()
        factors[0][:, 0] = kernel / lam[0]
    return lam, factors
