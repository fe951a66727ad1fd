"""How often a model is right, and how it uses the crop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from looktwice.answers import answers_right
from looktwice.data.sample import Sample
from looktwice.evaluation.controls import Control, control_looks
from looktwice.inference import OvisInference
from looktwice.rollout.conversation import in_model_frame
from looktwice.rollout.trajectory import Trajectory, gold_overlaps


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures over all questions. `valid_share` is of calls, `mean_iou` of crops with the nearest gold box; None
    without any."""

    accuracy: float
    calls_per_answer: float
    valid_share: float | None
    mean_iou: float | None
    is_right: tuple[bool, ...]
    trajectories: tuple[Trajectory, ...]


def wilson_interval(num_right: int, num_asked: int) -> tuple[float, float]:
    """Lowest and highest share of right answers that this many of so many leave plausible, at 95 %.

    The score interval of Wilson (1927): unlike the usual plus and minus it holds near 0 and 1 too, as in
    wilson_interval(0, 400) == (0.0, 0.0095...)
    """
    z = NormalDist().inv_cdf(0.975)
    share, unsure = num_right / num_asked, z * z / num_asked
    middle = (share + unsure / 2) / (1 + unsure)
    half = math.sqrt(unsure * (share * (1 - share) + unsure / 4)) / (1 + unsure)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, kw_only=True)
class ToolWorth:
    """What the tool is worth, in shares of the same questions asked with and without it.

    `gain` were wrong without it and right with it, `harm` right without it and wrong with it; the two accuracies differ
    by gain - harm.
    """

    accuracy: float
    accuracy_without: float
    gain: float
    harm: float


def worth_of(with_tool: Evaluation, without: Evaluation) -> ToolWorth:
    """What the tool is worth, by two evaluations of the same questions."""
    pairs = list(zip(with_tool.is_right, without.is_right, strict=True))
    return ToolWorth(
        accuracy=with_tool.accuracy,
        accuracy_without=without.accuracy,
        gain=fmean(is_right and not was_right for is_right, was_right in pairs),
        harm=fmean(was_right and not is_right for is_right, was_right in pairs),
    )


def evaluate(
    inference: OvisInference, samples: Sequence[Sample], *, control: Control | None = None, seed: int = 0
) -> Evaluation:
    """Ask every question with the crop tool, or with one of the controls in its place."""
    looks = control_looks(control, inference.processor, samples, seed) if control else None
    prompts = [in_model_frame(sample.prompt, sample.box_frame, inference.processor) for sample in samples]
    return judged(inference.play(prompts, looks), samples)


def judged(trajectories: Sequence[Trajectory], samples: Sequence[Sample]) -> Evaluation:
    """The figures of finished answers, whoever played them; one that failed by an error is not right."""
    is_right = tuple(
        trajectory.stop_reason != "error" and answers_right(trajectory.text, sample.solution)
        for trajectory, sample in zip(trajectories, samples, strict=True)
    )
    calls = [call for trajectory in trajectories for call in trajectory.calls]
    overlaps = gold_overlaps(trajectories, [sample.gold_boxes for sample in samples])
    return Evaluation(
        accuracy=fmean(is_right),
        calls_per_answer=len(calls) / len(samples),
        valid_share=fmean(call.is_valid for call in calls) if calls else None,
        mean_iou=fmean(overlaps) if overlaps else None,
        is_right=is_right,
        trajectories=tuple(trajectories),
    )
