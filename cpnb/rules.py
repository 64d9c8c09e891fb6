"""Rules that look at a kernel to find its rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpnb._checks import check_kernel
from cpnb._diagnostics.spectra import entropy_rank
from cpnb.cp import rebuild
from cpnb.decomposition import power_method
from cpnb.ranks import KernelRule

_CHUNK = 16  # components to ask the power method for before looking again


@dataclass(frozen=True)
class FitRank(KernelRule):
    """The smallest rank whose greedy power-method fit is as close as asked.

    The greedy components are nested, so one decomposition, stopped in time, decides.
    With the same generator `power_method` reaches this error at this rank; `als`, whose
    terms are not nested, usually needs fewer components.

    Attributes:
        error: Relative error ``‖W − Ŵ‖/‖W‖`` to reach, in (0, 1).

    Raises:
        ValueError: If ``error`` is out of range.

    >>> FitRank(0.1).count(torch.diag(torch.tensor([9.0, 1.0, 0.1])))
    2
    """

    error: float

    def __post_init__(self) -> None:
        """Check the range."""
        _check_share(self.error, "error")

    def count(self, kernel: Tensor, *, generator: torch.Generator | None = None) -> int:
        """Smallest k with a greedy error of at most ``error``; see `KernelRule`."""
        return _greedy_count(self, kernel, self.error**2, generator)


@dataclass(frozen=True)
class EnergyRank(KernelRule):
    """The smallest rank whose greedy components hold a share of the kernel's energy.

    ``Σ_{r≤k} λ_r² ≥ share · ‖W‖²``: the rank of ``FitRank(√(1 − share))``, said the way
    singular values are usually cut.

    Attributes:
        share: Share of ``‖W‖²`` to hold, in (0, 1).

    Raises:
        ValueError: If ``share`` is out of range.

    >>> EnergyRank(0.99).count(torch.diag(torch.tensor([9.0, 1.0, 0.1])))
    2
    """

    share: float

    def __post_init__(self) -> None:
        """Check the range."""
        _check_share(self.share, "share")

    def count(self, kernel: Tensor, *, generator: torch.Generator | None = None) -> int:
        """Smallest k that holds ``share``; see `KernelRule`."""
        return _greedy_count(self, kernel, 1 - self.share, generator)


@dataclass(frozen=True)
class EffectiveRank(KernelRule):
    """The effective rank of the unfolding W₍₁₎ of shape (out, the rest), rounded.

    ``exp(−Σ p ln p)`` with ``p = s/Σs`` over its singular values s: how many equal ones
    would be as spread out. It needs no decomposition. It cannot exceed ``out``, where
    the CP rank of a convolution is far above, so it is a modest choice there.

    Source: Roy & Vetterli 2007, "The effective rank", EUSIPCO.

    >>> EffectiveRank().count(torch.eye(5))
    5
    """

    def count(self, kernel: Tensor, *, generator: torch.Generator | None = None) -> int:
        """Effective rank, at least 1; see `KernelRule`. It draws nothing."""
        check_kernel(kernel)
        wide = kernel.detach().double().flatten(1) if kernel.ndim > 1 else kernel[None]
        # The smaller Gram matrix has the same spectrum as a fat unfolding, for less.
        gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
        values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
        return max(1, round(entropy_rank(values).item()))


def _check_share(value: float, name: str) -> None:
    if isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(f"{name} is {value}, expected a number in (0, 1).")


def _greedy_count(
    rule: KernelRule, kernel: Tensor, rest: float, generator: torch.Generator | None
) -> int:
    """Smallest k whose greedy fit leaves at most ``rest · ‖W‖²``."""
    check_kernel(kernel)
    residual = kernel.detach().double()
    whole = residual.square().sum()
    if not whole or residual.ndim < 2:
        return 1
    if residual.ndim == 2:  # the power method's limit, from its singular values alone
        squares = torch.linalg.svdvals(residual).square()
        left = squares.flip(0).cumsum(0).flip(0)
        return max(1, int((left > rest * whole).sum()))
    # No kernel of this shape needs more components than this.
    most = residual.numel() // max(residual.shape)
    ahead = _read_ahead(generator, residual.device)
    for found in range(0, most, _CHUNK):
        fit = power_method(residual, min(_CHUNK, most - found), generator=ahead)
        left = residual.square().sum() - fit.lam.square().cumsum(0)
        enough = (left <= rest * whole).nonzero()
        if len(enough):
            return found + int(enough[0]) + 1
        residual = residual - rebuild(fit.lam, fit.factors)
    reached = (residual.square().sum() / whole).sqrt().item()
    raise ValueError(
        f"rank is {rule}, but the greedy power method leaves a relative error of "
        f"{reached:.3g} with {most} components, enough for an exact fit of any "
        f"kernel of shape {tuple(kernel.shape)}. Ask for less, or pass an int and fit "
        "with als."
    )


def _read_ahead(
    generator: torch.Generator | None, device: torch.device
) -> torch.Generator:
    """A generator that draws what ``generator`` will, and leaves that one alone."""
    if generator is None and device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
    elif generator is None:
        generator = torch.default_generator
    ahead = torch.Generator(generator.device)
    return ahead.set_state(generator.get_state())
