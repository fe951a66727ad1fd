"""Answers: finding the thinking and the answer in a completion, and judging an answer by rules. Pure text.

Sources: R-GRPO's answer routing and the multiple-choice order shared by the public harnesses (HR-Bench, V*Bench,
MathVista). No model judges here; what the rules cannot decide is wrong.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, TOOL_RESPONSE_CLOSE, TOOL_RESPONSE_OPEN
from looktwice.messages import ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

MAX_ANSWER_CHARS = 1000
"""A longer answer is never right: it could list every candidate (the guard of DeepEyes)."""

_ANSWER_BLOCK = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_TOOL_TEXT = re.compile(
    rf"{TOOL_CALL_OPEN}(?:(?!{TOOL_CALL_OPEN}).)*?{TOOL_CALL_CLOSE}"
    rf"|{TOOL_RESPONSE_OPEN}(?:(?!{TOOL_RESPONSE_OPEN}).)*?{TOOL_RESPONSE_CLOSE}",
    re.DOTALL,
)
_STATED_ANSWER = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)\s*(\S.*)", re.IGNORECASE)

_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u2212", "''\"\"-")
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=[^\W\d_]{2})")
_NUMBER = re.compile(r"([$€£]?) ?([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|[+-]?\.[0-9]+) ?(%?)")
_FRACTION = re.compile(r"([+-]?[0-9]+) ?/ ?([0-9]+)")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_MAX_YES_NO_CHARS = 48

_CHOICE_SOLUTION = re.compile(r"(?:\(([a-z])\)|([a-z])[.):])(?:\s+(.+))?|([a-z])", re.IGNORECASE | re.DOTALL)
_STATED_LETTER = re.compile(
    r"\banswer(?:\s+is\b\s*:?|\s*:)\s*(?:option\s+|choice\s+)?[(\[*\"']*([a-z])(?![\w'-])", re.IGNORECASE
)
_LETTER_IN_PARENTHESES = re.compile(r"(?<!\w)\(([a-z])\)", re.IGNORECASE)
_LETTER_AT_START = re.compile(r"[\s*\"']*([a-z])[.):](?:\s|$)", re.IGNORECASE)
_LONE_LETTER = re.compile(r"(?<![\w'\u2019.-])([a-z])(?![\w'\u2019-]|\.\w)", re.IGNORECASE)
_WORD_FOLLOWS = re.compile(r"\s+(?!(?:or|and)\b)[a-z]{2}", re.IGNORECASE)


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, rest), both stripped and without the think tags, split at the first `</think>`.

    The opening tag is optional, because a prompt may end in it. Without any tag everything is the rest. A block that
    was opened and never closed is thinking that was cut off: what stands before it is the rest (the official chat
    code calls the whole text the response there).
    """
    thinking, closing_tag, rest = text.partition(THINK_CLOSE)
    if closing_tag:
        return thinking.replace(THINK_OPEN, "", 1).strip(), rest.strip()
    rest, _, thinking = text.partition(THINK_OPEN)
    return thinking.strip(), rest.strip()


def strip_tool_text(text: str) -> str:
    """The text without crop calls and tool responses."""
    return _TOOL_TEXT.sub("", text)


def find_answer_block(text: str) -> str | None:
    """The stripped content of the last complete `<answer>…</answer>`, or None."""
    blocks = _ANSWER_BLOCK.findall(text)
    return blocks[-1].strip() if blocks else None


def extract_answer(text: str) -> str | None:
    """The short answer to judge in a completion, or None when it holds none.

    From the last complete answer block; without one, from the text after the thinking. There, in this order: the last
    `\\boxed{…}`; in a text without a block what follows "answer is" or "answer:"; then the block, or the last line of
    the text (as R-GRPO does). An answer block that was opened and cut off is no answer.
    """
    block = find_answer_block(text)
    if block is not None:
        return _last_boxed(block) or block or None
    _, rest = split_thinking(text)
    if ANSWER_OPEN in rest:
        return None
    rest = strip_tool_text(rest).strip()
    stated = _STATED_ANSWER.findall(rest)
    last_line = rest.splitlines()[-1].strip() if rest else None
    return _last_boxed(rest) or (stated[-1].strip() if stated else last_line)


