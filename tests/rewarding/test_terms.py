"""Further terms: each reproduces the example of its source."""

from __future__ import annotations

import pytest

from looktwice.geometry import Box, Size
from looktwice.rewarding.terms import TERMS, Siblings, dual_iou_of
from looktwice.rewards import Played
from looktwice.rollout.trajectory import ToolCall, Trajectory

CROP = ToolCall(requested=Box(0, 0, 10, 10), box=Box(0, 0, 10, 10), size=Size(56, 56), error=None)
REFUSED = ToolCall(requested=None, box=None, size=None, error="not_a_number")
RIGHT = "<think>a</think><answer>cup</answer>"


def siblings(*calls, text=RIGHT, is_right=None, num_sampled=0, max_new_tokens=100, gold=()):
    rollouts = [
        Played(Trajectory(prompt_ids=[], text=text, calls=[*one], is_sampled=[True] * num_sampled), "cup", "", gold)
        for one in calls
    ]
    return Siblings(rollouts=rollouts, is_right=is_right or [True] * len(calls), max_new_tokens=max_new_tokens)


@pytest.mark.parametrize(("num_looking", "paid"), [(1, 0.2), (2, 0.1), (3, 0.0), (10, 0.0)])
def test_curiosity_pays_for_a_crop_where_few_siblings_made_one(num_looking, paid) -> None:
    group = siblings(*[[CROP]] * num_looking, *[[REFUSED]] * (10 - num_looking))
    assert TERMS["curiosity"](group) == pytest.approx([paid] * num_looking + [0.0] * (10 - num_looking))


def test_redundancy_counts_every_call_after_the_first() -> None:
    assert TERMS["redundancy"](siblings([], [CROP], [CROP, REFUSED], [CROP] * 4)) == [0, 0, -1, -3]


@pytest.mark.parametrize(
    ("without", "with_crop", "paid"),
    [
        (True, True, [0, -0.75]),
        (False, True, [0, 0]),
        (True, False, [0, 0]),
    ],
)
def test_a_crop_that_a_right_sibling_did_without_was_needless(without, with_crop, paid) -> None:
    assert TERMS["necessity"](siblings([], [CROP], is_right=[without, with_crop])) == paid


PREDICTED = [Box(0, 0, 10, 10), Box(20, 20, 30, 30), Box(50, 50, 60, 60)]
GOLD = (Box(0, 0, 10, 10), Box(22, 20, 32, 30))


def test_dual_iou_has_the_value_of_its_source() -> None:
    assert dual_iou_of(PREDICTED, GOLD) == pytest.approx(0.6944, abs=5e-5)
    assert dual_iou_of(PREDICTED[:2], GOLD) == pytest.approx(0.8333, abs=5e-5)  # nothing beside the point
    assert dual_iou_of([], GOLD) == dual_iou_of(PREDICTED, ()) == 0


def test_dual_iou_pays_crops_of_the_first_picture_in_right_answers() -> None:
    calls = [ToolCall(requested=box, box=box, size=Size(56, 56), error=None) for box in PREDICTED]
    other = ToolCall(requested=CROP.box, box=CROP.box, size=Size(56, 56), error=None, image_number=2)
    group = siblings(calls, [*calls, other], calls, [other], is_right=[True, True, False, True], gold=GOLD)
    assert TERMS["dual_iou"](group) == pytest.approx([0.6944, 0.6944, 0, 0], abs=5e-5)


@pytest.mark.parametrize(("num_sampled", "paid"), [(0, 0), (80, 0), (90, -0.5), (100, -1), (120, -1)])
def test_overlong_falls_in_the_last_fifth_of_the_limit(num_sampled, paid) -> None:
    assert TERMS["overlong"](siblings([], num_sampled=num_sampled)) == pytest.approx([paid])


@pytest.mark.parametrize(
    ("text", "paid"),
    [(RIGHT, 0), ("a" * 100, -1), ("I see a cup here. " * 5, -1), ("I see a cup. " * 2, 0), ("no no no", 0)],
)
def test_repetition_is_punished_beyond_half_of_the_text(text, paid) -> None:
    assert TERMS["repetition"](siblings([], text=text)) == [paid]


@pytest.mark.parametrize(("text", "paid"), [(RIGHT, 0), ("cup", -1), (RIGHT + "!", -1)])
def test_misformat_is_any_text_but_thinking_and_one_answer(text, paid) -> None:
    assert TERMS["misformat"](siblings([], text=text)) == [paid]
