"""Finding the answer in a completion and judging it by rules."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looktwice.answers import (
    MAX_ANSWER_CHARS,
    answers_match,
    extract_answer,
    find_answer_block,
    split_thinking,
    strip_tool_text,
    unwrapped,
)


@pytest.mark.parametrize(
    ("text", "thinking", "rest"),
    [
        ("<think>\nI look.\n</think>\n\nSTOP", "I look.", "STOP"),
        ("I look.</think>STOP", "I look.", "STOP"),
        ("STOP", "", "STOP"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("<think>cut off in the mid", "cut off in the mid", ""),
        ("Well. <think>cut", "cut", "Well."),
        ("", "", ""),
    ],
)
def test_thinking_ends_at_the_first_closing_tag(text, thinking, rest):
    assert split_thinking(text) == (thinking, rest)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>x</think><answer>STOP</answer>", "STOP"),
        ("<answer>x</answer> then <answer>STOP</answer>", "STOP"),
        ("<answer>The format is <answer>STOP</answer>", "STOP"),
        ("<answer>STOP</answer> junk </answer>", "STOP"),
        ("<think><answer>draft</answer></think><answer>\nfinal\n</answer>", "final"),
        ("<answer>it is \\boxed{\\frac{1}{2}}</answer>", "\\frac{1}{2}"),
        ("<answer></answer>", None),
        ("<think>x</think><answer>STO", None),
        ("<answer>draft</answer> <answer>STO", "draft"),
        ("<think>I write <answer> soon</think>STOP", "STOP"),
        ("<think>x</think>The sign reads\nSTOP\n", "STOP"),
        ("<think>x</think>so \\boxed{7} it is", "7"),
        ("<think>x</think>so \\boxed{7", "so \\boxed{7"),
        ("<think>x</think>Final answer: STOP\nThanks.", "STOP"),
        ("<think>x</think>The answer is STOP", "STOP"),
        ("<think>x</think>The answer is STOP.\nI don't think the answer is GO.", "STOP."),
        ("<think>x</think>The answer is STOP\nThe wrong answer is GO", "STOP"),
        ("<think>x</think>I doubt that the answer is GO", "I doubt that the answer is GO"),
        ("<think>x</think>It is not red, so the answer is STOP", "STOP"),
        ("<think>x</think><tool_call>[1, 2, 3, 4]</tool_call>STOP", "STOP"),
        ("<think>still thinking", None),
        ("", None),
        ("<think>draft <answer>a</answer></think>STOP", "STOP"),
        ("<think>cut <answer>a</answer>", None),
        ("<think>x</think><answer>STOP</answer><think><answer>a</answer></think>", "STOP"),
        ("<think>x</think><answer>STOP</answer><think><answer>a</answer>", "STOP"),
    ],
)
def test_answer_is_the_last_complete_block_after_the_thinking_or_what_follows_it(text, answer):
    assert extract_answer(text) == answer


def test_answer_block_is_given_whole():
    assert find_answer_block("<answer>\nSo \\boxed{7}\n</answer>") == "So \\boxed{7}"
    assert find_answer_block("STOP") is None


@given(st.text())
def test_no_text_breaks_the_extraction(text):
    answer = extract_answer(text)
    assert answer is None or answer == answer.strip() != ""
    find_answer_block(text)


@given(st.text(st.characters(exclude_characters="<\\")), st.text(st.characters(exclude_characters="<")))
def test_answer_in_a_block_is_found_behind_any_text(content, before):
    assert extract_answer(f"{before}<answer>{content}</answer>") == (content.strip() or None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" a cup ", "a cup"),
        ("<answer>a cup</answer>", "a cup"),
        ("<think>Two.</think>\n\n<answer>\n$\\boxed{2}$\n</answer>", "2"),
        ("<think>Two.</think> 2", "2"),
        ("So it is \\boxed{\\text{B}}.", "B"),
        ("$7$", "7"),
        ("$$\\frac{1}{2}$$", "\\frac{1}{2}"),
        ("\\(7\\)", "7"),
        ("\\[ 7 \\]", "7"),
        ("The answer is $7$", "7"),
        ("Final answer: (B) red", "(B) red"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234", "1,234"),
        ("The answer is written on the sign.\nIt says 7", "The answer is written on the sign.\nIt says 7"),
        ("$5 or $6", "$5 or $6"),
        ("$$", "$$"),
        ("<answer>a cup", "<answer>a cup"),
        ("<answer> </answer>", ""),
        ("\\boxed{}", ""),
    ],
)
def test_an_answer_is_taken_out_of_what_wraps_it(text, said):
    assert unwrapped(text) == said
    assert answers_match(f"{said}", text) == (said != "")


def test_tool_text_is_removed_call_by_call():
    text = "a<tool_call>[1]</tool_call>b<tool_call>[2]</tool_call><tool_response>Refused.</tool_response>c<tool_call>[3"
    assert strip_tool_text(text) == "abc<tool_call>[3"


@pytest.mark.parametrize(
    "text", ["<answer>", "<tool_call>", "{", "<think>", "\\boxed{", "answer is ", " ", "a. ", "$", "\\("]
)
def test_repeated_marks_take_linear_time(text):
    start = time.perf_counter()
    extract_answer(text * 4000)
    answers_match(text * 90, text * 80 + "B")
    strip_tool_text(text * 4000)
    unwrapped(text * 4000)
    assert time.perf_counter() - start < 1.0


def test_answer_that_is_too_long_never_matches():
    longest = "x" * MAX_ANSWER_CHARS
    assert answers_match(longest, longest)
    assert not answers_match(longest + "x", longest + "x")


@given(st.text(max_size=MAX_ANSWER_CHARS).filter(lambda text: text.split()))
def test_every_answer_matches_itself(text):
    assert answers_match(text, text)


@given(st.text(max_size=50), st.text(max_size=50))
def test_no_pair_breaks_the_judge(prediction, solution):
    answers_match(prediction, solution)


@given(st.integers(), st.integers(0, 99))
def test_numbers_match_with_and_without_separators(whole, hundredths):
    assert answers_match(f"{whole:,}.{hundredths:02}", f"{whole}.{hundredths:02}0")
