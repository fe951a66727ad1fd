"""The option that an answer picks, rule by rule."""

from __future__ import annotations

import pytest

from looktwice.benches.extraction import Pick, picked_option, spoken

OPTIONS = ("red", "dark blue", "blue", "not visible")


@pytest.mark.parametrize(
    ("text", "letter", "by"),
    [
        ("<think>(B)</think><answer>C</answer>", "C", "lone"),
        ("<answer>A</answer> no, <answer>(b)</answer>", "B", "brackets"),
        ("So \\boxed{D}, though (A) is near", "D", "boxed"),
        ("The answer is B.", "B", "stated"),
        ("Answer: (c)", "C", "stated"),
        ("the correct answer is option D", "D", "stated"),
        ("First the answer is A. No, the answer is C", "C", "stated"),
        ("It shows (C) clearly", "C", "brackets"),
        ("C. blue", "C", "start"),
        ("b) dark blue", "B", "start"),
        ("D", "D", "lone"),
        ("a", "A", "lone"),
        ("I choose B here", "B", "lone"),
        ("The car is red.", "A", "option_text"),
        ("blue", "C", "option_text"),
        ("It cannot be made out", None, "none"),
        ("(A) or (B)", None, "none"),
        ("either B or C", None, "none"),
        ("red or blue", None, "none"),
        ("A car stands there", None, "none"),
        ("The answer is a car", None, "none"),
        ("E", None, "none"),
        ("<answer>B", None, "none"),
        ("<think>B</think>", None, "none"),
        ("Of A and B the nearer counts. Final answer: B", "B", "lone"),
    ],
)
def test_the_first_rule_that_finds_an_option_decides(text: str, letter: str | None, by: str) -> None:
    assert picked_option(text, OPTIONS) == Pick(letter, by)


def test_an_answer_is_the_block_else_what_follows_the_thinking_without_calls() -> None:
    assert spoken("<think>x</think> It is <tool_call>[1, 2, 3, 4]</tool_call>7") == "It is 7"
    assert spoken("<answer> 7 </answer>") == "7"
    assert spoken("<think>7") is None
    assert spoken("<answer></answer>") is None
    assert spoken("Long words.\n**Final answer:** 7") == "7"
    assert spoken("I give no final answer") == "I give no final answer"
