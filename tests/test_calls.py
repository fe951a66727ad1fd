"""The call syntax: what is a call, what is refused and why, how a text is cut after its calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looktwice.calls import (
    MAX_WORDS_LENGTH,
    TOOL_CALL_CLOSE,
    TOOL_CALL_OPEN,
    WRITTEN_CALL,
    Call,
    format_call,
    parse_call,
    split_calls,
)
from looktwice.errors import BoxError
from looktwice.geometry import Box

SYNTAX = st.lists(
    st.sampled_from(
        [TOOL_CALL_OPEN, TOOL_CALL_CLOSE, "[", "]", ",", "1", "2.5", "-3", "1e4", "Crop ", "image ", "{", "\n", "nan"]
    )
).map("".join)


@pytest.mark.parametrize(
    "text, box",
    [
        ("[1, 2, 30, 40]", (1, 2, 30, 40)),
        ("[234.57,0.77 ,\n545.81, 287.13]", (234.57, 0.77, 545.81, 287.13)),
        ("[-1.5, +2, 3e2, 4.E1]", (-1.5, 2, 300, 40)),
        ("[.5, 0, 1, 1]", (0.5, 0, 1, 1)),
        ("Crop [1, 2, 30, 40]", (1, 2, 30, 40)),
        ("\nCrop the wine bottle 1, bottle 2 [1, 2, 30, 40] \n", (1, 2, 30, 40)),
        ("<tool_call>[1, 2, 30, 40]</tool_call>", (1, 2, 30, 40)),
        ("I see [it]. <tool_call>Crop [1, 2, 30, 40]</tool_call>", (1, 2, 30, 40)),
        ("<tool_call>[5, 6, 7, 8] oh <tool_call>[1, 2, 30, 40]</tool_call>", (1, 2, 30, 40)),
    ],
)
def test_a_call_gives_its_box(text: str, box: tuple[float, ...]) -> None:
    assert parse_call(text) == (Box(*box), 1)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no_box"),
        ("1, 2, 30, 40", "no_box"),
        ("Crop the left part", "no_box"),
        ("[1, 2, 30, 40", "no_box"),
        ("1, 2, 30, 40]", "no_box"),
        ("[1, 2, 30, 40] please", "no_box"),
        ('{"bbox_2d": [1, 2, 30, 40]}', "no_box"),
        ('{"bbox_2d": [1, 2, 30, 40]', "no_box"),
        ("see " * 40 + "[1, 2, 30, 40]", "no_box"),
        ("[1, 2, 30, 40]</tool_call>", "no_box"),
        ("<tool_call>[1, 2, 30, 40]", "no_box"),
        ("[]", "wrong_length"),
        ("[1, 2, 30]", "wrong_length"),
        ("[1 2 30 40]", "wrong_length"),
        ("[1, 2, 30, 40,]", "wrong_length"),
        ("[1, 2, 30, 40], [1, 2, 30, 40]", "wrong_length"),
        ("[1, , 30, 40]", "not_a_number"),
        ("[[1, 2, 30, 40]]", "not_a_number"),
        ("[[1, 2], [30, 40]]", "not_a_number"),
        ('["1", "2", "30", "40"]', "not_a_number"),
        ("[1, 2, 30, true]", "not_a_number"),
        ("[1, 2, 30, 4_0]", "not_a_number"),
        ("[1, 2, 30, 0x28]", "not_a_number"),
        ("[1, 2, 30, ４０]", "not_a_number"),
        ("[1, 2, 30, 1.2.3]", "not_a_number"),
        ("[1, 2, 30, 10**9]", "not_a_number"),
        ("[NaN, NaN, NaN, NaN]", "not_a_number"),
        ("[-Infinity, 2, Infinity, 40]", "not_a_number"),
        ("[1, 2, 30, 1e999]", "not_a_number"),
        (f"[1, 2, 30, {'9' * 5000}]", "not_a_number"),
        ("[30, 2, 1, 40]", "reversed"),
        ("[1, 40, 30, 2]", "reversed"),
        ("[1, 2, 1, 40]", "reversed"),
    ],
)
def test_anything_else_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(BoxError) as caught:
        parse_call(text)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 200


@given(st.text() | SYNTAX)
def test_no_text_makes_the_parser_raise_anything_but_a_box_error(text: str) -> None:
    for candidate in (text, f"[{text}]", f"{TOOL_CALL_OPEN}{text}{TOOL_CALL_CLOSE}"):
        try:
            box = parse_call(candidate).box
        except BoxError as error:
            assert error.reason in {"no_box", "wrong_length", "not_a_number", "reversed"}
        else:
            assert box.x1 < box.x2 and box.y1 < box.y2


@pytest.mark.parametrize(
    "words, number",
    [
        ("image 2 ", 2),
        ("picture 2", 2),
        ("PICTURE 2: ", 2),
        ("Crop cup in Image 12 ", 12),
        ("Crop cup of image 3, left ", 3),
        ("image 02 ", 2),
        ("image #2 ", 2),
        ("image_2 ", 2),
        ("image2 ", 2),
        ("image 0 ", 0),
        ("as in image 1, image 2 ", 2),
        ("Crop cup 1 ", 1),
        ("images 2 ", 1),
        ("the pictured 2 ", 1),
        ("subimage 2 ", 1),
        ("image 2.5 ", 1),
        ("image 2nd ", 1),
        ("image two ", 1),
        ("image ２ ", 1),
        ("2 image ", 1),
        ("", 1),
    ],
)
def test_the_words_of_a_call_name_its_picture(words: str, number: int) -> None:
    assert parse_call(f"<tool_call>{words}[1, 2, 30, 40]</tool_call>") == (Box(1, 2, 30, 40), number)


def test_words_outside_the_call_name_no_picture() -> None:
    assert parse_call("In image 2: <tool_call>[1, 2, 30, 40]</tool_call>").image_number == 1


def test_a_number_as_long_as_words_may_be_is_read() -> None:
    assert parse_call(f"image{'9' * (MAX_WORDS_LENGTH - 5)}[1, 2, 30, 40]").image_number == 10**75 - 1


def test_a_call_picks_what_stands_for_its_picture() -> None:
    box = Box(1, 2, 30, 40)
    assert [Call(box).pick("ab"), Call(box, 2).pick("ab")] == ["a", "b"]
    for number, images, reason in ((1, "", "no_picture"), (0, "ab", "no_such_picture"), (3, "ab", "no_such_picture")):
        with pytest.raises(BoxError) as caught:
            Call(box, number).pick(images)
        assert caught.value.reason == reason


@given(st.integers(0, 10**9))
def test_the_number_of_a_picture_is_read_back(number: int) -> None:
    assert parse_call(format_call((1, 2, 30, 40), number)) == (Box(1, 2, 30, 40), number)


def test_a_call_is_written_with_comma_and_space() -> None:
    assert format_call(["1", "2.50", "30", "4e1"]) == "<tool_call>[1, 2.50, 30, 4e1]</tool_call>"
    assert format_call(Box(1.0, 2.5, 30.0, 40.0)) == "<tool_call>[1, 2.5, 30, 40]</tool_call>"
    assert format_call((1, 2, 30, 40)) == "<tool_call>[1, 2, 30, 40]</tool_call>"


@given(st.lists(st.floats(-1e299, 1e299), min_size=4, max_size=4))
def test_a_written_box_is_read_back_exactly(numbers: list[float]) -> None:
    x1, x2 = sorted(numbers[:2])
    y1, y2 = sorted(numbers[2:])
    if x1 < x2 and y1 < y2:
        assert parse_call(format_call(Box(x1, y1, x2, y2))) == (Box(x1, y1, x2, y2), 1)


@pytest.mark.parametrize(
    "text, segments",
    [
        ("", [""]),
        ("no call", ["no call"]),
        ("a</tool_call>", ["a</tool_call>", ""]),
        ("a</tool_call>b</tool_call>\nc", ["a</tool_call>", "b</tool_call>", "\nc"]),
    ],
)
def test_a_text_is_cut_right_after_each_call(text: str, segments: list[str]) -> None:
    assert split_calls(text) == segments


@given(st.text() | SYNTAX)
def test_segments_joined_give_the_text_back(text: str) -> None:
    *calls, rest = split_calls(text)
    assert "".join([*calls, rest]) == text
    assert all(call.endswith(TOOL_CALL_CLOSE) and call.count(TOOL_CALL_CLOSE) == 1 for call in calls)
    assert TOOL_CALL_CLOSE not in rest


def test_a_call_is_found_from_its_last_opening_tag_and_at_once_where_none_is_closed() -> None:
    assert WRITTEN_CALL.findall("<tool_call> or <tool_call>[1, 2, 3, 4]</tool_call>") == [
        "<tool_call>[1, 2, 3, 4]</tool_call>"
    ]
    assert WRITTEN_CALL.findall("<tool_call>" * 100_000) == []


def test_a_number_of_many_digits_is_refused_at_once() -> None:
    with pytest.raises(BoxError, match="got"):
        parse_call(f"[{'1' * 200_000}x, 2, 3, 4]")
