"""The verdict: whether an answer says what the gold answer says, by the kind of the gold answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from looktwice.judging.choices import picked, read_choice
from looktwice.judging.mathematics import equal_in_mathematics, is_mathematics, without_spaces
from looktwice.judging.moments import read_moment
from looktwice.judging.quantities import read_quantity
from looktwice.judging.wording import bare, plain, words
from looktwice.judging.yes_no import read_yes_no, says

Judge = Callable[[str], bool]
"""Whether a plain text says what one gold answer says."""
Kind = Callable[[str], Judge | None]
"""The judge of a gold answer that is of this kind, else None."""

_STATEMENT = re.compile(
    r"(?:(?:it|this|that|he|she|they|these|those|there)(?: is|'s| are|'re) )?(?:the )?", re.IGNORECASE
)
"""What an answer may begin with before it says something: "It's the"."""
_GREEK_SYMBOL = re.compile(r"(?<!\w)[Α-Ωα-ω](?!\w)")
"""Case tells Δ from δ, as it does not in a word."""
_NAME = re.compile(r"^[A-Za-z] ?= ?")
_SEPARATOR = re.compile(r"\s*(?:[;\n]|,(?![0-9]{3}(?![0-9]))|,\s+)\s*(?:and\s+|&\s*)?|\s+(?:and|&)\s+")
_BULLETS = re.compile(r"(?:(?:^|\n)\s*(?:[-*•]|[0-9]{1,2}[.)])\s+[^\n]+){2,}")
_BULLET = re.compile(r"(^|\n)\s*(?:[-*•]|[0-9]{1,2}[.)])\s+")
_COMMA = re.compile(r"\s*,\s*")
_MIXED_NUMBER = re.compile(r"\d \d")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def says_the_same(prediction: str, gold: str) -> bool:
    """Whether a short answer says what the gold answer says.

    Equal to the letter is right. Else the gold answer alone decides how it is judged, as the first it can be read as:
    an option, yes or no, a date or time, a quantity, mathematics, a list; and as words otherwise.
    """
    return _says(prediction, gold, _ALL_KINDS)


def is_decided(gold: str) -> bool:
    """Whether the rules alone tell right from wrong for a gold answer: an option, yes or no, a moment, a quantity."""
    gold = plain(gold)
    return any(kind(gold) is not None for kind in (_choice, _yes_or_no, _moment, _quantity))


def needs_mathematics(gold: str) -> bool:
    """Whether answers to a gold answer are compared as expressions, which takes the extra `math`."""
    return not is_decided(gold) and is_mathematics(plain(gold))


def _says(prediction: str, gold: str, kinds: tuple[Kind, ...]) -> bool:
    if _tidy(prediction) == _tidy(gold):
        return bool(_tidy(prediction))
    if _BULLETS.fullmatch(prediction.strip()):
        prediction = _BULLET.sub(r"\1", prediction.strip()).replace("\n", "; ")
    said = plain(prediction)
    judge = _judge_of(plain(gold), kinds)
    start = _STATEMENT.match(said)
    return judge(said) or bool(start and start.end() and judge(said[start.end() :]))


@lru_cache(maxsize=1024)
def _judge_of(gold: str, kinds: tuple[Kind, ...]) -> Judge:
    """How answers to one question are judged, from its gold answer as a plain text."""
    for kind in kinds:
        if judge := kind(gold):
            return judge
    return _words(gold)


def _tidy(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _words(gold: str) -> Judge:
    wanted, symbols = words(gold), _GREEK_SYMBOL.findall(gold)
    return lambda said: words(said) == wanted and _GREEK_SYMBOL.findall(said) == symbols


def _choice(gold: str) -> Judge | None:
    option = read_choice(gold)
    if option is None:
        return None

    def judge(said: str) -> bool:
        pick = picked(said)
        if pick is None:
            is_text = option.is_either and option.text and _says(said, option.text, _KINDS_OF_OPTIONS)
            return bool(is_text) or words(said) == words(gold)
        if pick.letter != option.letter:
            return False
        if pick.text and option.text:
            return _says(pick.text, option.text, _KINDS_OF_OPTIONS)
        return option.is_either and pick.is_either

    return judge


def _yes_or_no(gold: str) -> Judge | None:
    wanted = read_yes_no(gold)
    return None if wanted is None else lambda said: says(wanted, said)


def _moment(gold: str) -> Judge | None:
    wanted = read_moment(gold)
    return wanted and (lambda said: read_moment(said) == wanted)


def _quantity(gold: str) -> Judge | None:
    wanted = read_quantity(gold)
    if wanted is None:
        return None

    def judge(said: str) -> bool:
        quantity = read_quantity(_NAME.sub("", said))
        return quantity is not None and wanted.equals(quantity)

    return judge


def _mathematics(gold: str) -> Judge | None:
    if not is_mathematics(gold):
        return None
    is_code = not re.search(r"[\\^=+]", gold)  # "b-52" may be one, in which case tells nothing
    wanted = words(gold) if is_code else without_spaces(gold)
    return lambda said: (words(said) if is_code else without_spaces(said)) == wanted or equal_in_mathematics(said, gold)


def _list(gold: str) -> Judge | None:
    opened, wanted = _parts(gold, _SEPARATOR)
    if len(wanted) < 2:
        return None

    def judge(said: str) -> bool:
        for separator in (_SEPARATOR, _COMMA):
            opened_by, parts = _parts(said, separator)
            if opened and opened_by not in ("", opened):
                return False
            if len(parts) == len(wanted):
                return all(_says(part, one, _KINDS_OF_PARTS) for part, one in zip(parts, wanted))
        parts = _parts(said, _SEPARATOR)[1]
        return _leaves_out_separators(parts, wanted) or _leaves_out_separators(wanted, parts)

    return judge


def _leaves_out_separators(said: list[str], wanted: list[str]) -> bool:
    """Whether a list only lacks separators that another has: "1 2 3", "New York USA", but not "5 1/2" for 5 and 1/2."""
    rest = list(map(words, wanted))
    for part in said:
        joined: list[str] = []
        while rest and " ".join(joined) != words(part):
            joined.append(rest.pop(0))
        holds_numbers = any(map(_MIXED_NUMBER.search, joined)) or (
            read_quantity(part) is not None and any(map(read_quantity, joined[1:]))
        )
        if " ".join(joined) != words(part) or (len(joined) > 1 and holds_numbers):
            return False
    return not rest


def _parts(text: str, separator: re.Pattern[str]) -> tuple[str, list[str]]:
    """(the bracket around a list, "" without one; what stands between its separators)."""
    text = bare(text)
    opened = text[:1] if _BRACKETS.get(text[:1]) == text[-1:] else ""
    parts = separator.split(text[1:-1] if opened else text)
    return opened, [bare(part) for part in parts if part.strip()]


_SINGLE = (_yes_or_no, _moment, _quantity, _mathematics)
_KINDS_OF_PARTS: tuple[Kind, ...] = (_choice, *_SINGLE)
_KINDS_OF_OPTIONS: tuple[Kind, ...] = (*_SINGLE, _list)
_ALL_KINDS: tuple[Kind, ...] = (_choice, *_SINGLE, _list)
