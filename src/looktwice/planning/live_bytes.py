"""Bytes of live tensors: what a step holds at its peak, whatever the allocator makes of it; fake tensors count too.

Legend: N moments, K kinds of what is held.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Kind = Literal["weights", "adapters", "optimizer", "gradients", "activations", "pictures", "cache"]
KINDS: tuple[Kind, ...] = get_args(Kind)


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


Operation = tuple[str, int]
"""Its name, and the bytes of the largest storage it made: of one over a list of tensors that is one of a layer, too. A
small one counts as 0, since such as hold a number for each weight grow with the layers."""
SMALL = 2**13


class Moments(NamedTuple):
    """What was alive after each operation that made something: these [N], and bytes by kind [N, K] int64."""

    operations: list[Operation]
    live: np.ndarray


class Trace(LiveBytes):
    """Live bytes after each operation, by what they are for. What is made is of `kind`, until `call` gives it another.
    Nothing is written down before the first `section`; a section ends where the next begins."""

    def __init__(self) -> None:
        self.kind: Kind = "activations"
        self.count = 0
        self.numbers: dict[int, int] = {}
        self.kinds: list[int] = []
        self.made: list[tuple[int, int]] = []
        """Moment and size of each storage, by its number; a moment is the number of the operation that made it."""
        self.ended: dict[int, int] = {}
        self.operations: list[Operation] = []
        self.starts: list[int] = []
        super().__init__(with_present=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.count
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.count > before:
            largest = max(size for _, size in self.made[before:])
            self.operations.append((func.__name__, largest if largest >= SMALL else 0))
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        super()._see(storage)
        self.numbers[key] = self.count
        self.count += 1
        self.kinds.append(KINDS.index(self.kind))
        self.made.append((len(self.operations), self.sizes[key]))

    def _freed(self, key: int) -> None:
        super()._freed(key)
        self.ended[self.numbers.pop(key)] = len(self.operations)

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """Inside, what is made is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def call(self, kind: Kind, tensors: Iterable[Tensor | None]) -> None:
        """Say what these are for, from when they were made."""
        for tensor in tensors:
            number = None if tensor is None else self.numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self.kinds[number] = KINDS.index(kind)

    def section(self) -> None:
        """What follows is written down apart from what came before."""
        self.starts.append(len(self.operations))

    def sections(self) -> list[Moments]:
        """What was alive in each section, in order."""
        num_moments = len(self.operations) + 1
        change = np.zeros((num_moments + 1, len(KINDS)), dtype=np.int64)
        for number, (moment, size) in enumerate(self.made):
            change[moment, self.kinds[number]] += size
            if number in self.ended:
                # freed after `ended` operations were done, so it is gone at the next one
                change[self.ended[number], self.kinds[number]] -= size
        live = change.cumsum(0)
        ends = [*self.starts[1:], len(self.operations)]
        return [Moments(self.operations[a:b], live[a:b]) for a, b in zip(self.starts, ends)]
