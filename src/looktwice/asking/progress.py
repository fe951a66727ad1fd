"""How far many questions are, and the time left: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from looktwice.console import open_bar, open_console

TOLD_EVERY = 10.0
"""Seconds between two lines of progress where nobody watches."""


class Watched:
    """Progress of `total` things of a name (`row`), of which so many have failed so far."""

    def __init__(self, noun: str, total: int, num_failed: Callable[[], int]) -> None:
        self.noun, self.num_failed = noun, num_failed
        self.console = open_console(stderr=True)
        self.progress = open_bar(f"{noun}s", self.console)
        self.task = self.progress.add_task(noun, total=total)
        self.told = time.monotonic()

    def __enter__(self) -> Watched:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def tell(self) -> None:
        """One more is done."""
        self.progress.advance(self.task)
        if self.console.is_interactive or time.monotonic() - self.told < TOLD_EVERY:
            return
        self.told = time.monotonic()
        [task] = self.progress.tasks
        facts = [f"{self.noun} {task.completed:,.0f}/{task.total:,.0f}", f"failed {self.num_failed():,}"]
        times = {"elapsed": task.elapsed, "left": task.time_remaining}
        facts += [f"{name} {timedelta(seconds=int(spent))}" for name, spent in times.items() if spent is not None]
        self.console.out("  ".join(facts))
