"""Choices: the letter of an option, with or without its text."""

from __future__ import annotations

import re
from typing import NamedTuple

from looktwice.judging.retractions import is_retracted
from looktwice.judging.wording import bare, plain

_OPTION = re.compile(r"(?:[(\[]([A-Za-z])[)\]][.:,]?|([A-Za-z])([.):]))\s+(\S.*)", re.DOTALL)
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:)]?")
LAST_OF_SEVERAL = "H"
"""The last letter that stands before the text of an option: "T. Rex" is none."""
_SURE_LETTERS = "ABCD"
"""Options of "X. text" whatever the text is; later letters are none in "E. coli" and "H. pylori"."""

_CARRIERS = (
    *("so", "thus", "hence", "therefore", "the", "my", "final", "correct", "right", "best", "answer", "option"),
    *("choice", "letter", "is", "it", "it's", "i", "think", "believe", "choose", "pick", "select", "say", "go", "with"),
    *("would", "will", "must", "should", "be", "that", "this"),
)
_CARRIED = rf"(?:(?:{'|'.join(_CARRIERS)})(?:\s*[,:]\s*|\s+)|(?:答案|正确|选项|选择|应该|我|选|应|是|为)\s*[:,]?\s*)*"
_ONE_LETTER = re.compile(
    rf"{_CARRIED}[(\[]?([A-Za-z])[)\]]?[.:)]?(?:\s+is(?:\s+(?:the|correct|right|best|answer|option|choice))+)?[.!]?",
    re.IGNORECASE,
)
_LETTER_AND_TEXT = re.compile(
    rf"{_CARRIED}(?:[(\[]([A-Za-z])[)\]][.:,]?|([A-Za-z])([.):]|\s+-|(?=\s\()))\s+(\S.*)", re.IGNORECASE | re.DOTALL
)
_ANOTHER_OPTION = re.compile(r"[A-Za-z]|.*(?<![\w'])(?:[(\[][A-Ha-h][)\]]|[A-H][.):](?=\s)).*", re.DOTALL)


class Choice(NamedTuple):
    """An option, given or picked: its letter, its text ("" for none), and whether either may stand for both."""

    letter: str
    text: str = ""
    is_either: bool = True


def read_choice(text: str) -> Choice | None:
    """The option that a gold answer is, or None: a letter ("B", "(B)", "B.") or a letter and a text ("B. red").

    "N. Broadway", "E. coli" and "A: 12" may be options or not: letter and text stand for them together only.
    """
    text = plain(text)
    if alone := _LETTER.fullmatch(text):
        return Choice(alone[1].upper())
    option = _OPTION.fullmatch(text)
    if option is None or _ANOTHER_OPTION.fullmatch(option[4]):
        return None
    letter, mark, said = (option[1] or option[2]).upper(), option[3], option[4]
    return Choice(letter, said, mark != ":" and _is_option(letter, mark, said))


def picked(text: str) -> Choice | None:
    """The option that an answer picks, or None when none or several.

    Around its letter only words may stand that say no more than that it is the answer: "Vitamin C", "Not B", "A or B"
    pick nothing. The text after "B." or "(B)" is that of the option; where it may as well deny the letter ("is wrong")
    or pick another, the letter does not stand without it.
    """
    text = bare(plain(text))
    if pick := _ONE_LETTER.fullmatch(text):
        return Choice(pick[1].upper())
    pick = _LETTER_AND_TEXT.fullmatch(text)
    if pick is None:
        return None
    letter, said = (pick[1] or pick[2]).upper(), pick[4]
    if _ANOTHER_OPTION.fullmatch(said) or not _is_option(letter, pick[3], said):
        return None
    after = text[pick.end(1) + 1 if pick[1] else pick.end(2) :]
    return Choice(letter, said, not is_retracted(letter, after, said))


def _is_option(letter: str, mark: str | None, text: str) -> bool:
    """Whether a letter, the mark after it and a text are those of an option, and not an initial and a name."""
    return letter in _SURE_LETTERS or (letter <= LAST_OF_SEVERAL and not (mark == "." and text[0].islower()))
