"""Yes and no."""

from __future__ import annotations

import pytest

from looktwice.judging.yes_no import read_yes_no, says


@pytest.mark.parametrize(
    ("text", "word"), [("Yes.", "yes"), ("No, it isn't", "no"), ("TRUE", "true"), ("No one", None), ("No. 5", None)]
)
def test_a_gold_answer_is_a_word_alone_or_with_a_short_sentence(text: str, word: str | None) -> None:
    assert read_yes_no(text) == word


@pytest.mark.parametrize("text", ["NO!", "No-it is red", "No, 5 of them are red", "No. Nobody", "No, they couldn't"])
def test_what_is_said_beside_it_may_be_anything_that_agrees(text: str) -> None:
    assert says("no", text)


@pytest.mark.parametrize(
    "text", ["No-ball", "No. of men", "No. #5", "No, they do have one", "No, partly", "No, it may"]
)
def test_another_word_a_doubt_and_the_contrary_are_no_no(text: str) -> None:
    assert not says("no", text)
