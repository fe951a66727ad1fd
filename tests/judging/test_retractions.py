"""Words after the letter of an option that take it back, and words that are its text."""

from __future__ import annotations

import pytest

from looktwice.judging.retractions import is_retracted


@pytest.mark.parametrize(
    "said", ["is an invalid option", "may be correct", "or perhaps E", "red. C is right", "B and C"]
)
def test_a_letter_is_taken_back_by_a_denial_a_doubt_and_another_pick(said: str) -> None:
    assert is_retracted("B", f" {said}", said)


@pytest.mark.parametrize("said", ["is on time", "Is wrong", "no change", "C only", "A&E", "A is true, R is false"])
def test_the_text_of_an_option_takes_nothing_back(said: str) -> None:
    assert not is_retracted("B", f". {said}", said)


def test_an_aside_takes_back_what_is_a_text_after_a_point() -> None:
    assert is_retracted("B", ": wrong", "wrong")
    assert not is_retracted("B", ". wrong", "wrong")
