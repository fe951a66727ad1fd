"""Further terms of a reward, off by default: what each measures, over the siblings of one question.

`docs/method.md` has them in a table. Penalties are 0 or less and are taken from right and wrong answers alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from looktwice.geometry import Box, iou
from looktwice.rewards import REPEATED_CHARS, Played, has_think_and_answer, num_new_chars
from looktwice.rollout.trajectory import Trajectory

CURIOUS_SHARE = 0.3
"""Share of siblings with a crop (H of Pixel-Reasoner) from which on curiosity pays nothing."""
FREE_CALLS = 1
"""Calls of a rollout (N of Pixel-Reasoner) that redundancy does not count."""
NEEDLESS = -0.75
"""What makes 1 for a right answer with a crop 0.25, as Beacon pays it where a sibling was right without one."""
OVERLONG_SHARE = 0.2
"""The last part of the limit, in which a completion is punished for its length (DAPO: 4,096 of 20,480 tokens)."""
REPEATED_SHARE = 0.5
"""Of a text; more is punished (Thyme)."""


@dataclass(frozen=True, kw_only=True)
class Siblings:
    """The rollouts of one question, which of them are right, and the most tokens that each might have sampled."""

    rollouts: Sequence[Played]
    is_right: Sequence[bool]
    max_new_tokens: int

    @property
    def trajectories(self) -> list[Trajectory]:
        return [one.trajectory for one in self.rollouts]


def curiosity(group: Siblings) -> list[float]:
    """max(H - share of siblings with a crop, 0) for a rollout with a crop. Source: Pixel-Reasoner, arXiv 2505.15966."""
    looked = [one.has_crop for one in group.trajectories]
    rarity = max(CURIOUS_SHARE - sum(looked) / len(looked), 0.0)
    return [rarity * did_look for did_look in looked]


def redundancy(group: Siblings) -> list[float]:
    """min(N - number of calls, 0); refused calls count too. Source: Pixel-Reasoner, arXiv 2505.15966."""
    return [min(FREE_CALLS - len(one.calls), 0) for one in group.trajectories]


def necessity(group: Siblings) -> list[float]:
    """-0.75 for a right answer with a crop where a sibling is right without any. Source: Beacon, arXiv 2607.28595."""
    looked = [one.has_crop for one in group.trajectories]
    is_needless = any(right and not did_look for right, did_look in zip(group.is_right, looked))
    return [NEEDLESS * (is_needless and right and did_look) for right, did_look in zip(group.is_right, looked)]


def dual_iou(group: Siblings) -> list[float]:
    """How well the crops of a right answer and the gold boxes cover each other, 0 where there are none of either."""
    crops = [
        [call.box for call in one.calls if call.box is not None and call.image_number == 1]
        for one in group.trajectories
    ]
    return [
        dual_iou_of(found, one.gold_boxes) * right for found, one, right in zip(crops, group.rollouts, group.is_right)
    ]


def dual_iou_of(found: Sequence[Box], gold: Sequence[Box]) -> float:
    """Mean of two means: over gold boxes of the best IoU with one found, and over boxes found of that with a gold one.

    The first falls with what is missed, the second with what is beside the point. 0 where one of both is empty.
    Source: TreeVGR, arXiv 2507.07999.
    """
    if not found or not gold:
        return 0.0
    recall = sum(max(iou(box, one) for one in found) for box in gold) / len(gold)
    precision = sum(max(iou(one, box) for box in gold) for one in found) / len(found)
    return (recall + precision) / 2


def overlong(group: Siblings) -> list[float]:
    """0 up to four fifths of the limit of sampled tokens, then falling to -1. Source: DAPO, arXiv 2503.14476."""
    buffer = OVERLONG_SHARE * group.max_new_tokens
    begin = group.max_new_tokens - buffer
    return [-min(max((one.num_sampled - begin) / buffer, 0.0), 1.0) for one in group.trajectories]


def repetition(group: Siblings) -> list[float]:
    """-1 for a text of which more than half repeats itself. Source: Thyme, arXiv 2508.11630, which stops there."""
    return [-float(repeated_share(one.text) > REPEATED_SHARE) for one in group.trajectories]


def repeated_share(text: str) -> float:
    """The share of a text, whitespace collapsed, that stood there before; 0 for a text of a few words."""
    text = " ".join(text.split())
    return 1 - num_new_chars(text) / len(text) if len(text) > 2 * REPEATED_CHARS else 0.0


def misformat(group: Siblings) -> list[float]:
    """-1 for a text that is not thinking and then one answer block, as DeepEyes counts it (arXiv 2505.14362)."""
    return [-float(not has_think_and_answer(one.text)) for one in group.trajectories]


Term = Callable[[Siblings], list[float]]
TERMS: Mapping[str, Term] = {
    "curiosity": curiosity,
    "redundancy": redundancy,
    "necessity": necessity,
    "dual_iou": dual_iou,
    "overlong": overlong,
    "repetition": repetition,
    "misformat": misformat,
}
