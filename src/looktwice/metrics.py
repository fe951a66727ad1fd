"""What a run records: the table of metric names, and the recorder that writes them.

One JSON line per logged step is the record; trackers get the same numbers; the console shows a few.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

from looktwice.console import open_bar, open_console
from looktwice.drafts import file_draft
from looktwice.paths import append_line
from looktwice.trackers import Tracker

METRICS: dict[str, str] = {
    "loss": "training loss of the step, per trained token",
    "eval/loss": "mean negative logprob per trained token of the validation data, nats",
    "eval/accuracy": "share of right greedy answers to the validation questions",
    "eval/calls": "mean crop calls per greedy answer to them",
    "eval/accuracy_without_tool": "share of right answers to them when every crop call is refused",
    "eval/tool_gain": "share of them that are wrong without the tool and right with it",
    "eval/tool_harm": "share of them that are right without the tool and wrong with it",
    "optim/lr": "learning rate",
    "optim/grad_norm": "gradient norm before clipping",
    "optim/skipped": "updates so far that were left out because loss or gradient was no number",
    "optim/overflows": "updates so far that were left out because a gradient was too large for float16",
    "epoch": "passes over the training data so far",
    "data/too_long": "samples so far that were left out or shrunk because they were longer than max_length",
    "memory/vision_cache_gb": "gigabytes of features that the vision cache holds",
    "perf/vision_cache_hits": "share of the pictures since the step before that the vision cache had",
    "memory/row_splits": "rows that the step took more because memory ran out",
    "perf/tokens_per_s": "tokens of packed rows per second, prompts, pictures and the wait for data included",
    "time/step_s": "seconds of the whole step",
    "time/data_wait_share": "share of the step that waited for samples, a mean over the processes",
    "time/rollout_s": "seconds of sampling rollouts",
    "time/reward_s": "seconds of rewarding them",
    "time/reference_s": "seconds of the reference's logprobs",
    "time/update_s": "seconds of the policy updates",
    "time/eval_s": "seconds of the evaluation",
    "time/saving_s": "seconds of writing checkpoints, trajectories and pages since the step before",
    "time/data_s": "seconds of reading prompts and their pictures",
    "time/waiting_s": "seconds of waiting for other processes, or for rollouts made ahead",
    "time/idle_share": "share of the time since the step before in which the model neither sampled here nor trained",
    "perf/sampled_tokens_per_s": "sampled tokens per second of sampling",
    "perf/trained_tokens_per_s": "trained tokens per second of the policy updates",
    "reward/total": "mean reward of the rollouts that have one",
    "reward/accuracy": "share of right answers among rollouts",
    "reward/format": "mean format term, as paid",
    "reward/length": "mean length term, as paid",
    "reward/region": "mean region term, as paid",
    "reward/own/*": "mean of a further term, or of a part that a user's own reward names, as paid",
    "reward/total_right": "mean reward of rollouts whose answer is right by the rules",
    "reward/total_wrong": "mean reward of rollouts whose answer is wrong by the rules",
    "reward/failed": "share of rollouts without a reward: it raised, hung or was no number, or the rollout failed",
    "group/number": "groups of the step",
    "group/all_right": "share of groups whose rollouts were all paid the same accuracy, above 0",
    "group/all_wrong": "share of groups whose rollouts were all paid no accuracy",
    "group/dropped": "share of groups left out because all their rollouts were right or all wrong",
    "rollout/num_turns": "mean completions per rollout",
    "rollout/num_tokens": "mean sampled tokens per rollout",
    "rollout/num_tokens_right": "mean sampled tokens of rollouts whose answer is right by the rules",
    "rollout/num_tokens_wrong": "mean sampled tokens of rollouts whose answer is wrong by the rules",
    "rollout/trained_tokens": "mean tokens per rollout that the update trained, those left out counted as 0",
    "rollout/visual_tokens": "mean visual tokens per rollout, of its prompt and its crops",
    "rollout/right": "share of rollouts whose answer is right by the rules, whatever the reward looks at",
    "rollout/right_with_crop": "share of right answers among rollouts that got a crop",
    "rollout/right_without_crop": "share of right answers among rollouts that got none",
    "rollout/truncated": "share of rollouts cut by a limit or an error",
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
    "tool/crop_share": "share of rollouts that got a crop",
    "tool/valid_share": "share of crop calls that gave a crop",
    "tool/refused/*": "share of crop calls that were refused for this reason",
    "tool/area_share": "mean share of its picture that a crop covers",
    "tool/whole_share": "share of crops that cover nine tenths of their picture or more",
    "tool/mean_iou": "mean overlap of crops with the nearest gold box, where the data has any",
    "policy/entropy": "mean entropy of the policy at sampled tokens, nats",
    "kl/reference": "mean estimate of the KL to the starting policy, by --kl_estimator, nats",
    "kl/sampling": "mean absolute difference between logprobs in training and in sampling, nats",
    "canary/gap": "mean absolute difference between logprobs in training and in sampling, one rollout, nats",
    "canary/picture": "mean absolute change of an answer's logprobs when its pictures are others, nats",
    "canary/adapter": "mean absolute change of an answer's logprobs without the adapter, nats",
    "gap/max": "largest absolute difference of them in the first of the updates on new rollouts, nats",
    "gap/mean": "mean absolute difference of them there, nats",
    "gap/ratio": "mean ratio of the policy to the one that sampled, there",
    "importance/mean": "mean weight of tokens that another distribution drew",
    "importance/left_out": "share of tokens whose weight is 0",
    "optim/updates": "optimizer steps of a batch of rollouts",
    "group/refilled": "groups of further prompts that took the place of some without signal",
    "clip/low": "share of tokens clipped at the lower bound",
    "clip/high": "share of tokens clipped at the upper bound",
    "alarm/no_signal": "is 1 while steps in a row had no group with both right and wrong answers",
    "alarm/no_crops": "is 1 while few rollouts get a crop",
    "alarm/whole_picture": "is 1 while many crops show the whole picture",
    "alarm/blind_reward": "is 1 while wrong answers are paid about as much as right ones",
    "alarm/format_without_accuracy": "is 1 while pay beside accuracy has risen, and right answers have not",
    "alarm/length_drift": "is 1 while rollouts are much longer or shorter than at first",
    "alarm/entropy_collapse": "is 1 while the policy is sure of itself and mostly wrong",
    "alarm/engine_gap": "is 1 while trainer and engine disagree about logprobs",
    "alarm/kl_runaway": "is 1 while the policy is far from where it started",
    "alarm/failing_rewards": "is 1 while many rewards fail",
}
"""Every metric a run may log: area/quantity, its meaning and unit; a star stands for any words."""

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
        self.progress = open_bar(title, self.console, redirect_stdout=open_console().is_interactive)
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
        unknown = [
            name for name in metrics if name not in METRICS and not any(fnmatchcase(name, known) for known in METRICS)
        ]
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
    """A number to four digits: 0.6931, 2e-05, 18,384; 1e+12 from a thousand million on."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def folded(facts: Sequence[str], width: int) -> list[str]:
    """The facts side by side in lines of at most `width` columns, none of them broken."""
    lines = [facts[0]]
    for fact in facts[1:]:
        if len(lines[-1]) + 2 + len(fact) > width:
            lines.append(f"    {fact}")
        else:
            lines[-1] += f"  {fact}"
    return lines


def read_log(path: Path, *, last: int | None = None) -> list[dict[str, float]]:
    """The lines of a log up to step `last`; none where there is no log, and what somebody else wrote is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and (last is None or line["step"] <= last):
            lines.append(line)
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
