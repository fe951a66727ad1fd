"""Drawings: what is drawn where, and labels beside each other."""

from __future__ import annotations

from itertools import combinations

import pytest
from PIL import Image

from looktwice.asking.answer import answer_of
from looktwice.geometry import Box, Size
from looktwice.messages import question_about
from looktwice.report.drawing import Mark, _overlap, annotated, draw, marks_of, place_label
from looktwice.rollout.trajectory import ToolCall, Trajectory


def call(box: Box | None, number: int = 1) -> ToolCall:
    return ToolCall(requested=box, box=box, size=None, error=None if box else "no_box", image_number=number)


def answer(text: str = "", *calls: ToolCall, count: int = 1):
    images = [Image.new("RGB", (200, 100)) for _ in range(count)]
    trajectory = Trajectory(prompt_ids=[], image_sizes=(Size(200, 100),) * count, text=text, calls=[*calls])
    return answer_of(trajectory, history=question_about("What?", *images))


def test_crops_are_drawn_on_the_image_they_were_cut_from() -> None:
    marks = marks_of(answer("", call(Box(1, 2, 30, 40)), call(None), call(Box(5, 6, 70, 80), 2), count=2))
    assert [(mark.label, mark.place) for mark in marks[1]] == [("crop 1", (1, 2, 30, 40))]
    assert [(mark.label, mark.place) for mark in marks[2]] == [("crop 3", (5, 6, 70, 80))]


def test_boxes_and_points_carry_their_phrase() -> None:
    text = "<ref>cup</ref><box>(0.1,0.1),(0.5,0.5)</box><point>(0.5,0.5)</point><ref>mug</ref><box>(7,7),(8,8)</box>"
    marks = marks_of(answer(text))[1]
    assert [(mark.label, len(mark.place)) for mark in marks] == [("cup", 4), ("cup", 2)]
    assert marks_of(answer("<point>(0.5,0.5)</point>"))[1][0].label == "point"


def test_every_image_of_the_conversation_is_given_at_its_own_size() -> None:
    first, second = annotated(answer("", call(Box(40, 40, 80, 80), 2), count=2))
    assert first.size == second.size == (200, 100)
    assert first.getextrema() == ((0, 0),) * 3 and second.getextrema() != ((0, 0),) * 3


def test_a_line_goes_around_a_box_and_leaves_what_is_in_it() -> None:
    image = Image.new("RGB", (200, 100))
    drawn = draw(image, [Mark(place=(50, 50, 90, 90), label="x", colour="#ff0000")])
    assert drawn.crop((50, 50, 90, 90)).getextrema() == ((0, 0),) * 3
    assert drawn.getpixel((48, 70)) == (255, 0, 0)
    assert image.getextrema() == ((0, 0),) * 3


def test_a_box_as_large_as_the_image_is_seen() -> None:
    drawn = draw(Image.new("RGB", (200, 100)), [Mark(place=(0, 0, 200, 100), label="all", colour="#ff0000")])
    assert drawn.getpixel((199, 50)) != (0, 0, 0)


@pytest.mark.parametrize("place", [(0, 0), (199, 99), (0, 0, 1, 1), (-5, -5, 300, 300)])
def test_a_mark_at_an_edge_or_beyond_is_drawn(place) -> None:
    mark = Mark(place=place, label="a label that is much wider than the picture is " * 3, colour="red")
    assert draw(Image.new("RGB", (200, 100)), [mark]).size == (200, 100)


def test_labels_of_one_place_do_not_overlap() -> None:
    taken: list = []
    for _ in range(12):
        taken.append(place_label((50, 50, 90, 90), (40, 15), taken, (200, 100), gap=2))
    assert not any(_overlap(one, other) for one, other in combinations(taken, 2))
    assert all(x1 >= 0 and y1 >= 0 and x2 < 200 and y2 < 100 for x1, y1, x2, y2 in taken)


def test_a_label_stands_above_its_box_where_it_can() -> None:
    assert place_label((50, 50, 90, 90), (40, 15), [], (200, 100), gap=2) == (50, 33, 90, 48)
    assert place_label((50, 5, 90, 45), (40, 15), [], (200, 100), gap=2)[1] == 0


def test_where_there_is_no_room_a_label_stands_above_its_box_all_the_same() -> None:
    assert place_label((5, 15, 9, 19), (10, 10), [(0, 0, 20, 20)], (20, 20), gap=1) == (5, 4, 15, 14)
