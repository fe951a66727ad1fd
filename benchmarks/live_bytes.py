"""Bytes of live tensors: what a step holds at its peak, whatever the allocator makes of it; fake tensors count too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts each storage once, from the operation that makes it until it is freed; those alive at the start too."""

    def __init__(self, *, with_present: bool = True) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}
        if with_present:
            gc.collect()  # what nobody holds but itself is not alive
            for thing in gc.get_objects():
                if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
                    self._see(thing.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            return
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that is alive at once while a step is taken."""
    with LiveBytes() as memory:
        step()
    return memory.peak
