"""Finding the answer in a completion and judging it by rules."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looktwice.answers import (
    MAX_ANSWER_CHARS,
    answers_match,
    extract_answer,
    extract_choice,
    find_answer_block,
    normalise_answer,
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
        ("<think>x</think><tool_call>[1, 2, 3, 4]</tool_call>STOP", "STOP"),
        ("<think>still thinking", None),
        ("", None),
    ],
)
def test_answer_is_the_last_complete_block_or_what_follows_the_thinking(text, answer):
    assert extract_answer(text) == answer


def test_answer_block_is_given_whole():
    assert find_answer_block("<answer>\nSo \\boxed{7}\n</answer>") == "So \\boxed{7}"
    assert find_answer_block("STOP") is None


@given(st.text())
def test_no_text_breaks_the_extraction(text):
    answer = extract_answer(text)
    assert answer is None or answer == answer.strip() != ""
    extract_choice(text, ["red", "blue"])


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
    extract_choice(text * 4000, ["red", "blue"])
    strip_tool_text(text * 4000)
    unwrapped(text * 4000)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("prediction", "solution"),
    [
        ("STOP", "STOP"),
        ("  the\n stop sign. ", "Stop sign"),
        ("\u201cred\u201d", "red"),
        ("**Red**", "red"),
        ("?", "?"),
        ("Pepsi", "Dr. Pepper/Pepsi"),
        ("Dr. Pepper/Pepsi", "Dr. Pepper/Pepsi"),
        ("five", "5/five"),
        ("12/05/2020", "12/05/2020"),
        ("km/h", "km/h"),
        ("N/A", "N/A"),
        ("7.0", "7"),
        ("7", "7.0"),
        ("seven", "7"),
        ("1,234,567", "1234567"),
        ("-3", "\u22123.00"),
        (".5", "1/2"),
        ("1/2", "0.5"),
        ("50 %", "50%"),
        ("$5.00", "$5"),
        ("Yes, it is.", "yes"),
        ("No", "no"),
        ("(B)", "B"),
        ("b.", "B"),
        ("B. red", "B"),
        ("The answer is (B)", "B"),
        ("B", "(B) red"),
        ("red", "(B) red"),
        ("B", "B. red"),
        ("B) red", "(B) red"),
        ("0.00001", "1e-05"),
        ("1 \\times 10^{-5}", "1e-05"),
        ("1.2 x 10^3", "1200"),
        ("2.5E3", "2,500"),
        ("0.1", "0.10000000149011612"),
        ("0.3", "0.30000000000000004"),
        ("12.34", "12.3400001526"),
        ("10000.1", "10000.099609375"),
        ("R&B", "R&amp;B"),
        ("red", "red\u200b"),
        ("5%", "5\\%"),
        ("1/2", "\\frac{1}{2}"),
        ("1,234", "1{,}234"),
        ("$7$", "7"),
        ("7", "$7$/seven"),
    ],
)
def test_right_answer_in_another_writing_matches(prediction, solution):
    assert answers_match(prediction, solution)


@pytest.mark.parametrize(
    ("prediction", "solution"),
    [
        (None, "STOP"),
        ("", "STOP"),
        ("", ""),
        ("!", ""),
        ("STOP or GO", "STOP"),
        ("2020", "12/05/2020"),
        ("h", "km/h"),
        ("A", "N/A"),
        ("3", "3/4"),
        ("70", "7"),
        ("7 apples", "7"),
        ("1,2", "12"),
        ("50", "50%"),
        ("1/0", "0"),
        ("yes and no", "yes"),
        ("nothing", "no"),
        ("Yes, " + "x" * 60, "yes"),
        ("A or B", "B"),
        ("a or b", "B"),
        ("C", "B"),
        ("(A) B", "B"),
        ("a bus", "A"),
        ("blue", "(B) red"),
        ("cat", "a"),
        ("a", "a cat"),
        ("B", "A B"),
        ("vitamin", "vitamin a"),
        ("0.11", "0.10000000149011612"),
        ("16777216", "16777217"),
        ("1234567.9", "1234567.891"),
        ("0.1", "1e-05"),
        ("1e-05", "1e-06"),
        ("red", "red <answer>blue</answer>"),
        ("STOP " + "x" * MAX_ANSWER_CHARS, "STOP"),
    ],
)
def test_wrong_or_hedged_answer_does_not_match(prediction, solution):
    assert not answers_match(prediction, solution)


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


def test_normalised_answer_keeps_lone_letters_and_signs():
    assert normalise_answer(" The  Cat's \u201chat\u201d. ") == "cat's \"hat"
    assert normalise_answer("A") == "a"
    assert normalise_answer("...") == "..."


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>B</answer> or rather A", "B"),  # 1 answer block
        ("(A) at first, then \\boxed{C}", "C"),  # 2 boxed
        ("\\boxed{\\text{B}}", "B"),
        ("(A) is tempting. The answer is c.", "C"),  # 3 stated
        ("The answer is A. No, the answer is B.", "B"),
        ("Final answer: option D", "D"),
        ("The answer is a blue one", "B"),
        ("I would pick (b).", "B"),  # 4 in parentheses
        ("The object(s) at f(a) are (B)", "B"),
        ("B. A red bus", "B"),  # 5 at the start
        ("B. Neither A nor C", "B"),
        ("b) red", "B"),
        ("It must be D", "D"),  # 6 lone letter
        ("A", "A"),
        ("a", "A"),
        ("B, a red bus", "B"),
        ("I think C", "C"),
        ("Option A", "A"),
        ("it is the red one", "A"),  # 7 only option text contained
        ("dark blue", "C"),
        ("(A) or (B)", None),  # several letters
        ("A or B", None),
        ("B and C", None),
        ("a red or blue bus", None),
        ("A bus", None),
        ("(E)", None),  # not an option
        ("The answer is E", None),
        ("reddish", None),
        ("scarred", None),
        ("<think>B", None),
        ("", None),
    ],
)
def test_choice_follows_the_order_of_the_harnesses(text, letter):
    assert extract_choice(text, ["red", "blue", "dark blue", "green"]) == letter


@pytest.mark.parametrize(
    ("prediction", "solution"), [("7", "\uff17"), ("7", r"\fbox{7}"), (r"\fbox{\text{cup}}", "cup")]
)
def test_full_width_digits_and_another_box_of_latex_are_read(prediction: str, solution: str) -> None:
    assert answers_match(prediction, solution)
    assert answers_match(solution, prediction)
