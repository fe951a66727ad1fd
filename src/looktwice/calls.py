"""The syntax of a crop call, as text: its tags, how a box is written into it and read out of it.

Numbers are in whatever frame the model uses; nothing here knows the picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from looktwice.errors import BoxError
from looktwice.geometry import Box, check_box

TOOL_CALL_OPEN, TOOL_CALL_CLOSE = "<tool_call>", "</tool_call>"
TOOL_RESPONSE_OPEN, TOOL_RESPONSE_CLOSE = "<tool_response>", "</tool_response>"

MAX_WORDS_LENGTH = 80
"""Characters before the bracket; enough for names of objects, too few for a sentence that lost its opening tag."""

WRITTEN_CALL = re.compile(f"{TOOL_CALL_OPEN}(?:(?!{TOOL_CALL_OPEN}).)*?{TOOL_CALL_CLOSE}", re.DOTALL)
"""A call in a text, whatever stands in it but another opening tag: a search then takes no longer than the text."""

_WORDS = re.compile(rf"[^\[\]{{}}<>]{{0,{MAX_WORDS_LENGTH}}}")
NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")
"""A decimal number; possessive, so that many digits that are none take no time."""


def format_call(numbers: Iterable[float | str]) -> str:
    """The call for four numbers. Strings stand as they are; floats are written in full, without a bare `.0`.

    Example: format_call(Box(1.0, 2.5, 30.0, 40.0)) == "<tool_call>[1, 2.5, 30, 40]</tool_call>"
    """
    written = (number if isinstance(number, str) else repr(number).removesuffix(".0") for number in numbers)
    return f"{TOOL_CALL_OPEN}[{', '.join(written)}]{TOOL_CALL_CLOSE}"


def parse_call(text: str) -> Box:
    """The box of a call, in the frame of the model.

    `text` is what stands between the tags, or any text ending in `</tool_call>`, such as a segment of `split_calls`;
    then the call begins after the last `<tool_call>` in it. Words before the bracket, as in `Crop cup 1 [..]`, are
    allowed. Numbers are decimal, with sign and exponent; they need not lie inside a picture.
    Raises BoxError, and nothing else, with reason `no_box` (not words and one bracket), `wrong_length`,
    `not_a_number` or `reversed`.
    """
    words, opening, rest = _content(text).partition("[")
    if not opening or not rest.endswith("]") or not _WORDS.fullmatch(words):
        raise BoxError("no_box", f"a call holds [x1, y1, x2, y2], got {_short(text)}")
    return check_box([_number(part) for part in rest[:-1].split(",")])


def split_calls(text: str) -> list[str]:
    """The text cut right after each `</tool_call>`; joined, the segments give it back.

    Each segment but the last ends a call, so that its crop follows it; the last, perhaps empty, is what remains.
    """
    *before, rest = text.split(TOOL_CALL_CLOSE)
    return [*(segment + TOOL_CALL_CLOSE for segment in before), rest]


def _content(text: str) -> str:
    text = text.strip()
    if not text.endswith(TOOL_CALL_CLOSE):
        return text
    _, opening, content = text.removesuffix(TOOL_CALL_CLOSE).rpartition(TOOL_CALL_OPEN)
    if not opening:
        raise BoxError("no_box", f"{TOOL_CALL_CLOSE} without {TOOL_CALL_OPEN} before it, got {_short(text)}")
    return content.strip()


def _number(text: str) -> float | str:
    """A float (infinite when too large), or the text itself when it is no number, for the message."""
    text = text.strip()
    return float(text) if NUMBER.fullmatch(text) else text


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:20]}...{text[-37:]}")