def extract_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter ("A", "B", …) a response to a multiple-choice question picks, or None when none or several.

    `options` are the option texts in order; without them every letter counts as an option. Looked for in the answer
    block, else in the text after the thinking: boxed content; "answer is X"; a letter in parentheses; letter and
    period at the start; a lone letter (not the article "a" or the pronoun "I"); the only option text contained.
    """
    block = find_answer_block(text)
    scope = block if block is not None else split_thinking(text)[1]
    scope = (_last_boxed(scope) or scope).strip()
    letters = string.ascii_uppercase[: len(options) or 26]

    stated = [m[1].upper() for m in _STATED_LETTER.finditer(scope) if m[1] != "a" or not _is_word(m)]
    stated = [letter for letter in stated if letter in letters]
    if stated:
        return stated[-1]
    enclosed = {letter.upper() for letter in _LETTER_IN_PARENTHESES.findall(scope)} & set(letters)
    if enclosed:
        return enclosed.pop() if len(enclosed) == 1 else None
    start = _LETTER_AT_START.match(scope)
    if start and start[1].upper() in letters:
        return start[1].upper()
    lone = {m[1].upper() for m in _LONE_LETTER.finditer(scope) if not _is_word(m)} & set(letters)
    if lone:
        return lone.pop() if len(lone) == 1 else None
    return _contained_option(scope, options)


def answers_match(prediction: str | None, solution: str) -> bool:
    """Whether an extracted answer is right by rules.

    The solution counts as a whole and, split at `/`, as alternatives; it stays whole when it looks like a date, a
    fraction or a unit (digits on both sides of a slash, or a part that is empty or one letter). One alternative must
    be equal up to case, whitespace, articles, quotes and closing punctuation; or equal as a number ("7", "7.0",
    "seven", "1,000"); or be the only one of yes and no in an answer below 48 characters; or be the letter picked
    ("B", "(B)", "B. red").
    """
    if prediction is None or len(prediction) > MAX_ANSWER_CHARS:
        return False
    return any(_same_answer(prediction, alternative) for alternative in _alternatives(solution))


def normalise_answer(text: str) -> str:
    """Lower case, single spaces, straight quotes; no articles, no enclosing quotes, no closing punctuation.

    What would become empty ("?" read from a sign) keeps its punctuation.
    """
    text = " ".join(unicodedata.normalize("NFC", text).translate(_QUOTES).casefold().split())
    bare = text.lstrip("\"'`* ").rstrip("\"'`*.,;:!? ")
    return _ARTICLE.sub("", bare) or text


def _alternatives(solution: str) -> list[str]:
    parts = [part.strip() for part in solution.split("/")]
    is_one_thing = re.search(r"[0-9]\s*/\s*[0-9]", solution) or any(
        not part or (len(part) == 1 and part.isalpha()) for part in parts
    )
    return [solution] if is_one_thing or len(parts) == 1 else [solution, *parts]


def _same_answer(prediction: str, solution: str) -> bool:
    predicted, wanted = normalise_answer(prediction), normalise_answer(solution)
    if not predicted or predicted == wanted:
        return bool(predicted)
    number = _as_number(wanted)
    if number is not None:
        return _as_number(predicted) == number
    if wanted in ("yes", "no"):
        said = {"yes", "no"} & set(re.findall(r"\w+", predicted))
        return said == {wanted} and len(predicted) < _MAX_YES_NO_CHARS
    choice = _CHOICE_SOLUTION.fullmatch(solution.strip())
    if choice is None:
        return False
    letter, option = choice[1] or choice[2] or choice[4], choice[3]
    return extract_choice(prediction) == letter.upper() or (
        option is not None and predicted == normalise_answer(option)
    )


def _as_number(text: str) -> tuple[str, Fraction, str] | None:
    """(currency, value, percent sign) of a normalised text that is one number, else None."""
    if text in _NUMBER_WORDS:
        return "", Fraction(_NUMBER_WORDS.index(text)), ""
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        return ("", Fraction(int(fraction[1]), int(fraction[2])), "") if int(fraction[2]) else None
    number = _NUMBER.fullmatch(text)
    return (number[1], Fraction(number[2].replace(",", "")), number[3]) if number else None


def _last_boxed(text: str) -> str | None:
    """Content of the last closed `\\boxed{…}`, nested braces included."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0 and text[end] == "}":
            return text[start + len("\\boxed{") : end].strip() or None
    return None


def _is_word(letter: re.Match[str]) -> bool:
    """Whether a matched letter is the article "a" or the pronoun "I": a word follows it, other than "or" and "and"."""
    return letter[1] in "aAiI" and _WORD_FOLLOWS.match(letter.string, letter.end(1)) is not None


def _contained_option(text: str, options: Sequence[str]) -> str | None:
    said = normalise_answer(text)
    wanted = [normalise_answer(option) for option in options]
    if wanted.count(said) == 1:
        return string.ascii_uppercase[wanted.index(said)]
    hits = [i for i, option in enumerate(wanted) if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", said)]
    return string.ascii_uppercase[hits[0]] if len(hits) == 1 else None
