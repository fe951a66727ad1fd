"""Where each process of a run is, and what ends them all: one that fails, or one that does not arrive."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from torch.distributed import Store

from looktwice.errors import one_line

SECONDS_BETWEEN_LOOKS = 1.0
MOST_TOLD = 4
FAILED = "failed"
START, SAVING = "start", "saving"
"""Phases that may take as long as a disk does: nobody is late who is in one of them."""


class Place(NamedTuple):
    """Where a process is: its phase, and the `number` of places it has come by, which are the same for all processes
    and in the same order."""

    number: int
    phase: str
    step: int

    def __str__(self) -> str:
        return f"at step {self.step:,}, {self.phase}" if self.phase != START else "starting"

    def packed(self) -> str:
        return f"{self.number}|{self.step}|{self.phase}"

    @classmethod
    def unpacked(cls, text: str) -> Place:
        number, step, phase = text.split("|", 2)
        return cls(int(number), phase, int(step))


class Watchdog:
    """Tells the others through `store` where this process is, and ends it when the run cannot go on.

    That is when another process has failed, or when this one has waited `timeout` seconds where another has not come
    to; that one is told with its step and phase.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        timeout: float,
        holds_store: bool = False,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.holds_store, self.end = holds_store, end or self._end
        self.place, self.since = Place(0, START, 0), time.monotonic()
        self.store.set(self._key(rank), self.place.packed())
        self.is_done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="looktwice-watchdog", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.is_done.set()
        self.thread.join()

    def at(self, phase: str, step: int) -> None:
        """Note that this process has begun a phase."""
        self.place = Place(self.place.number, phase, step)
        self.arrive()

    def arrive(self) -> None:
        """Note that this process has come to the next place, as where it waits for the others."""
        self.place, self.since = self.place._replace(number=self.place.number + 1), time.monotonic()

    def is_first_to_fail(self) -> bool:
        """Whether no process has failed before; from now on one has.

        Where the store is in this process, that ends a little later, so that the others can read there why.
        """
        is_first = self.store.add(FAILED, 1) == 1
        if is_first and self.holds_store:
            atexit.register(time.sleep, 2 * SECONDS_BETWEEN_LOOKS)
        return is_first

    def others(self) -> dict[int, Place]:
        """The places of the other ranks, as they told them last."""
        ranks = (rank for rank in range(self.size) if rank != self.rank and self.store.check([self._key(rank)]))
        return {rank: Place.unpacked(self.store.get(self._key(rank)).decode()) for rank in ranks}

    def look(self) -> str | None:
        """Tell the others where this process is, and give the reason to end, if there is one; "" was told already."""
        self.store.set(self._key(self.rank), self.place.packed())
        if self.store.add(FAILED, 0):
            return ""
        waited = time.monotonic() - self.since
        if waited <= self.timeout:
            return None
        late = {
            rank: place
            for rank, place in self.others().items()
            if place.number < self.place.number and place.phase not in (START, SAVING)
        }
        if not late or not self.is_first_to_fail():
            return None
        return (
            f"rank {self.rank} ({self.place}) has waited {waited:,.0f} s for {told(late)}; look at what happens there, "
            "or raise --process_timeout"
        )

    def _watch(self) -> None:
        while not self.is_done.wait(min(SECONDS_BETWEEN_LOOKS, self.timeout)):
            try:
                reason = self.look()
            except RuntimeError as error:  # the store went with the process that held it
                reason = f"rank {self.rank}, {self.place}: rank 0, or its machine, is gone ({one_line(str(error), 80)})"
            if reason is not None and not self.is_done.is_set():
                self.end(reason)
                return

    def _end(self, reason: str) -> None:
        """End the process whatever it waits for, with a line that says why unless another process has said it."""
        if reason:
            print(f"looktwice: {reason}", file=sys.stderr, flush=True)
        if self.holds_store:
            time.sleep(2 * SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    def _key(self, rank: int) -> str:
        return f"place/{rank}"


def told(places: dict[int, Place]) -> str:
    """Where processes are, in words; of many only the first."""
    words = [f"rank {rank} ({place})" for rank, place in sorted(places.items())]
    return ", ".join(words[:MOST_TOLD]) + f" and {len(words) - MOST_TOLD} more" * (len(words) > MOST_TOLD)
