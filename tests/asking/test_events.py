"""Events: whole letters, and text split into thinking and what is said, however it comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looktwice.asking.events import Letters, Said, Splitter, Thinking

WHOLE = "<think>\nA <b> cup. <tool_call>[1, 2]</tool_call>\nRed < blue.\n</think>\n\nSo: <answer>red</answer>"


def told(*pieces: str) -> tuple[str, str]:
    """All thinking and all that is said of a text in pieces."""
    splitter = Splitter()
    events = [event for piece in pieces for event in splitter.add(piece)] + [*splitter.end()]
    return tuple("".join(one.text for one in events if isinstance(one, kind)) for kind in (Thinking, Said))


def test_thinking_and_what_is_said_come_without_tags_and_calls() -> None:
    assert told(WHOLE) == ("\nA <b> cup. \nRed < blue.\n", "\n\nSo: red")


@given(st.lists(st.integers(0, len(WHOLE)), max_size=6).map(sorted))
def test_it_does_not_matter_where_a_text_is_cut(cuts: list[int]) -> None:
    pieces = [WHOLE[start:end] for start, end in zip([0, *cuts], [*cuts, len(WHOLE)])]
    assert told(*pieces) == told(WHOLE)


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("plain", ("", "plain")),
        ("<think>cut", ("cut", "")),
        ("a<think>b</think>c<think>d</think>e", ("bd", "ace")),
        ("<think>a</think>b <tool_call>[1,", ("a", "b ")),
        ("2 <", ("", "2 <")),
        ("<answer>2 <ans", ("", "2 <ans")),
    ],
)
def test_texts_that_are_cut_or_unusual_are_told_too(text: str, events: tuple[str, str]) -> None:
    assert told(text) == events


def test_what_may_become_a_tag_waits() -> None:
    splitter = Splitter()
    assert [*splitter.add("so<ans")] == [Said("so")]
    assert [*splitter.add("wer>red")] == [Said("red")]


def letters_of(raw: bytes) -> list[str]:
    letters = Letters(lambda ids: bytes(ids).decode(errors="replace"))
    return [*map(letters.add, raw), letters.end()]


def test_half_a_letter_waits_for_the_rest() -> None:
    assert letters_of("aé猫".encode()) == ["a", "", "é", "", "", "猫", ""]


def test_half_a_letter_at_the_end_is_told_as_it_is() -> None:
    assert letters_of("a猫".encode()[:-1]) == ["a", "", "", "\ufffd"]


def test_what_never_becomes_a_letter_does_not_wait_for_ever() -> None:
    assert "".join(letters_of(b"\xff" * 20)).count("\ufffd") == 20
