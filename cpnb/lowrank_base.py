"""What every low-rank layer is: two matrices, or three, that stand for one kernel."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from cpnb._checks import check_kernel
from cpnb.conversion import copy_bias, refusal, stock_layer
from cpnb.initializers import dense_bias
from cpnb.matrices import (
    Factors,
    fold,
    matrix_break_even,
    matrix_rank,
    resolve_matrix_init,
    unfold,
    unfolded_shape,
)
from cpnb.ranks import Rank


class LowRankLayer(nn.Module):
    """Base of the low-rank layers: the unfolded kernel is ``U Vᵀ``, or ``U M Vᵀ``.

    A kernel is unfolded to rows (out, height) and columns (in, width); a linear weight
    is its own unfolding. Groups have matrices of their own, stored below each other.

    Attributes:
        left: U. Shape ``(out · height, rank)``.
        middle: M, or None. Shape ``(groups · rank, rank)``.
        right: V. Shape ``(in · width, rank)``.
        bias: Shape ``(out,)``, or None.
        kernel_shape: Shape of the full kernel, ``(out, in / groups, *kernel_size)``.
    """

    _stock: type[nn.Module]  # the torch layer this one stands for
    groups = 1

    def _build(
        self,
        kernel_shape: Sequence[int],
        *,
        rank: Rank,
        init: str | Callable[..., Factors],
        middle: bool,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ) -> None:
        like = torch.empty(0, device=device, dtype=dtype)
        if not like.is_floating_point():
            raise TypeError(f"dtype is {dtype}, expected a floating-point dtype.")
        self.kernel_shape = tuple(kernel_shape)
        self._init = resolve_matrix_init(init)
        rows, columns = shape = unfolded_shape(kernel_shape, self.groups)
        self.rank = clipped_rank(matrix_rank(rank, shape, middle=middle), shape)

        def matrix(size: int) -> nn.Parameter:
            return nn.Parameter(like.new_empty(self.groups * size, self.rank))

        self.left = matrix(rows)
        self.middle = matrix(self.rank) if middle else None
        self.right = matrix(columns)
        self.bias = nn.Parameter(like.new_empty(kernel_shape[0])) if bias else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw a new start, M as the identity; the bias as torch's own layers do."""
        left, right = self._init(
            self.kernel_shape,
            self.rank,
            groups=self.groups,
            generator=generator,
            like=self.left,
        )
        self.left.copy_(left.flatten(0, 1))
        self.right.copy_(right.flatten(0, 1))
        if self.middle is not None:
            self.middle.copy_(torch.eye(self.rank).repeat(self.groups, 1))
        if self.bias is not None:
            self.bias.copy_(dense_bias(self.kernel_shape, generator, self.bias))

    @property
    def matrices(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """U, M or None, and V of each group. Shapes ``(groups, size, rank)``."""
        left, middle, right = (
            None if matrix is None else matrix.view(self.groups, -1, self.rank)
            for matrix in (self.left, self.middle, self.right)
        )
        return left, middle, right

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """U and ``V Mᵀ`` of each group, whose product is the unfolded kernel."""
        left, middle, right = self.matrices
        return left, right if middle is None else right @ middle.mT

    @property
    def weight(self) -> Tensor:
        """The full kernel, multiplied out and differentiable. Shape ``kernel_shape``.

        It is read-only; the layer itself never forms it.
        """
        left, right = self.pair
        return fold(left @ right.mT, self.kernel_shape)

    @property
    def break_even_rank(self) -> int:
        """Rank with as many parameters as the dense layer."""
        shape = unfolded_shape(self.kernel_shape, self.groups)
        return matrix_break_even(*shape, middle=self.middle is not None)

    @classmethod
    def from_layer(
        cls,
        layer: nn.Module,
        *,
        rank: Rank,
        init: str | Callable[..., Factors] = "spectral",
        middle: bool = False,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Put a stock layer into low-rank form; the source is not touched.

        Geometry, device, dtype, training flag and a copy of the bias are kept.

        Args:
            layer: An `nn.Conv2d` for `LowRankConv2d`, an `nn.Linear` for
                `LowRankLinear`.
            rank: As in `LowRankConv2d`, or a rule such as ``FitRank(0.1)``, on the
                singular values.
            init: ``"spectral"`` splits the layer's kernel; ``"kaiming"`` keeps only
                its shape.
            middle: As in `LowRankConv2d`.
            generator: Source of randomness; torch's default one if None.

        Returns:
            The low-rank layer, with the same kernel where ``init`` is ``"spectral"``
            and the rank that of its unfolding.

        Raises:
            TypeError: If the layer is of another type, parametrized or has hooks.
            ValueError: If its kernel is not finite, or ``rank`` or ``init`` is wrong.
        """
        reason = refusal(layer)
        if reason is None and type(layer) is not cls._stock:
            reason = f"expected a {cls._stock.__name__} for {cls.__name__}"
        if reason:
            raise TypeError(f"layer is a {type(layer).__name__}: {reason}.")
        check_kernel(layer.weight, "layer.weight")
        start = resolve_matrix_init(init)
        matrices = unfold(layer.weight.detach(), getattr(layer, "groups", 1))
        shape = matrices.shape[1:]
        count = matrix_rank(rank, shape, matrices, middle=middle)
        new = cls(
            *cls._arguments(layer),
            rank=clipped_rank(count, shape, stacklevel=3),
            init=functools.partial(start, weight=layer.weight),
            middle=middle,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
            generator=generator,
        )
        new._init = start
        for name in ("left", "middle", "right"):
            if getattr(new, name) is not None:
                getattr(new, name).requires_grad_(layer.weight.requires_grad)
        copy_bias(layer.bias, new.bias)
        return new.train(layer.training)

    def to_dense(self) -> nn.Module:
        """The stock torch layer with the same kernel, device and dtype."""
        return stock_layer(self)

    @staticmethod
    def _arguments(layer: nn.Module) -> tuple:
        """Positional arguments that rebuild ``layer``, stock or low-rank."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Rank against break-even, and whether there is an M."""
        share = self.rank / self.break_even_rank
        text = f"rank={self.rank} ({share:.2f} of break-even {self.break_even_rank})"
        return text if self.middle is None else f"{text}, middle=True"


def clipped_rank(
    rank: int, shape: Sequence[int], name: str = "the layer", *, stacklevel: int = 4
) -> int:
    """The rank, or with a warning the largest that a matrix of this shape can have."""
    full = min(shape)
    if rank > full:
        warnings.warn(
            f"rank is {rank}, but the unfolded kernel of {name} is a {tuple(shape)} "
            f"matrix: the rank becomes {full}. Columns beyond it would be dead weight.",
            stacklevel=stacklevel,
        )
    return min(rank, full)
