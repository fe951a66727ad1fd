"""The accuracy of VQA: its normalisation step by step, and the mean with one answer left out."""

from __future__ import annotations

import pytest

from looktwice.benches.vqa import normalised, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        ("The Dog", "dog"),
        ("1,000?", "1000"),
        ("Tom's", "tom 's"),
        ("two\nwords\tthree", "2 words 3"),
        ("none", "0"),
        ("ten", "10"),
        ("two-way", "2 way"),
        ("two - way", "2 way"),
        ("no-smoking (sign)", "no smoking sign"),
        ("3.5 p.m.", "3.5 pm"),
        ("isnt", "isn't"),
        ("couldnt've", "couldn't've"),
        ("she's", "she 's"),
        ("somebody'd", "somebodyd"),
        ("an apple a day", "apple day"),
    ],
)
def test_answers_are_normalised_as_the_reference_does(answer: str, compared: str) -> None:
    assert normalised(answer) == compared


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_of_ten_answers_so_many_matches_give_so_much(matches: int, score: float) -> None:
    answers = ["Stop!"] * matches + [f"other {number}" for number in range(10 - matches)]
    assert vqa_accuracy("the stop", answers) == pytest.approx(score)
