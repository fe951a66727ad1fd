"""Words after the letter of an option that take it back, and words that are its text."""

from __future__ import annotations

import pytest

from looktwice.judging.retractions import is_retracted


@pytest.mark.parametrize(
    "said", ["is wrong", "could be right", "or red", "so C", ", C", "red. No, blue", "both B and C"]
)
def test_a_letter_is_taken_back_by_a_denial_a_doubt_and_another_pick(said: str) -> None:
    assert is_retracted("B", f" {said}", said)


@pytest.mark.parametrize("said", ["not visible", "red or blue", "Solution C", "A cat", "F = ma", "neither A nor C"])
def test_the_text_of_an_option_takes_nothing_back(said: str) -> None:
    assert not is_retracted("B", f". {said}", said)


def test_an_aside_takes_back_what_is_a_text_after_a_point() -> None:
    assert is_retracted("B", ": wrong", "wrong")
    assert not is_retracted("B", ". wrong", "wrong")
