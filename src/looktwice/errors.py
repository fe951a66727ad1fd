"""Errors a user can cause, and how messages word things. Each says what was seen, where, and the mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LINE, MOST_LINES = 600, 100
"""Characters of a line and lines of a message that are told."""
MOST_LETTERS = 255
"""Letters of a name that a file may have; what is longer without a blank is no name."""
_CONTROLS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}
"""Signs of Unicode's block of control pictures; of the C1 controls and of those that turn the direction, the sign for
what cannot be shown."""
_TOO_LONG = re.compile(rf"\S{{{MOST_LETTERS + 1},}}")


class LooktwiceError(Exception):
    """Base of every error that a user's input or setting can cause; the CLI prints it without a traceback.

    Each argument is a line of the message, whatever stands in it: none is longer than LINE, and there are at most
    MOST_LINES.
    """

    def __init__(self, *lines: object) -> None:
        told = [one_line(str(line)) for line in lines[:MOST_LINES]]
        if len(lines) > MOST_LINES:
            told.append(f"... and {counted(len(lines) - MOST_LINES, 'more line')}")
        super().__init__(*told)

    def __str__(self) -> str:
        return "\n".join(self.args)


class ConfigError(LooktwiceError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(LooktwiceError):
    """A data file or one of its records cannot be used."""


class ImageError(LooktwiceError):
    """A picture or video is missing, unreadable or too large. `reason` is missing, empty, damaged or huge."""

    def __init__(self, message: str, reason: str = "damaged") -> None:
        super().__init__(message)
        self.reason = reason


class CheckpointError(LooktwiceError):
    """A model folder lacks what is needed or does not fit the request."""


class TrainingError(LooktwiceError):
    """Training cannot go on, such as a loss that is no number."""


class ServerError(LooktwiceError):
    """A server that samples for us failed or is gone. `status` is that of its HTTP response, if there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class BoxError(LooktwiceError):
    """A crop box cannot be cut. `reason` is a short stable code, counted in the metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BoxError], tuple[str, str]]:
        """How pickle builds it again, of both its arguments: errors cross from worker processes."""
        return type(self), (self.reason, str(self))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ` Did you mean "beta"?`, or an empty string when no known name is close."""
    if len(name) > LINE:
        return ""
    bare = {other.lstrip("-"): other for other in known}  # flags are not alike for their dashes
    matches = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.7)
    return f' Did you mean "{bare[matches[0]]}"?' if matches else ""


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(text: str, length: int = LINE) -> str:
    """A text as one line of at most `length` characters, without the middle of it and of what is too long for a name.

    Blanks stay as they are; control letters are shown as signs.
    """
    text = shown_controls(" ".join(_without_middle(text, 100 * LINE).splitlines()))
    return _without_middle(_TOO_LONG.sub(lambda found: _without_middle(found[0], 80), text), length)


def shown_controls(text: str) -> str:
    """A text in which each control letter but newline and tab is a sign for it: none can move the cursor of a
    terminal, colour it, or turn the direction of what follows. It stays as long as it is."""
    return text.translate(_CONTROLS)


def _without_middle(text: str, length: int) -> str:
    tail = length // 4
    return text if len(text) <= length else f"{text[: length - tail - 3]}...{text[-tail:]}"


def short(text: str) -> str:
    """A text as one line of at most 80 characters, its middle left out, control letters shown as signs."""
    return shown_controls(_without_middle(" ".join(_without_middle(text, LINE).split()), 80))


def short_path(path: object) -> str:
    """A path as messages write it: whole, unless no file can have such a name."""
    text = str(path)
    return text if len(text) <= MOST_LETTERS and text.isprintable() else short(text)
