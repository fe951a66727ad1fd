"""Grounding marks to pixels of the original picture."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looktwice.errors import DataError
from looktwice.geometry import Size
from looktwice.grounding import Grounding, format_grounding, parse_grounding

SIZE = Size(1000, 500)


def box(x1, y1, x2, y2, phrase=None):
    return (phrase, "box", pytest.approx((x1, y1, x2, y2)))


def point(x, y, phrase=None):
    return (phrase, "point", pytest.approx((x, y)))


def places(text):
    return [(found.phrase, found.kind, found.coordinates) for found in parse_grounding(text, SIZE)]


def test_examples_of_the_model_card():
    text = "The <ref>airplane</ref> is found within <box>(0.613,0.085),(0.632,0.107)</box> of the image."
    assert places(text) == [box(613, 42.5, 632, 53.5, "airplane")]
    text = "<ref>three birds</ref>[<box>(0.401,0.526),(0.430,0.557)</box>,<box>(0.489,0.494),(0.516,0.526)</box>]"
    assert places(text) == [
        box(401, 263, 430, 278.5, "three birds"),
        box(489, 247, 516, 263, "three birds"),
    ]
    text = "[<point>(0.084,0.192)</point>,<point>(0.336,0.323)</point>]"
    assert places(text) == [point(84, 96), point(336, 161.5)]


def test_each_place_belongs_to_the_nearest_phrase_before_it():
    text = (
        "<box>(0,0),(0.1,0.1)</box> <ref>cup</ref> on <ref>a\n table</ref><point>(.5,.5)</point>, <box>(0,0,1,1)</box>"
    )
    assert places(text) == [
        box(0, 0, 100, 50),
        point(500, 250, "a table"),
        box(0, 0, 1000, 500, "a table"),
    ]


@pytest.mark.parametrize(
    "written",
    [
        "<box>(0.1,0.2),(0.3,0.4)</box>",
        "<box> ( 0.1 , 0.2 ) ,\n ( 0.3 , 0.4 ) </box>",
        "<box>[0.1, 0.2, 0.3, 0.4]</box>",
        "<box>(.1 0.2)(0.3 0.400)</box>",
        "<BOX>(0.1,0.2),(0.3,0.4)</BOX>",
        "<box>(0.3,0.4),(0.1,0.2)</box>",
        "<box>(0.3,0.2),(0.1,0.4)</box>",
        "<box>(0.9,<box>(0.1,0.2),(0.3,0.4)</box>",
        "<box>[[0.1, 0.2], [0.3, 0.4]]</box>",
        "<box>{1e-1; 0.2; 0.3; 4e-1}</box>",
        "<box >\uff080.1\uff0c0.2\uff09\uff0c\uff080.3\uff0c0.4\uff09</ box>",
    ],
)
def test_other_writings_of_a_box_are_read(written):
    assert places(written) == [box(100, 100, 300, 200)]


def test_several_boxes_between_two_tags_are_read():
    assert places("<box>[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]</box>") == [
        box(100, 100, 300, 200),
        box(500, 300, 700, 400),
    ]


@pytest.mark.parametrize(
    "content",
    [
        "(0.1,0.2),(0.3)",
        "(0.1,0.2),(0.3,0.4),(0.5,0.6)",
        "(0.1,0.2),(0.3,four)",
        "(0.1,0.2),(0.3,0.4.5)",
        "(0.1,0.2),(nan,inf)",
        "(100,200),(300,400)",
        "[100, 200, 300, 400]",
        "(0.1,0.2),(0.3,1.02)",
        "(0.1,0.2)",
        "",
    ],
)
def test_a_box_that_is_no_place_in_the_image_is_given_as_it_is_written(content):
    [found] = parse_grounding(f"<ref>cup</ref><box>{content}</box>", SIZE)
    assert found == Grounding(phrase="cup", kind="box", coordinates=None, written=content)


@pytest.mark.parametrize("content", ["(0.1,0.2),(0.3,0.4)", "(-0.02,0.2)", "(10, 20)"])
def test_a_point_that_is_no_place_in_the_image_is_given_as_it_is_written(content):
    [found] = parse_grounding(f"<point>{content}</point>", SIZE)
    assert found == Grounding(phrase=None, kind="point", coordinates=None, written=content)


@pytest.mark.parametrize("written", ["<box>(0.1,0.2),(0.3,0.4)", "(0.1,0.2),(0.3,0.4)", "<box>(0.1,0.2)<box>"])
def test_what_is_no_whole_mark_is_text(written):
    assert parse_grounding(written, SIZE) == []


def test_rounding_slips_at_the_edge_are_clamped():
    assert places("<point>(1.004,-0.003)</point>") == [point(1000, 0)]


fractions = st.floats(0, 1).map(lambda value: round(value, 3))


@given(fractions, fractions, fractions, fractions, st.text())
def test_every_written_box_lies_in_the_image(x1, y1, x2, y2, around):
    around = around.replace("<", "")
    written = f"{around}<box>({x1},{y1}),({x2},{y2})</box>{around}"
    assert places(written) == [box(min(x1, x2) * 1000, min(y1, y2) * 500, max(x1, x2) * 1000, max(y1, y2) * 500)]


# -- the reverse


@pytest.mark.parametrize(
    ("places", "options", "written"),
    [
        ([[613, 42.5, 632, 53.5]], {"phrase": "cup"}, "<ref>cup</ref><box>(0.613,0.085),(0.632,0.107)</box>"),
        ([[84, 96], [336, 161.5]], {"kind": "point"}, "[<point>(0.084,0.192)</point>,<point>(0.336,0.323)</point>]"),
        ([[300, 200, 100, 100]], {}, "<box>(0.100,0.200),(0.300,0.400)</box>"),
        ([[0, 0, 1000, 500]], {}, "<box>(0.000,0.000),(0.999,0.999)</box>"),
        ([], {"phrase": "cup"}, "<ref>cup</ref>[]"),
    ],
)
def test_places_are_written_as_the_model_card_writes_them(places, options, written):
    assert format_grounding(places, SIZE, **options) == written


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ([0, 0, 1001, 10], "box"),
        ([-1, 0, 5, 5], "box"),
        ([1, 2], "box"),
        ([1, 2, 3, 4], "point"),
        ([float("nan"), 0], "point"),
    ],
)
def test_what_is_no_place_in_the_image_is_not_written(place, kind):
    with pytest.raises(DataError, match=f"the {kind} .* numbers inside 1000x500 pixels; mend it"):
        format_grounding([place], SIZE, kind=kind)


@given(st.lists(st.tuples(*[st.floats(0, 1000)] * 2, *[st.floats(0, 1000)] * 2), min_size=1, max_size=3))
def test_what_is_written_is_read_again(boxes):
    boxes = [(x1, y1 / 2, x2, y2 / 2) for x1, y1, x2, y2 in boxes]
    found = parse_grounding(format_grounding(boxes, SIZE, phrase="cup"), SIZE)
    assert [one.phrase for one in found] == ["cup"] * len(boxes)
    for one, (x1, y1, x2, y2) in zip(found, boxes):
        wanted = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        assert one.coordinates == pytest.approx(wanted, abs=1.01)
