"""The option a gold answer is, and the one an answer picks."""

from __future__ import annotations

import pytest

from looktwice.judging.choices import Choice, picked, read_choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", Choice("B")),
        ("(b)", Choice("B")),
        ("(B) red", Choice("B", "red")),
        ("B. red", Choice("B", "red")),
        ("N. Broadway", Choice("N", "Broadway", is_either=False)),
        ("E. coli", Choice("E", "coli", is_either=False)),
        ("E. Not visible", Choice("E", "Not visible")),
        ("A: 12", Choice("A", "12", is_either=False)),
        ("(A) or (B)", None),
        ("Vitamin C", None),
        ("a cat", None),
    ],
)
def test_a_gold_answer_is_an_option_where_it_is_written_as_one(text: str, choice: Choice | None) -> None:
    assert read_choice(text) == choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("So the answer is (B).", Choice("B")),
        ("I", Choice("I")),
        ("B is correct", Choice("B")),
        ("**B**", Choice("B")),
        ("B - red", Choice("B", "red")),
        ("答案是B", Choice("B")),
        ("Not B", None),
        ("A or B", None),
        ("Vitamin C", None),
        ("A. red B. blue", None),
        ("B. No, C", Choice("B", "No, C", is_either=False)),
        ("T. Rex", None),
    ],
)
def test_a_pick_is_a_letter_with_nothing_beside_it_that_matters(text: str, choice: Choice | None) -> None:
    assert picked(text) == choice
