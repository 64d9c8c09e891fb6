"""One check per concept: argument, expected, got, next step."""

import math
import operator
from collections.abc import Sequence
from numbers import Real

from torch import Tensor, nn


def check_count(value: int, name: str, least: int = 1, hint: str = "") -> int:
    """A whole number of at least ``least``, also from numpy, as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}, expected an int >= {least}.{hint}")
    if operator.index(value) < least:
        raise ValueError(f"{name} is {value}, expected at least {least}.{hint}")
    return operator.index(value)


def check_strength(value: float, name: str) -> float:
    """A finite number of at least 0, also from numpy, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, expected a number >= 0.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number >= 0.")
    return float(value)


def check_positive(value: float, name: str) -> float:
    """A finite number above 0, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, expected a number above 0.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number above 0.")
    return float(value)


def check_module(model: nn.Module, name: str = "model") -> None:
    """Raise unless ``model`` is a torch module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name} is a {type(model).__name__}, expected a torch.nn.Module."
        )


def check_floating(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, expected a torch.Tensor. "
            "Convert it with torch.as_tensor."
        )
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected a floating-point dtype. "
            f"Convert it with {name}.float()."
        )


def check_kernel(kernel: Tensor, name: str = "kernel") -> None:
    """Raise unless ``kernel`` is a finite floating-point tensor of order ≥ 1."""
    check_floating(kernel, name)
    if not kernel.ndim or not kernel.numel():
        raise ValueError(
            f"{name} has shape {tuple(kernel.shape)}, expected at least one mode and "
            "no empty one."
        )
    if not kernel.isfinite().all():
        bad = int((~kernel.isfinite()).sum())
        raise ValueError(
            f"{name} has {bad} NaN or infinite entries out of {kernel.numel()}, "
            "expected finite values. Check the training run or file it came from."
        )


def check_same_dtype(lam: Tensor, factors: Sequence[Tensor]) -> None:
    """Raise unless all tensors share one dtype."""
    for n, factor in enumerate(factors):
        if factor.dtype != lam.dtype:
            raise TypeError(
                f"factors[{n}] has dtype {factor.dtype}, expected {lam.dtype} as lam. "
                f"Convert it with factors[{n}].to(lam.dtype)."
            )


def check_decomposable(kernel: Tensor) -> None:
    """Raise unless there is something to decompose: finite, order ≥ 2, not zero."""
    check_kernel(kernel)
    if kernel.ndim < 2:
        raise ValueError(
            f"kernel has shape {tuple(kernel.shape)}, expected at least two modes. A "
            "vector is its own decomposition."
        )
    if not kernel.any():
        raise ValueError(
            "kernel is zero everywhere, expected something to decompose. Use a random "
            "start such as cpnb.unified, or set λ to zero."
        )


def check_factors(factors: Sequence[Tensor]) -> None:
    if not len(factors):
        raise ValueError("factors is empty, expected one (size, rank) matrix per mode.")
    for n, factor in enumerate(factors):
        check_floating(factor, f"factors[{n}]")
        if factor.ndim != 2:
            raise ValueError(
                f"factors[{n}] has shape {tuple(factor.shape)}, expected two "
                "dimensions (size, rank)."
            )
        if factor.shape[1] != factors[0].shape[1]:
            raise ValueError(
                f"factors[{n}] has {factor.shape[1]} columns, expected rank "
                f"{factors[0].shape[1]} (from factors[0])."
            )


def check_cp(lam: Tensor, factors: Sequence[Tensor]) -> None:
    check_floating(lam, "lam")
    if lam.ndim != 1 or not lam.numel():
        raise ValueError(
            f"lam has shape {tuple(lam.shape)}, expected (rank,) with rank >= 1."
        )
    for n, factor in enumerate(factors):
        if isinstance(factor, Tensor) and factor.ndim == 2:
            rank, columns = lam.numel(), factor.shape[1]
            if columns != rank:
                raise ValueError(
                    f"factors[{n}] has {columns} columns, expected rank {rank} (from "
                    f"lam). Rebuild it with shape ({factor.shape[0]}, {rank})."
                )
    check_factors(factors)
    check_same_dtype(lam, factors)
