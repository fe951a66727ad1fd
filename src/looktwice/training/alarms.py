"""Alarms: what the metrics of a run say when it learns nothing, or the wrong thing.

Each is a function of the history, the lines of metrics.jsonl up to now, oldest first. Nothing else is kept, so a run
that goes on finds its alarms as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Literal

from looktwice.config import AlarmName
from looktwice.metrics import four_digits

History = Sequence[Mapping[str, float]]
RECENT, FIRST = 3, 5
"""Steps whose mean is judged, and steps at the beginning of a run with which later ones are compared."""
HELD = 5
"""Steps without the threshold after which an alarm is over."""
OLDEST = 12
"""Steps back from the last one that still count as recent, where not every step has a metric."""
FEWEST_GROUPS = 16
"""Groups in a row without signal below which nothing is said: in a batch of one prompt three are no wonder."""
KEPT = 32
"""Steps of the history that are kept beside the first ones: what alarms look back at, but for `no_signal`, which counts
as many steps as its threshold."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something that goes wrong. `measure` gives what is compared with the threshold, None where nothing can be said.

    `meaning` holds the places {value} and {threshold}.
    """

    measure: Callable[[History], float | None]
    threshold: float
    side: Literal["from", "to"]
    """The alarm is on from the threshold upwards, or from it downwards."""
    meaning: str
    mend: str

    def is_on(self, history: History, threshold: float) -> bool:
        """Whether it is on after the last line: where the threshold is reached there, or was in one of the lines just
        before, so that what wavers about it is one alarm and not many."""
        return any(self._reaches(history[: len(history) - back], threshold) for back in range(HELD))

    def _reaches(self, history: History, threshold: float) -> bool:
        value = self.measure(history)
        if value is None:
            return False
        return value >= threshold if self.side == "from" else value <= threshold

    def told(self, history: History, threshold: float) -> str:
        """What it means, with the numbers, and what to do."""
        value = self.measure(history) or 0.0
        return f"{self.meaning.format(value=four_digits(value), threshold=four_digits(threshold))}; {self.mend}"


def recent(history: History, name: str, count: int = RECENT, *, within: int = OLDEST) -> float | None:
    """Mean of the last values of a metric, None where so many last steps do not have them."""
    values = [line[name] for line in history[-within:] if name in line]
    return mean(values[-count:]) if len(values) >= count else None


def change(history: History, name: str) -> tuple[float, float] | None:
    """Means of a metric over the first steps and over as many last ones, None where they would overlap."""
    values = [line[name] for line in history if name in line]
    return (mean(values[:FIRST]), mean(values[-FIRST:])) if len(values) >= 2 * FIRST else None


def steps_without_signal(history: History) -> float | None:
    """Last steps in a row in which no group had both right and wrong answers, and none was replaced by one that had."""
    steps = groups = 0.0
    for line in reversed(history):
        if "group/number" not in line:
            continue
        constant = line["group/all_right"] + line["group/all_wrong"]
        if max(constant, line.get("group/dropped", 0.0)) < 1 - 1e-6 or line.get("group/refilled"):
            break
        steps, groups = steps + 1, groups + line["group/number"]
    return steps if groups >= FEWEST_GROUPS else 0.0


def share_paid_for_wrong(history: History) -> float | None:
    """What a wrong answer is paid, as a share of what a right one is; 1 and more says that being right does not pay."""
    right, wrong = (recent(history, f"reward/total_{kind}", FIRST) for kind in ("right", "wrong"))
    if right is None or wrong is None:
        return None
    larger = max(abs(right), abs(wrong))
    return 1 - (right - wrong) / larger if larger else 1.0


def shaping_gain(history: History) -> float | None:
    """By how much the pay beside accuracy has risen since the first steps, as a share of the reward; 0 where right
    answers have risen too. A reward without an accuracy part is all such pay."""
    paid = [
        {"total": line["reward/total"], "shaping": line["reward/total"] - line.get("reward/accuracy", 0.0)}
        for line in history
        if "reward/total" in line
    ]
    totals, shaping, right = change(paid, "total"), change(paid, "shaping"), change(history, "rollout/right")
    if totals is None or shaping is None or right is None:
        return None
    if right[1] > right[0] or not any(totals):
        return 0.0
    return (shaping[1] - shaping[0]) / max(map(abs, totals))


def length_factor(history: History) -> float | None:
    """How many times longer or shorter rollouts are than in the first steps."""
    lengths = change(history, "rollout/num_tokens")
    if lengths is None or not min(lengths):
        return None
    return max(lengths) / min(lengths)


def unripe_entropy(history: History) -> float | None:
    """Recent entropy, as a share of that of the first steps, while most answers are wrong; a policy that is right may
    well be sure."""
    values = [line["policy/entropy"] for line in history if "policy/entropy" in line]
    right, last = recent(history, "rollout/right"), recent(history, "policy/entropy")
    if len(values) < 2 * FIRST or right is None or last is None or right > 0.5:
        return None
    return last / mean(values[:FIRST]) if mean(values[:FIRST]) else 0.0


ALARMS: dict[AlarmName, Alarm] = {
    "no_signal": Alarm(
        measure=steps_without_signal,
        threshold=3,
        side="from",
        meaning="for {value} steps no group had both right and wrong answers, so nothing was learnt from accuracy",
        mend="look at group/all_right and group/all_wrong: take harder or easier questions, a better start, a higher "
        "temperature, more rollouts a prompt, or look at the reward",
    ),
    "no_crops": Alarm(
        measure=lambda history: recent(history, "tool/crop_share"),
        threshold=0.1,
        side="to",
        meaning="only {value} of the rollouts got a crop: the policy answers without looking twice",
        mend="where calls are refused (tool/refused/...) mend boxes or box_frame; where there are none start from an "
        "SFT checkpoint that crops, and pay crops of right answers",
    ),
    "whole_picture": Alarm(
        measure=lambda history: recent(history, "tool/whole_share"),
        threshold=0.5,
        side="from",
        meaning="{value} of the crops show the whole picture once more: calls are made for pay, not to see better",
        mend="pay no crop of the whole picture, or pay the overlap with a gold box",
    ),
    "blind_reward": Alarm(
        measure=share_paid_for_wrong,
        threshold=0.9,
        side="from",
        meaning="a wrong answer is paid {value} of what a right one is: the reward does not tell them apart",
        mend="look at what the reward reads; right is what the rules say of the gold answer, so if it judges otherwise "
        "on purpose switch this alarm off",
    ),
    "format_without_accuracy": Alarm(
        measure=shaping_gain,
        threshold=0.2,
        side="from",
        meaning="pay beside accuracy rose by {value} of the reward since the first steps, and right answers did not",
        mend="gate the shaping terms on accuracy, as --reward robust does, and leave out groups without that signal",
    ),
    "length_drift": Alarm(
        measure=length_factor,
        threshold=2,
        side="from",
        meaning="rollouts are {value} times as long, or as short, as in the first steps",
        mend="compare rollout/num_tokens_right and rollout/num_tokens_wrong, and look at the page of rollouts; lower "
        "the pay for length, use --loss_aggregation token_mean, or set limits",
    ),
    "entropy_collapse": Alarm(
        measure=unripe_entropy,
        threshold=0.1,
        side="to",
        meaning="the policy's entropy is {value} of what it was, though most answers are wrong: rollouts are all alike",
        mend="lower the learning rate, raise --epsilon_high or the temperature, or add a KL term with --beta",
    ),
    "engine_gap": Alarm(
        measure=lambda history: recent(history, "gap/mean", within=len(history)),
        threshold=0.05,
        side="from",
        meaning="logprobs in training and in sampling differ by {value} nats: another policy sampled than is updated",
        mend="look for another precision, other weights or another picture size in the engine; --exact leaves no gap",
    ),
    "kl_runaway": Alarm(
        measure=lambda history: recent(history, "kl/reference"),
        threshold=1,
        side="from",
        meaning="the policy is {value} nats a token away from where it started",
        mend="lower the learning rate or raise --beta; look at the page of rollouts whether the text is still language",
    ),
    "failing_rewards": Alarm(
        measure=lambda history: recent(history, "reward/failed"),
        threshold=0.1,
        side="from",
        meaning="{value} of the rewards fail, and their rollouts are left out of training",
        mend="the reason stands in the output of each step; mend the reward function, or raise --reward_seconds",
    ),
}
"""Every alarm by its name. Thresholds are set with --alarms NAME=NUMBER, and NAME=off leaves one out."""


class Watch:
    """The alarms of a run as it goes on: which are on, and what there is to tell when one begins or ends."""

    def __init__(
        self, thresholds: Mapping[AlarmName, float | Literal["off"]], stops: Sequence[str] = (), history: History = ()
    ) -> None:
        given = {name: thresholds.get(name, alarm.threshold) for name, alarm in ALARMS.items()}
        self.thresholds: dict[AlarmName, float] = {name: value for name, value in given.items() if value != "off"}
        self.stops = stops
        self.kept = max(KEPT, math.ceil(self.thresholds.get("no_signal", 0)) + HELD)
        self.history = self.trimmed(history)
        self.on = [name for name in self.thresholds if self.history and self._is_on(name)]

    def _is_on(self, name: AlarmName) -> bool:
        return ALARMS[name].is_on(self.history, self.thresholds[name])

    def note(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """The metrics `alarm/...` of a step, and what to tell of the alarms that began or ended with it."""
        self.history = self.trimmed([*self.history, metrics])
        on = [name for name in self.thresholds if self._is_on(name)]
        told = [
            f"alarm {name} at step {step}: {ALARMS[name].told(self.history, self.thresholds[name])}"
            for name in on
            if name not in self.on
        ]
        told += [f"alarm {name} is over at step {step}" for name in self.on if name not in on]
        self.on = on
        return {f"alarm/{name}": float(name in on) for name in self.thresholds}, told

    def trimmed(self, history: History) -> list[Mapping[str, float]]:
        """The lines of a history that alarms look at."""
        return [*history[: 2 * FIRST], *history[2 * FIRST :][-self.kept :]]

    @property
    def reason_to_stop(self) -> str | None:
        """Which alarms are on that are to end the run, and what the first of them means."""
        ending = [name for name in self.on if name in self.stops or "all" in self.stops]
        if not ending:
            return None
        return f"{', '.join(ending)}: {ALARMS[ending[0]].told(self.history, self.thresholds[ending[0]])}"
