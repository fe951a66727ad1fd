"""Finding the option that an answer picks, by the order of rules that public harnesses share."""

from __future__ import annotations

import re
from typing import NamedTuple

from looktwice.answers import after_thinking, find_answer_block, last_boxed, strip_tool_text
from looktwice.benches.item import LETTERS
from looktwice.messages import ANSWER_OPEN

_STATED = re.compile(
    r"\banswer(?:\s+is\b\s*:?|\s*:)\s*[^\w\s]*\s*(?:option\s+)?[(\[*]*([A-Za-z])(?![\w'])(.?\s?\S?)", re.IGNORECASE
)
"""`answer is X`, with what follows the letter: a word after "a" makes it an article."""
_IN_BRACKETS = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]]")
_AT_START = re.compile(r"\W*([A-Za-z])[.):](?!\w)")
_LONE = re.compile(r"(?<![\w'])([A-Z])(?![\w'])")
_WHOLE = re.compile(r"\W*([A-Za-z])\W*")
_FINAL = re.compile(r"\bfinal answer\b[\s:*]*(?:is\b[\s:*]*)?(?=\S)", re.IGNORECASE)
ARTICLES = ("A", "I")
"""Letters that are words as well."""


class Pick(NamedTuple):
    """The letter of an option, None where none was found, and the rule that says so."""

    letter: str | None
    by: str


def spoken(text: str) -> str | None:
    """What of a response is its answer: the last complete answer block, else what follows the last "final answer", else
    all that follows the thinking, without crop calls. None where there is nothing, or the block was cut off."""
    block = find_answer_block(text)
    if block is not None:
        return block or None
    rest = after_thinking(text)
    if ANSWER_OPEN in rest:
        return None
    rest = strip_tool_text(rest).strip()
    *_, last = [None, *_FINAL.finditer(rest)]
    return rest[last.end() if last else 0 :] or None


def picked_option(text: str, options: tuple[str, ...]) -> Pick:
    """The option that a whole response picks, by the first rule that finds one:

    the last complete answer block is read alone where there is one; `\\boxed{…}`; "answer is X"; a letter in brackets;
    a letter and a period at the start; a lone letter ("A" and "I" only where they are the whole answer); the text of an
    option, whole or as the only one contained. Of several statements the last
    counts; two letters under another rule are ambiguous and none.
    """
    said = spoken(text)
    if said is None:
        return Pick(None, "none")
    if boxed := last_boxed(said):
        inner = _by_letter(boxed, options) or _by_text(boxed, options)
        return Pick(inner.letter, "boxed") if inner else Pick(None, "none")
    if stated := _stated(said, options):
        return Pick(stated, "stated")
    return _by_letter(said, options) or _by_text(said, options) or Pick(None, "none")


def _stated(said: str, options: tuple[str, ...]) -> str | None:
    found = None
    for match in _STATED.finditer(said):
        letter, after = match[1].upper(), match[2]
        is_word = letter in ARTICLES and bool(re.match(r"\s\w", after))
        if _is_option(letter, options) and not is_word:
            found = letter
    return found


def _by_letter(said: str, options: tuple[str, ...]) -> Pick | None:
    """Rules from a letter in brackets to a lone one; a Pick of nothing where they contradict themselves."""
    bracketed = {letter.upper() for letter in _IN_BRACKETS.findall(said) if _is_option(letter.upper(), options)}
    if bracketed:
        return _only(bracketed, "brackets")
    if (start := _AT_START.match(said)) and _is_option(start[1].upper(), options):
        return Pick(start[1].upper(), "start")
    if (whole := _WHOLE.fullmatch(said)) and _is_option(whole[1].upper(), options):
        return Pick(whole[1].upper(), "lone")
    lone = {letter for letter in _LONE.findall(said) if _is_option(letter, options) and letter not in ARTICLES}
    return _only(lone, "lone") if lone else None


def _only(letters: set[str], by: str) -> Pick:
    return Pick(letters.pop(), by) if len(letters) == 1 else Pick(None, "none")


def _by_text(said: str, options: tuple[str, ...]) -> Pick | None:
    """The option whose text the answer is, or the only one whose text it contains."""
    plain = said.strip(" .\n").casefold()
    texts = [option.strip(" .\n").casefold() for option in options]
    same = [place for place, text in enumerate(texts) if text and text == plain]
    held = same or [
        place for place, text in enumerate(texts) if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", plain)
    ]
    return Pick(LETTERS[held[0]], "option_text") if len(held) == 1 else None


def _is_option(letter: str, options: tuple[str, ...]) -> bool:
    return letter in LETTERS[: len(options)]
