"""Quantities: a number in any writing, with its unit."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import gcd

from looktwice.judging.units import CURRENCIES, Unit, unit_of
from looktwice.judging.wording import bare, words

_STORED_NUMBER = re.compile(r"(?=(?:\D*\d){9})[^.]*\.\d{7,}\D*(?:e[+-]?\d+)?", re.IGNORECASE)
"""Nine digits and more, seven of them decimals: what a table holds of a number that somebody wrote shorter."""
_STORED_ERROR = Fraction(1, 2**24)
"""By which share a float32 is off at the most."""

_GROUPED = r"[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+|(?:'[0-9]{3})+)|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}"
_DIGITS = rf"(?:(?:{_GROUPED}|0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)"
"""A number in digits. 007 is none: it is a code."""
_POWER_OF_TEN = r"(?:[eE]([+-]?[0-9]{1,3})(?![\w])| ?(?:[x×*·]|\\cdot) ?10 ?\^ ?\{?([+-]?[0-9]{1,3})\}?)"
_CURRENCY = "|".join(re.escape(currency) for currency in CURRENCIES)
_QUANTITY = re.compile(
    rf"([+-]?) ?((?i:{_CURRENCY})?) ?([+-]?)"
    rf"(?:([0-9]+(?: [0-9]+)?) ?/ ?([1-9][0-9]*)(?![0-9/.])|({_DIGITS}){_POWER_OF_TEN}?)(.*)"
)
_MULTIPLIER = re.compile(r"([kKmMbB]n?)(?![^\W_])(.*)| ?(dozen|thousand|million|billion|trillion)\b(.*)", re.IGNORECASE)
_MULTIPLIERS = {"k": 10**3, "dozen": 12, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LETTER_MULTIPLIERS = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "b": 10**9, "B": 10**9, "bn": 10**9}
_OF_COUNTED = "counted "
_COUNTED = re.compile(r"[^\W\d_]+(?:[ -][^\W\d_]+){0,3}")
"""What is counted, in words: "red apples"."""
_MILLI_OR_MEGA = re.compile("m[A-Z][A-Za-z]?|[mM][a-z][A-Z]")
"""A symbol in mixed case that is not known here: meV is no MeV, and ev may be eV."""

_FIRST_CJK = "⺀"
"""From here on a word follows its number without a space."""

_SMALL = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBER_WORDS = {
    **{word: number for number, word in enumerate(_SMALL, 1)},
    **{word: 10 * number for number, word in enumerate(_TENS, 2)},
}
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_PARTS = {
    **dict.fromkeys(("half", "one half", "a half"), Fraction(1, 2)),
    **dict.fromkeys(("one third", "a third"), Fraction(1, 3)),
    **dict.fromkeys(("one quarter", "a quarter", "quarter", "one fourth", "a fourth"), Fraction(1, 4)),
    **{"two thirds": Fraction(2, 3), "three quarters": Fraction(3, 4), "three fourths": Fraction(3, 4)},
}
_CJK_DIGITS = "一二三四五六七八九十"
_COMMA_OF_A_LIST = re.compile(r"(?<!thousand)(?<!million)(?<!billion)(?<!trillion),", re.IGNORECASE)
"""One thousand, two hundred is a number, and twenty, five are two."""
_AND_PART = re.compile(rf"(.+) and ({'|'.join(sorted(_PARTS, key=len, reverse=True))})")
MAX_CHARS = 1000
"""Of a quantity; Python reads no more than 4,300 digits."""
_ORDINAL = Unit("ordinal", Fraction(1))


@dataclass(frozen=True)
class Quantity:
    """A value in basic units of what is measured ("" for a bare number); `is_stored` as a table stores one.

    `written` is the fraction (numerator, denominator) that the value was written as.
    """

    value: Fraction
    dimension: str = ""
    is_stored: bool = False
    written: tuple[int, int] | None = field(default=None, compare=False)

    def equals(self, said: Quantity) -> bool:
        """Whether another quantity is this one, up to what storing this one in a table has changed.

        A fraction that is no number in lowest terms is a score or a time signature: 10/10 is not 1, nor 6/8 3/4.
        """
        if self._is_score() and self.written != said.written:
            return False
        error = _STORED_ERROR * abs(self.value) if self.is_stored else 0
        return self.dimension == said.dimension and abs(self.value - said.value) <= error

    def _is_score(self) -> bool:
        if self.written is None or not (self.dimension == "" or self.dimension.startswith(_OF_COUNTED)):
            return False
        numerator, denominator = self.written
        return denominator == 1 or gcd(numerator, denominator) > 1


def read_quantity(text: str) -> Quantity | None:
    """The quantity that a plain text is, or None.

    Examples: "1,000", "1e-05", "seven", "2 1/2", "$3.5M", "5cm", "50 percent", "3rd", "7 red apples".
    """
    text = bare(text)
    if len(text) > MAX_CHARS:
        return None
    written = _QUANTITY.fullmatch(text)
    if written is None:
        return None if _COMMA_OF_A_LIST.search(text) else _spelled(words(text))
    sign, currency, inner_sign, over, under, digits, power, raised, rest = written.groups()
    if sign and inner_sign:
        return None
    value = _fraction(over, under) if over else Fraction(re.sub("[, ']", "", digits)) * _ten_to(power or raised)
    is_stored = _STORED_NUMBER.fullmatch(text) is not None
    quantity = _measured(-value if "-" in (sign, inner_sign) else value, currency, rest, is_stored=is_stored)
    is_fraction = over is not None and over.isdigit()
    return replace(quantity, written=(int(over), int(under))) if quantity and is_fraction else quantity


def _ten_to(power: str | None) -> Fraction:
    return Fraction(10) ** int(power or 0)


def _fraction(over: str, under: str) -> Fraction:
    """A fraction, or a whole number and one: `2 1` over `2` is 5/2."""
    *whole, numerator = over.split()
    return Fraction(int(whole[0]) if whole else 0) + Fraction(int(numerator), int(under))


def _measured(value: Fraction, currency: str, rest: str, *, is_stored: bool = False) -> Quantity | None:
    """A value with the currency before it and what stands after it: a multiplier, a unit, what is counted."""
    factor, rest = _multiplied(rest, has_currency=bool(currency))
    unit = unit_of(currency) if currency else None
    named = unit_of(rest.strip(" -")) if rest.strip(" -") else unit
    if unit and named != unit:
        return None
    if named and not (named.dimension == "ordinal" and rest.startswith(" ")):
        return Quantity(value * factor * named.scale, named.dimension, is_stored)
    if not rest:
        return Quantity(value * factor, is_stored=is_stored)
    if (rest.startswith(" ") or rest[0] >= _FIRST_CJK) and _COUNTED.fullmatch(rest.strip()):
        counted = rest.strip()
        name = counted if _MILLI_OR_MEGA.fullmatch(counted) else words(counted).removesuffix("s")
        return Quantity(value * factor, _OF_COUNTED + name)
    return None


def _multiplied(rest: str, *, has_currency: bool) -> tuple[int, str]:
    """(factor, what stands after it): 5K, 5 million; a lone m is metres unless it is money."""
    multiplier = _MULTIPLIER.fullmatch(rest)
    if multiplier is None:
        return 1, rest
    letter, after_letter, word, after_word = multiplier.groups()
    if word:
        return _MULTIPLIERS[word.casefold()], after_word
    if has_currency:
        letter = letter.replace("m", "M")[:1]
    factor = _LETTER_MULTIPLIERS.get(letter)
    return (factor, after_letter) if factor else (1, rest)


def _spelled(text: str) -> Quantity | None:
    """A quantity whose number is in words."""
    if text in _PARTS:
        return Quantity(_PARTS[text])
    if text in _ORDINALS:
        return Quantity(Fraction(_ORDINALS.index(text) + 1), _ORDINAL.dimension)
    if len(text) == 1 and text in _CJK_DIGITS:
        return Quantity(Fraction(_CJK_DIGITS.index(text) + 1))
    tokens = text.split()
    if len(tokens) == 2 and tokens[0] in _TENS and tokens[1] in _ORDINALS[:9]:
        return Quantity(Fraction(_NUMBER_WORDS[tokens[0]] + _ORDINALS.index(tokens[1]) + 1), _ORDINAL.dimension)
    if mixed := _AND_PART.fullmatch(text):
        whole, num_read = _number_in_words(words_of := mixed[1].split())
        return Quantity(whole + _PARTS[mixed[2]]) if num_read == len(words_of) else None
    value, num_read = (0, 1) if tokens[:1] == ["zero"] else _number_in_words(tokens)
    if not num_read:
        return None
    return _measured(Fraction(value), "", "".join(f" {token}" for token in tokens[num_read:]))


def _number_in_words(tokens: list[str]) -> tuple[int, int]:
    """(the number that begins a list of words, how many of them it takes): "one hundred and five cups" is 105 in 4."""
    total = current = num_read = 0
    for place, token in enumerate(tokens):
        if token in _NUMBER_WORDS:
            below_100 = current % 100
            if below_100 and (below_100 < 20 or below_100 % 10 or _NUMBER_WORDS[token] > 9):
                return 0, 0
            current += _NUMBER_WORDS[token]
        elif token == "hundred" and (current or not place):
            current = max(current, 1) * 100
        elif token in _MULTIPLIERS and len(token) > 1 and (current or not place):
            total, current = total + max(current, 1) * _MULTIPLIERS[token], 0
        elif token == "and" and num_read and tokens[place - 1] in ("hundred", *_MULTIPLIERS):
            continue
        else:
            break
        num_read = place + 1
    return total + current, num_read
