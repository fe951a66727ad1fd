"""What a run records: the table of metric names, and the recorder that writes them.

One JSON line per logged step is the record; trackers get the same numbers; the console shows a few.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from looktwice.console import open_console
from looktwice.drafts import file_draft
from looktwice.paths import append_line
from looktwice.trackers import Tracker

METRICS: dict[str, str] = {
    "loss": "training loss of the step, per trained token",
    "eval/loss": "mean negative logprob per trained token of the validation data, nats",
    "eval/accuracy": "share of right greedy answers to the validation questions",
    "optim/lr": "learning rate",
    "optim/grad_norm": "gradient norm before clipping",
    "optim/skipped": "updates so far that were left out because loss or gradient was no number",
    "epoch": "passes over the training data so far",
    "data/too_long": "samples so far that were left out or shrunk because they were longer than max_length",
    "memory/row_splits": "rows that the step took more because memory ran out",
    "perf/tokens_per_s": "tokens of packed rows per second, prompts, pictures and the wait for data included",
    "time/step_s": "seconds of the whole step",
    "time/data_wait_share": "share of the step that waited for samples to be prepared",
    "time/rollout_s": "seconds of sampling rollouts",
    "time/update_s": "seconds of the policy update",
    "reward/total": "mean reward of the rollouts that have one",
    "reward/accuracy": "share of right answers among rollouts",
    "reward/format": "mean format term, as paid",
    "reward/length": "mean length term, as paid",
    "reward/region": "mean region term, as paid",
    "reward/own/*": "mean of a part that a user's own reward names",
    "reward/failed": "share of rollouts without a reward: it raised, hung or was no number, or the rollout failed",
    "group/dropped": "share of groups left out because all their rollouts were right or all wrong",
    "rollout/num_turns": "mean completions per rollout",
    "rollout/num_tokens": "mean sampled tokens per rollout",
    "rollout/stop/answered": "share of rollouts that ended with an answer",
    "rollout/stop/no_answer": "share of rollouts that ended without one",
    "rollout/stop/max_turns": "share of rollouts cut by the turn limit",
    "rollout/stop/max_tokens": "share of rollouts cut by the token limit",
    "rollout/stop/max_turn_tokens": "share of rollouts cut by the token limit of a turn",
    "rollout/stop/max_visual_tokens": "share of rollouts cut by the limit of visual tokens",
    "rollout/stop/max_seconds": "share of rollouts cut by the time limit",
    "rollout/stop/stop_text": "share of rollouts ended by a stop text",
    "rollout/stop/no_room": "share of rollouts that did not fit into the engine's cache",
    "rollout/stop/cancelled": "share of rollouts that were cancelled",
    "rollout/stop/error": "share of rollouts ended by an error of the crop tool or a callback",
    "tool/calls": "mean crop calls per rollout",
    "tool/valid_share": "share of crop calls that gave a crop",
    "tool/mean_iou": "mean overlap of crops with the gold box, where the data has one",
    "policy/entropy": "mean entropy of the policy at sampled tokens, nats",
    "kl/reference": "mean k3 estimate of the KL to the starting policy, nats",
    "kl/sampling": "mean absolute difference between logprobs in training and in sampling, nats",
    "canary/gap": "mean absolute difference between logprobs in training and in sampling, one rollout, nats",
    "canary/picture": "mean absolute change of an answer's logprobs when its pictures are others, nats",
    "canary/adapter": "mean absolute change of an answer's logprobs without the adapter, nats",
    "clip/low": "share of tokens clipped at the lower bound",
    "clip/high": "share of tokens clipped at the upper bound",
}
"""Every metric a run may log: area/quantity, its meaning and unit; a star stands for any word."""

LOG_FILE = "metrics.jsonl"
OWN_NAMES = ("optim/", "perf/", "time/")
"""Areas whose metrics are shown by the rest of their name, which is clear without."""


class Recorder:
    """Writes the metrics of one stage to `folder` and shows the chosen ones: a line for each logged step, and on a
    terminal a bar below them.

    A run that goes on after `start` steps drops what was recorded of later ones.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        shown: tuple[str, ...],
        title: str,
        start: int = 0,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_FILE
        keep_steps(self.path, start)
        self.trackers = [*trackers]
        self.shown = shown
        self.console = open_console(stderr=True)
        self.progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_interactive,
            redirect_stdout=open_console().is_interactive,
            speed_estimate_period=math.inf,  # one step of R-GRPO may take longer than rich looks back
        )
        self.task = self.progress.add_task(title, total=total_steps, completed=start)

    def __enter__(self) -> Recorder:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self._tell(lambda tracker: tracker.close())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record and show the metrics of a step. Raises KeyError for a name that is not in METRICS."""
        unknown = [name for name in metrics if not {name, f"{name.rpartition('/')[0]}/*"} & {*METRICS}]
        if unknown:
            raise KeyError(f"metrics {unknown} are not in the table METRICS")
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON knows no other
        line: dict[str, Any] = {"step": step, **{name: round(float(value), 8) for name, value in metrics.items()}}
        append_line(self.path, json.dumps(line))
        self._tell(lambda tracker: tracker.log(step, metrics))
        self.console.out("\n".join(self.lines(step, metrics)))

    def flush(self) -> None:
        """Have everything that was logged on the disk."""
        self._tell(lambda tracker: tracker.flush())

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        """Call all trackers; one that fails is told of and left out from then on, and the run goes on."""
        for tracker in [*self.trackers]:
            try:
                call(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                self.console.out(f"{type(tracker).__name__} shows no more of this run ({error})")

    def advance(self, step: int) -> None:
        """Move the bar: so many steps are done."""
        self.progress.update(self.task, completed=step)

    def lines(self, step: int, metrics: dict[str, float]) -> list[str]:
        """What is shown of a step: as many lines as a terminal asks for, or one that has the times of the bar too."""
        [task] = self.progress.tasks
        total = f"{task.total:.0f}"
        facts = [f"step {step:>{len(total)}}/{total}"]
        facts += [f"{short_name(name)} {four_digits(metrics[name])}" for name in self.shown if name in metrics]
        if self.console.is_interactive:
            return folded(facts, self.console.width)
        times = {"elapsed": task.elapsed, "left": task.time_remaining}
        facts += [f"{name} {timedelta(seconds=int(time))}" for name, time in times.items() if time is not None]
        return ["  ".join(facts)]


def short_name(name: str) -> str:
    return name.partition("/")[2] if name.startswith(OWN_NAMES) else name


def four_digits(value: float) -> str:
    """A number to four digits: 0.6931, 2e-05, 18,384."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def folded(facts: Sequence[str], width: int) -> list[str]:
    """The facts side by side in lines of at most `width` columns, none of them broken."""
    lines = [facts[0]]
    for fact in facts[1:]:
        if len(lines[-1]) + 2 + len(fact) > width:
            lines.append(f"    {fact}")
        else:
            lines[-1] += f"  {fact}"
    return lines


def keep_steps(path: Path, last: int) -> None:
    """Leave in a log only the whole lines of steps up to `last`: a run that was stopped may have logged more."""
    if not path.exists():
        return
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    kept = [line for line in whole.splitlines() if _step_of(line) <= last]
    with file_draft(path) as draft:
        draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> int:
    """The step of a line of a log; 0 where somebody else wrote it, so that it stays."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
