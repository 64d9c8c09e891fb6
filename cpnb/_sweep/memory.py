"""How much memory tensors take while something runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1 << 20


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes held at once by the tensors made within the block.

    Tensors that were there before do not count, nor does the scratch space that a
    library takes inside of an operation.

    Attributes:
        bytes: The largest number so far.
    """

    def __init__(self) -> None:
        """Start at nothing."""
        super().__init__()
        self.bytes = self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it returns."""
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and _storage(tensor) not in given | self._known:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        self._known.add(pointer)
        self._held += size
        self.bytes = max(self.bytes, self._held)
        weakref.finalize(storage, self._released, pointer, size)

    def _released(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self._held -= size


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes at the peak of a call, see `PeakMemory`."""
    with PeakMemory() as peak, torch.no_grad():
        run()
    return peak.bytes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
