"""Ctrl-C, SIGTERM and a closed terminal: the step that runs is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from looktwice.launch import launched

SECONDS_OF_ONE = 2.0
"""A Ctrl-C reaches a process of torchrun twice: from the terminal, and passed on by torchrun."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTED = "\nstopping when this step is finished and saved; Ctrl-C again stops at once\n"


class Interrupted(KeyboardInterrupt):
    """A run stopped as a signal asked it to. `number` is the signal's; `is_done` says that there was nothing left."""

    def __init__(self, number: int, *, is_done: bool = False) -> None:
        super().__init__()
        self.number, self.is_done = number, is_done


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal: this process (`number`), or any (`agreed`)."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.agreed: int | None = None
        self.is_armed = False
        self.noted_at = -SECONDS_OF_ONE

    def arm(self) -> None:
        """From now on there are steps to finish; before, a signal stops at once."""
        self.is_armed = True

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """What the process does on a signal. Raises Interrupted before `arm`, and for a Ctrl-C after another signal."""
        is_repeated = time.monotonic() - self.noted_at < SECONDS_OF_ONE and launched().size > 1
        if not self.is_armed or (self.number is not None and number == signal.SIGINT and not is_repeated):
            raise Interrupted(number)
        if self.number is None and launched().rank == 0:
            with suppress(OSError):  # nobody may read it
                os.write(2, NOTED.encode())  # a handler may come in the middle of a print
        self.number = self.number or number
        self.noted_at = time.monotonic()

    def agree(self, gather: Callable[[list[int]], list[int]]) -> None:
        """Have every process know what any was asked by now, and of what comes later none, or one would stop alone.

        All of them call this at the same time, each with the `gather` of its world.
        """
        self.agreed = max(gather([self.number or 0])) or None

    def heed(self, *, is_done: bool) -> None:
        """Raise Interrupted where a signal has come, as all processes know."""
        if self.agreed is not None:
            raise Interrupted(self.agreed, is_done=is_done)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Signals are noted in what is yielded, and no longer end the process by themselves.

    One that is ignored, as in a job that a shell started in the background, stays so; in a thread nothing changes.
    """
    request = StopRequest()
    is_main = threading.current_thread() is threading.main_thread()
    heard = [number for number in SIGNALS if is_main and signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request.note) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
