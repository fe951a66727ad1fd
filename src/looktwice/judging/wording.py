"""One spelling for what can be written in several ways: of signs and widths (`plain`), and of words (`words`)."""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

_BEFORE_VULGAR_FRACTION = re.compile(r"(?<=\d)(?=[¼½¾⅐-⅞])")
_SUPERSCRIPT = re.compile(r"[⁺⁻]?[⁰¹²³⁴-⁹]+")
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′", "'"),
        **dict.fromkeys("“”„‟″«»「」『』《》", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **dict.fromkeys("⁄∕", "/"),
        "。": ".",
        "、": ", ",
    }
)
_LATEX = (
    (re.compile(r"\$([^$]*\\[a-zA-Z][^$]*)\$"), r"\1"),
    (re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|(?<!\\)\\[,;:! ]"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)(?![a-zA-Z])|\\degree(?![a-zA-Z])"), "°"),
    (re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"(?<=\d)\s*(?=\\[dtc]?frac)"), " "),
    (re.compile(r"\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))"), r"\1\2/\3\4"),
    (re.compile(r"\\times(?![a-zA-Z])\s*"), "×"),
    (re.compile(r"\\([$%&#_])"), r"\1"),
)
"""The LaTeX of plain numbers, words and units; what is left with a backslash is mathematics."""

_INITIALS = re.compile(r"\b([^\W\d_])\.(?=[^\W\d_]\b)")
_ABBREVIATION = re.compile(r"(?<=[^\W\d_])\.(?=\s|$)")
_COMMA = re.compile(r",(?= )")
_RANGE = re.compile(r"(?<=[\w%°]) ?- ?(?=[\w$€£¥])|(?<=[\d%°]) to (?=[\d$€£¥])")
_BY = re.compile(r"(?<=\d) ?([x×:]) ?(?=\d)")
_APART = re.compile(r"(?<=\d) (?=%|[ap]m\b)")
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_CLOSING_MARKS = re.compile(r"(?:[.,;:?\s]|(?<!\d)!)+$")
_QUOTED = re.compile(r"([\"'`*]+)(.*?)\1")
_ARTICLE = re.compile(r"\b(?:an|the) (?=\w)")
_ARTICLE_A = re.compile(r"(^|\b(?:of|in|on|at|by|to|for|from|with|and|or|is|like) )a (?=[^\W\d_]{2})")
"""The letter in "hepatitis a virus" is none."""


@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """The text with plain signs: half width, straight quotes and dashes, single spaces, no entities, no simple LaTeX.

    Case and numbers stay as they are; a raised digit becomes `^2` and never one of the number before it.
    Example: plain("５\\,\\text{cm}²") == "5 cm^2"
    """
    text = _BEFORE_VULGAR_FRACTION.sub(" ", html.unescape(text))
    text = _SUPERSCRIPT.sub(lambda raised: f"^{raised[0]}", text)
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    text = "".join(character for character in text if unicodedata.category(character) != "Cf") or text
    for latex, written in _LATEX:
        text = latex.sub(written, text)
    return " ".join(text.split())


def bare(text: str) -> str:
    """A plain text without enclosing quotes and closing punctuation; one of nothing else ("?" on a sign) stays."""
    inside = _CLOSING_MARKS.sub("", text).strip()
    while quoted := _QUOTED.fullmatch(inside):
        inside = _CLOSING_MARKS.sub("", quoted[2]).strip()
    return inside or text


@lru_cache(maxsize=4096)
def words(text: str) -> str:
    """A text as its words: plain, bare, in lower case, without articles, commas, hyphens and points of abbreviations.

    Example: words("The U.S. ice-cream.") == "us ice cream"
    """
    text = bare(plain(text).casefold())
    for mark, written in (
        (_INITIALS, r"\1"),
        (_ABBREVIATION, ""),
        (_COMMA, ""),
        (_RANGE, "-"),
        (_HYPHEN, " "),
        (_APART, ""),
    ):
        text = mark.sub(written, text)
    text = _BY.sub(lambda sign: "x" if sign[1] == "×" else sign[1], text)
    return _ARTICLE_A.sub(r"\1", _ARTICLE.sub("", text)) or text
