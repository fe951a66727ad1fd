"""Errors a user can cause, and how messages word things. Each says what was seen, where, and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LooktwiceError(Exception):
    """Base of every error that a user's input or setting can cause; the CLI prints it without a traceback."""


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
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{matches[0]}"?' if matches else ""


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(text: str) -> str:
    """A text as one line of at most 80 characters, its middle left out."""
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
