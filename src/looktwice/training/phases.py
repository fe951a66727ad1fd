"""Where the time of a step goes: seconds a phase, and the share in which nothing was computed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from looktwice.training.distributed import World

Phase = Literal["rollout", "reward", "reference", "update", "eval", "saving", "data", "waiting"]
BUSY: tuple[Phase, ...] = ("rollout", "reference", "update", "eval")
"""The phases in which the model of this process works. Rollouts that servers sample are none of them."""


class Phases:
    """A clock of phases, which follow one another and never overlap, but for those of rollouts made ahead (`add`).

    What a process waits for the others of its world within a phase counts as waiting.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.begun = time.perf_counter()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Count what happens to a phase."""
        started, waited = time.perf_counter(), self.world.waited
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started - (self.world.waited - waited)

    def add(self, others: Phases) -> None:
        """Count what another clock has counted, as in a thread."""
        for phase, seconds in others.seconds.items():
            self.seconds[phase] += seconds
        others.seconds.clear()

    def take(self, *, is_sampled_here: bool = True) -> dict[str, float]:
        """The metrics `time/...` of all since they were taken last: means over the processes, which all call this."""
        now = time.perf_counter()
        busy = sum(self.seconds.get(phase, 0.0) for phase in BUSY if is_sampled_here or phase != "rollout")
        if self.world.size > 1:
            self.seconds["waiting"] += self.world.waited
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        metrics["time/idle_share"] = max(0.0, 1 - busy / (now - self.begun))
        if "data" in self.seconds:
            metrics["time/data_wait_share"] = self.seconds["data"] / (now - self.begun)
        self.seconds.clear()
        self.begun, self.world.waited = now, 0.0
        means: defaultdict[str, float] = defaultdict(float)
        for name, value in self.world.gather([*metrics.items()]):
            means[name] += value / self.world.size
        return dict(means)
