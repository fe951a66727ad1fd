"""The syntax of a crop call, as text: its tags, how a box and its picture are written into it and read out of it.

Numbers are in whatever frame the model uses; nothing here knows the pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from looktwice.errors import BoxError, short
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
_NAMED_IMAGE = re.compile(r"\b(?:image|picture)[\s#_]*([0-9]+)(?!\w|\.[0-9])", re.IGNORECASE)
"""A picture as words name it: `image 2`, `Picture #2`, `image_2`; not `images 2` or `image 2.5`."""

T = TypeVar("T")


class Call(NamedTuple):
    """A crop call: its box, in the frame of the model, and the picture to cut from.

    `image_number` counts the pictures of the conversation from 1, crops not among them. It is the one that the words
    name last, as written, and 1 where they name none.
    """

    box: Box
    image_number: int = 1

    def pick(self, images: Sequence[T]) -> T:
        """What stands for the named picture in `images`, which stand for all that are shown before the call.

        Raises BoxError with reason `no_picture` (there is none at all) or `no_such_picture`.
        """
        if not images:
            raise BoxError("no_picture", "there is no picture yet to cut from")
        if not 1 <= self.image_number <= len(images):
            seen = f"{len(images)} pictures" if len(images) > 1 else "one picture"
            raise BoxError("no_such_picture", f"there is no picture {self.image_number} among {seen} shown before it")
        return images[self.image_number - 1]


def format_call(numbers: Iterable[float | str], image_number: int = 1) -> str:
    """The call for four numbers. Strings stand as they are; floats are written in full, without a bare `.0`.

    The first picture is not named, the others are.

    Example: format_call(Box(1.0, 2.5, 30.0, 40.0)) == "<tool_call>[1, 2.5, 30, 40]</tool_call>"
    Example: format_call([1, 2, 30, 40], image_number=2) == "<tool_call>image 2 [1, 2, 30, 40]</tool_call>"
    """
    written = (number if isinstance(number, str) else repr(number).removesuffix(".0") for number in numbers)
    words = "" if image_number == 1 else f"image {image_number} "
    return f"{TOOL_CALL_OPEN}{words}[{', '.join(written)}]{TOOL_CALL_CLOSE}"


def parse_call(text: str) -> Call:
    """The box of a call, and the picture that it names.

    `text` is what stands between the tags, or any text ending in `</tool_call>`, such as a segment of `split_calls`;
    then the call begins after the last `<tool_call>` in it. Words before the bracket, as in `Crop cup 1 [..]`, are
    allowed; `image 2` or `picture 2` among them names a picture, which need not be there. Numbers are decimal, with
    sign and exponent; they need not lie inside a picture.
    Raises BoxError, and nothing else, with reason `no_box` (not words and one bracket), `wrong_length`,
    `not_a_number` or `reversed`.
    """
    words, opening, rest = _content(text).partition("[")
    if not opening or not rest.endswith("]") or not _WORDS.fullmatch(words):
        raise BoxError("no_box", f"a call holds [x1, y1, x2, y2], got {short(repr(text))}")
    named = _NAMED_IMAGE.findall(words)
    box = check_box([_number(part) for part in rest[:-1].split(",")])
    return Call(box, int(named[-1]) if named else 1)


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
        raise BoxError("no_box", f"{TOOL_CALL_CLOSE} without {TOOL_CALL_OPEN} before it, got {short(repr(text))}")
    return content.strip()


def _number(text: str) -> float | str:
    """A float (infinite when too large), or the text itself when it is no number, for the message."""
    text = text.strip()
    return float(text) if NUMBER.fullmatch(text) else text
