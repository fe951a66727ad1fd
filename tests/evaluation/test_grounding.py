"""How crops meet the boxes that hold the answer."""

from __future__ import annotations

import pytest

from looktwice.evaluation.grounding import coverage, grounding_of
from looktwice.geometry import Box


def test_what_crops_or_gold_boxes_share_counts_once() -> None:
    gold = Box(0, 0, 10, 10)
    assert coverage([gold], [Box(0, 0, 5, 10), Box(0, 0, 10, 5)]) == 0.75
    assert coverage([gold, Box(0, 0, 5, 10)], [Box(-5, -5, 5, 20)]) == 0.5
    assert coverage([gold], [Box(20, 20, 30, 30)]) == 0.0
    assert coverage([gold, Box(10, 0, 30, 10)], [gold]) == pytest.approx(1 / 3)


def crop(*box: int, image: int = 1) -> dict[str, object]:
    return {"box": list(box) or None, "image": image}


def test_answers_without_crop_or_gold_box_are_left_out_and_the_others_split_by_what_they_saw() -> None:
    gold = [[0, 0, 10, 10]]
    lines = [
        {"gold_boxes": gold, "crops": [crop(0, 0, 10, 10), crop(50, 50, 60, 60)], "score": 1.0},
        {"gold_boxes": gold, "crops": [crop(0, 0, 10, 8)], "score": 0.0},
        {"gold_boxes": gold, "crops": [crop(20, 0, 40, 8)], "score": 0.0},
        {"gold_boxes": gold, "crops": [crop(), crop(0, 0, 10, 10, image=2)], "score": 1.0},
        {"gold_boxes": [], "crops": [crop(0, 0, 9, 9)], "score": 1.0},
    ]
    found = grounding_of(lines)
    assert found is not None and found.num_answers == 3
    assert (found.max_iou, found.coverage, found.above_half) == pytest.approx((0.6, 0.6, 2 / 3))
    assert (found.read_wrong, found.located_wrong) == pytest.approx((1 / 3, 1 / 3))
    assert grounding_of(lines[3:]) is None
