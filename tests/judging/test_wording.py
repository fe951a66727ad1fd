"""One spelling for signs and for words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looktwice.judging.wording import plain, words


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("５\\,\\text{cm}²", "5 cm^2"),
        ("1½", "1 1/2"),
        ("“a”\u00a0–\u200b b", '"a" - b'),
        ("R&amp;B", "R&B"),
        ("25^\\circ\\text{C}", "25°C"),
        ("1\\frac{1}{2}", "1 1/2"),
        ("mW", "mW"),
    ],
)
def test_signs_have_one_spelling_and_numbers_keep_their_value(text: str, spelled: str) -> None:
    assert plain(text) == spelled


@pytest.mark.parametrize(
    ("text", "spelled"),
    [("The U.S. ice-cream.", "us ice cream"), ("...", "..."), ("Hepatitis A virus", "hepatitis a virus"), ("a", "a")],
)
def test_words_lose_what_says_nothing(text: str, spelled: str) -> None:
    assert words(text) == spelled


@given(st.lists(st.text("abcdefghij", min_size=1, max_size=8), min_size=1, max_size=5))
def test_case_and_spaces_never_matter_for_words(some: list[str]) -> None:
    assert words("  ".join(some).upper()) == words("\n".join(some))


@given(st.text(max_size=60))
def test_plain_text_is_plain_already(text: str) -> None:
    assert plain(text) == " ".join(plain(text).split())
