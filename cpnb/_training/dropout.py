"""Dropout that is a function of keys: the same for one network and for many at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_WHOLE_CHANNELS = (F.dropout1d, F.dropout2d, F.dropout3d)


class KeyedDropout(TorchFunctionMode):
    """Inside the block, torch's dropout draws its masks from two keys.

    A mask depends on the keys, on how many dropouts came before it in the block, and on
    the place in the tensor: not on a generator's state, on the device, or on whether
    `torch.vmap` runs many networks at once, each with keys of its own.

    Args:
        keys: Two random numbers, int32. Shape ``(2,)``.

    Source: the integer hash is C. Wellons' lowbias32,
    https://nullprogram.com/blog/2018/07/31/, with a key before each multiplication.
    """

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self._keys = keys
        self._calls = 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run torch's function, or ours in place of a dropout."""
        kwargs = kwargs or {}
        if function is F.dropout or function in _WHOLE_CHANNELS:
            return self._drop(function, *args, **kwargs)
        return function(*args, **kwargs)

    def _drop(
        self,
        function: Callable[..., Tensor],
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training or not 0 < p < 1:
            return function(input, p, training, inplace)
        shape = input.shape
        if function in _WHOLE_CHANNELS:
            shape = torch.Size([*shape[:2], *[1] * (input.ndim - 2)])
        kept = self._bits(shape) >= round(p * 2**32) - 2**31
        factor = kept.to(input.dtype) / (1 - p)
        return input.mul_(factor) if inplace else input * factor

    def _bits(self, shape: torch.Size) -> Tensor:
        """Random int32 over its whole range."""
        first, second = self._keys
        second = second * (2 * self._calls + 1)
        self._calls += 1
        places = torch.arange(shape.numel(), dtype=torch.int32, device=first.device)
        bits = places.view(shape) + first
        bits ^= bits.bitwise_right_shift(16).bitwise_and_(0xFFFF)
        bits *= 0x7FEB352D
        bits ^= bits.bitwise_right_shift(15).bitwise_and_(0x1FFFF)
        bits ^= second
        bits *= 0x846CA68B - 2**32
        return bits ^ bits.bitwise_right_shift(16).bitwise_and_(0xFFFF)
