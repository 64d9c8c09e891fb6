"""What every CP layer is: σ, λ and factor matrices that stand for one kernel."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from cpnb.conversion import convert_layer, stock_layer
from cpnb.costs import ForwardCost, forward_cost
from cpnb.cp import normalize_columns
from cpnb.execution import KernelCache, build_kernel, fold_norms
from cpnb.initializers import CPForm, dense_bias, resolve_init
from cpnb.ranks import (
    ModelRule,
    Rank,
    adopt_rank,
    break_even_rank,
    cp_parameters,
    resolve_rank,
)

FORWARD_MODES = ("auto", "dense", "chain")


class CPLayer(nn.Module):
    """Base of the CP layers: ``weight = σ Σ_r λ_r â_r∘b̂_r∘…`` with unit columns.

    Attributes:
        scale: Global scale σ. Scalar parameter.
        lam: Component weights λ, any sign. Shape ``(rank,)``.
        factors: One factor matrix per mode of size > 1. Shapes ``(size_n, rank)``.
        bias: Shape ``(out,)``, or None.
        kernel_shape: Shape of the full kernel, ``(out, in / groups, *kernel_size)``.
        signed: If False, |λ| is used, as the paper's released code does.
        active_rank: Number of leading components that `forward` and `weight` use; all
            if None. `cpnb.NestedRank` sets it for one training step at a time; it is in
            no checkpoint.
    """

    _stock: type[nn.Module]  # the torch layer this one stands for
    groups = 1
    active_rank: int | None = None

    def _build(
        self,
        kernel_shape: Sequence[int],
        *,
        rank: Rank,
        init: str | Callable[..., CPForm],
        forward_mode: str,
        signed: bool,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ) -> None:
        like = torch.empty(0, device=device, dtype=dtype)
        if not like.is_floating_point():
            raise TypeError(f"dtype is {dtype}, expected a floating-point dtype.")
        self.kernel_shape = tuple(kernel_shape)
        self.forward_mode = forward_mode
        self.signed = signed
        self._init = resolve_init(init)
        count = resolve_rank(rank, self.kernel_shape)
        self.scale = nn.Parameter(like.new_empty(()))
        self.lam = nn.Parameter(like.new_empty(count))
        sizes = [n for n in self.kernel_shape if n > 1]
        self.factors = nn.ParameterList(
            [nn.Parameter(like.new_empty(n, count)) for n in sizes]
        )
        self.register_parameter(
            "bias", nn.Parameter(like.new_empty(self.kernel_shape[0])) if bias else None
        )
        self._cache = KernelCache()
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw a new start of the same rank; the bias as torch's own layers do."""
        lam, factors = self._init(
            self.kernel_shape,
            self.rank,
            groups=self.groups,
            generator=generator,
            device=self.lam.device,
            dtype=self.lam.dtype,
        )
        self.scale.fill_(1.0)
        self.lam.copy_(lam)
        for old, new in zip(self.factors, factors, strict=True):
            old.copy_(new)
        if self.bias is not None:
            self.bias.copy_(dense_bias(self.kernel_shape, generator, self.bias))

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.lam.numel()

    @property
    def break_even_rank(self) -> int:
        """R_same: rank with as many parameters as the dense layer."""
        return break_even_rank(self.kernel_shape)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense layer, bias included."""
        bias = 0 if self.bias is None else self.bias.numel()
        return math.prod(self.kernel_shape) + bias

    def parameters_at(self, rank: int) -> int:
        """Parameters this layer holds at another rank, bias included."""
        bias = 0 if self.bias is None else self.bias.numel()
        return cp_parameters(self.kernel_shape, rank) + bias

    @property
    def forward_mode(self) -> str:
        """``"auto"``, ``"dense"`` (rebuild the kernel) or ``"chain"``."""
        return self._forward_mode

    @forward_mode.setter
    def forward_mode(self, mode: str) -> None:
        if mode not in FORWARD_MODES:
            raise ValueError(
                f"forward_mode is {mode!r}, expected one of {FORWARD_MODES}."
            )
        self._forward_mode = mode

    def explain(self, input: Tensor | Sequence[int] | None = None) -> str:
        """Say which forward ``"auto"`` takes for an input, and what each would cost.

        Args:
            input: A tensor or its shape; None compares per output position, as for an
                input so large that rebuilding the kernel costs nothing.

        Returns:
            A few lines of text.
        """
        shape = input.shape if isinstance(input, Tensor) else input
        return self.cost(shape).describe(self, shape)

    def cost(self, shape: Sequence[int] | None) -> ForwardCost:
        """Estimated cost of both forwards for an input of this shape."""
        raise NotImplementedError

    def _choose(self, shape: Sequence[int]) -> str:
        if self.forward_mode != "auto":
            return self.forward_mode
        # A compiled or exported graph must not depend on the batch size.
        return self.cost(None if torch.compiler.is_compiling() else shape).mode

    def _cost(self, rows: int, rows_in: int) -> ForwardCost:
        return forward_cost(
            self.kernel_shape,
            self.active_rank or self.rank,
            rows=rows,
            rows_in=rows_in,
            groups=self.groups,
            training=torch.is_grad_enabled(),
            cached=self._reuses_kernel,
        )

    @classmethod
    def from_layer(
        cls,
        layer: nn.Module,
        *,
        rank: Rank | ModelRule,
        init: str | Callable[..., CPForm] = "power",
        generator: torch.Generator | None = None,
    ) -> Self:
        """Put a stock layer into CP form; see `cpnb.from_layer`."""
        return convert_layer(cls, layer, rank=rank, init=init, generator=generator)

    def to_dense(self) -> nn.Module:
        """The stock torch layer with the same kernel, device and dtype."""
        return stock_layer(self)

    @staticmethod
    def _arguments(layer: nn.Module) -> tuple:
        """Positional arguments that rebuild ``layer``, stock or CP."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The full kernel, rebuilt and differentiable. Shape ``kernel_shape``."""
        return self._rebuild(channels_last=False)

    def components(
        self, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """λ with σ folded in, and the unit-column factors (modes of size > 1).

        Args:
            dtype: To compute in and return; the parameters' own if None.
        """
        factors = [factor.to(dtype) for factor in self.factors]
        units = normalize_columns(factors)[0] if factors else []
        return (self._signed_lam(self.lam) * self.scale).to(dtype), units

    def _signed_lam(self, lam: Tensor) -> Tensor:
        return lam if self.signed else lam.abs()

    def _folded(self) -> tuple[Tensor, list[Tensor]]:
        """σλ over all column norms, and the stored factors; active components only."""
        lam, factors = self._unscaled()
        return lam * self.scale, factors

    def _unscaled(self) -> tuple[Tensor, list[Tensor]]:
        """The same without σ."""
        lam, factors = self.lam, list(self.factors)
        if self.active_rank is not None:
            kept = slice(self.active_rank)
            lam, factors = lam[kept], [factor[:, kept] for factor in factors]
        return fold_norms(self._signed_lam(lam), factors), factors

    def _rebuild(self, channels_last: bool) -> Tensor:
        return build_kernel(*self._folded(), self.kernel_shape, channels_last)

    def _kernel(self, channels_last: bool = False) -> Tensor:
        """The kernel for a forward pass; in eval mode kept between calls where safe."""
        if not self._reuses_kernel:
            return self._rebuild(channels_last)
        parameters = [self.scale, self.lam, *self.factors]
        return self._cache.get(
            parameters, channels_last, lambda: self._rebuild(channels_last)
        )

    @property
    def _reuses_kernel(self) -> bool:
        return (
            not self.training
            and self.active_rank is None
            and KernelCache.usable(self.lam)
        )

    def _resize(self, rank: int) -> None:
        """Make room for another rank; the values are left for the caller to fill."""
        self.lam = nn.Parameter(self.lam.new_empty(rank), self.lam.requires_grad)
        for n, f in enumerate(self.factors):
            self.factors[n] = nn.Parameter(f.new_empty(len(f), rank), f.requires_grad)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Adopt the rank of a checkpoint whose other sizes are those of this layer."""
        adopt_rank(self, state_dict, prefix, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        """One line: the factors are sizes the reader can work out."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Rank against break-even, and what differs from the defaults."""
        share = self.rank / self.break_even_rank
        text = f"rank={self.rank} ({share:.2f} of break-even {self.break_even_rank})"
        if self.forward_mode != "auto":
            text += f", forward_mode={self.forward_mode!r}"
        return text if self.signed else f"{text}, signed=False"
