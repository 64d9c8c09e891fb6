"""The outputs of one CP layer at many ranks, from one pass over its components."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cpnb.ranked import RankedLayer


class ConvFan:
    """A CP convolution at ascending ranks: a running sum over its components.

    The outputs of the components, before they are mixed, are computed once per batch.
    The sum is kept as a matrix of positions by channels, so that a component more is a
    rank-one update. With max pooling after the layer (and what is monotone and acts
    element by element between them) the positions of each window are kept apart, and
    pooling is the largest of a few rows.

    Args:
        ranked: The layer, with its components in order.
        pool: Window of the pooling to include, one size per spatial axis.
    """

    def __init__(self, ranked: RankedLayer, pool: Sequence[int] = ()) -> None:
        """Bring λ and the output factor together."""
        self._ranked = ranked
        self._pool = tuple(pool) or (1,) * len(ranked.layer.kernel_size)
        self._pooling = math.prod(self._pool) > 1
        self._grouped = ranked.layer.groups > 1
        # (groups, rank, out / groups): rows are what a component adds to the channels.
        output = ranked.factors[0].unflatten(0, (ranked.layer.groups, -1))
        self._mix = output.transpose(1, 2).contiguous()
        self._weighted = self._mix * self._row(ranked.layer.rank)

    def start(self, images: Tensor, top: int) -> None:
        """Take a batch of inputs, to be evaluated at ranks up to ``top``."""
        factors = [factor[:, :top] for factor in self._ranked.factors[1:]]
        branches = self._ranked.layer.branches(images, factors)
        batch, groups, _, *size = branches.shape
        axes = range(len(size))
        pooled = [n // window for n, window in zip(size, self._pool, strict=True)]
        for axis, window, n in zip(axes, self._pool, pooled, strict=True):
            branches = branches.narrow(3 + axis, 0, n * window)
        windows = branches.reshape(
            *(batch, groups, top),
            *(n for pair in zip(pooled, self._pool, strict=True) for n in pair),
        )
        places = [4 + 2 * axis for axis in axes], [3 + 2 * axis for axis in axes]
        self._branches = windows.permute(1, 2, *places[0], 0, *places[1]).reshape(
            groups, top, -1
        )
        self._shape = batch, *pooled
        self._rank = 0
        self._sum = self._bias(self._branches.shape[2])

    @property
    def sum_bytes(self) -> int:
        """Size of the running sum, for one image."""
        return self._sum.numel() * self._sum.element_size() // self._shape[0]

    def outputs(self, ranks: Sequence[int]) -> Tensor:
        """The layer, pooled, at ascending ranks from the last call's upward.

        Args:
            ranks: At least one.

        Returns:
            Shape ``(ranks · batch, out, *size)``, the ranks outermost.
        """
        batch, *size = self._shape
        channels = self._ranked.layer.kernel_shape[0]
        windows = self._sum.view(math.prod(self._pool), -1, channels)
        out = windows.new_empty(len(ranks), *windows.shape[1:])
        for slot, rank in zip(out, ranks, strict=True):
            self._advance(rank)
            if self._pooling:
                torch.amax(windows, 0, out=slot)
            else:
                slot.copy_(windows[0])
        return out.view(len(ranks) * batch, *size, channels).movedim(-1, 1)

    def _advance(self, rank: int) -> None:
        """Bring the running sum to a rank."""
        if rank == self._rank:
            return
        new, weighted = slice(self._rank, rank), self._weighted
        if self._ranked.refit:  # every λ has changed
            new, weighted = slice(rank), self._mix[:, :rank] * self._row(rank)
            self._sum.copy_(self._bias(len(self._sum)))
        self._rank = rank
        if self._grouped:
            branches = self._branches[:, new].transpose(1, 2)
            added = torch.bmm(branches, weighted[:, new])
            self._sum += added.transpose(0, 1).flatten(1)
        else:
            self._sum.addmm_(self._branches[0, new].T, weighted[0, new])

    def _row(self, rank: int) -> Tensor:
        return self._ranked.lam(rank).to(self._mix.dtype)[:, None]

    def _bias(self, positions: int) -> Tensor:
        layer = self._ranked.layer
        bias = self._mix.new_zeros(()) if layer.bias is None else layer.bias.detach()
        return bias.expand(positions, layer.kernel_shape[0]).clone()


class LinearFan:
    """A CP linear layer at many ranks: λ that do not count set to zero.

    ``((x·B) ∘ λ_k)·Aᵀ`` is one matrix product for all ranks k.

    Args:
        ranked: The layer, with its components in order.
    """

    def __init__(self, ranked: RankedLayer) -> None:
        """Take the layer."""
        self._ranked = ranked

    def start(self, features: Tensor, top: int) -> None:
        """Take a batch of inputs, to be evaluated at ranks up to ``top``."""
        self._hidden = (features @ self._ranked.factors[1][:, :top])[None]

    def outputs(self, ranks: Sequence[int]) -> Tensor:
        """The layer at some ranks. Shape ``(ranks · batch, ..., out)``."""
        return self._mixed(self._hidden, ranks)

    def each(self, input: Tensor, ranks: Sequence[int]) -> Tensor:
        """The layer at some ranks, each on inputs of its own.

        Args:
            input: Shape ``(ranks · batch, ..., in)``, the ranks outermost.
            ranks: At least one.

        Returns:
            Shape ``(ranks · batch, ..., out)``.
        """
        hidden = input @ self._ranked.factors[1][:, : max(ranks)]
        return self._mixed(hidden.unflatten(0, (len(ranks), -1)), ranks)

    def _mixed(self, hidden: Tensor, ranks: Sequence[int]) -> Tensor:
        top = hidden.shape[-1]
        lam = hidden.new_zeros(len(ranks), top)
        for row, rank in zip(lam, ranks, strict=True):
            row[:rank] = self._ranked.lam(rank)
        lam = lam.view(len(ranks), *(1,) * (hidden.ndim - 2), top)
        mixed = (hidden * lam).flatten(0, 1) @ self._ranked.factors[0][:, :top].T
        bias = self._ranked.layer.bias
        return mixed if bias is None else mixed + bias.detach()


Fan = ConvFan | LinearFan
