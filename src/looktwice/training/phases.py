"""Where the time of a step goes: seconds a phase, and the share in which nothing was computed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["rollout", "reward", "reference", "update", "eval", "saving", "data"]
BUSY: tuple[Phase, ...] = ("rollout", "reference", "update", "eval")
"""The phases in which the model of this process works. Rollouts that servers sample are none of them."""


class Phases:
    """A clock of phases, which follow one another and never overlap."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.begun = time.perf_counter()

    @contextmanager
    def of(self, phase: Phase) -> Iterator[None]:
        """Count what happens to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started

    def take(self, *, is_sampled_here: bool = True) -> dict[str, float]:
        """The metrics `time/...` of all since they were taken last."""
        now = time.perf_counter()
        busy = sum(self.seconds.get(phase, 0.0) for phase in BUSY if is_sampled_here or phase != "rollout")
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        metrics["time/idle_share"] = max(0.0, 1 - busy / (now - self.begun))
        self.seconds.clear()
        self.begun = now
        return metrics
