"""Which checkpoints a run writes, and which of them it keeps."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from looktwice.data.order import BatchOrder
from looktwice.drafts import UNFINISHED
from looktwice.metrics import LOG_FILE, read_log
from looktwice.training.folder import checkpoints, remove
from looktwice.training.learner import Learner
from looktwice.training.record import Record
from looktwice.training.state import save

BEST: dict[str, Callable[[float, float], bool]] = {"eval/loss": operator.lt, "eval/accuracy": operator.gt}
"""The metrics by which a checkpoint is best, and when one value of them is better than another."""


class Checkpoints:
    """The `checkpoint-N` folders of a run that is going on."""

    def __init__(self, learner: Learner, record: Record, order: BatchOrder) -> None:
        self.learner, self.record, self.config = learner, record, learner.config
        self.folder = learner.config.output_dir
        self.save_steps = self.config.save_steps or order.steps_per_epoch
        self.saved_at = time.monotonic()
        self.best = best_of(self.folder / LOG_FILE, last=learner.step)

    def is_due(self, metrics: dict[str, float]) -> bool:
        """Whether a checkpoint is due after the step of these metrics; after the last one too, so that the run can be
        made longer."""
        is_best = self._note_best(metrics)
        if not self.config.save_total_limit:
            return False
        minutes = (time.monotonic() - self.saved_at) / 60
        is_time = self.config.save_minutes is not None and minutes >= self.config.save_minutes
        return is_best or is_time or self.is_planned(self.learner.step)

    def is_planned(self, step: int) -> bool:
        """Whether a checkpoint is due after this step whatever it brings."""
        return self.config.save_total_limit > 0 and (step == self.learner.total_steps or step % self.save_steps == 0)

    @property
    def place(self) -> Path:
        """The checkpoint of this step, whether it is written or not."""
        return self.folder / f"checkpoint-{self.learner.step}"

    def save(self) -> Path:
        """Write the checkpoint of this step, then remove those that are too many."""
        folder = self.place
        save(self.learner, folder, self.record, with_optimizer=True)
        for old in self._too_many() if self.learner.world.is_main else ():
            # under its own name half of it could be taken for a checkpoint
            gone = old.with_name(f".{old.name}{UNFINISHED}")
            remove(gone)
            old.rename(gone)
            remove(gone)
        self.saved_at = time.monotonic()
        return folder

    def _note_best(self, metrics: dict[str, float]) -> bool:
        """Whether this step's evaluation is better than all before."""
        for name in BEST:
            if math.isfinite(value := metrics.get(name, math.nan)):
                is_best = is_better(name, value, self.best)
                if is_best:
                    self.best = (self.learner.step, value)
                return is_best and self.config.keep_best
        return False

    def _too_many(self) -> Iterator[Path]:
        found = checkpoints(self.folder)
        kept = {*sorted(found)[-max(1, self.config.save_total_limit) :], self.learner.step}
        if self.config.keep_best and self.best:
            kept.add(self.best[0])
        yield from (path for step, path in found.items() if step not in kept)


def best_of(log: Path, *, last: int) -> tuple[int, float] | None:
    """The step up to `last` with the best evaluation in a log, and its value; None where there is none."""
    found: tuple[int, float] | None = None
    for line in read_log(log, last=last):
        for name in BEST:
            if name in line and is_better(name, line[name], found):
                found = (int(line["step"]), line[name])
    return found


def is_better(name: str, value: float, best: tuple[int, float] | None) -> bool:
    """Whether a value of a metric is better than the best one so far, which stands behind its step."""
    return best is None or BEST[name](value, best[1])
