"""Grounding marks in an answer: `<ref>`, `<box>` and `<point>` read tolerantly and turned into original pixels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from looktwice.geometry import Size

GroundingKind = Literal["box", "point"]

_MARK = re.compile(r"<(ref|box|point)>((?:(?!<(?:ref|box|point)>).)*?)</\1>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_SLACK = 0.01
"""A fraction this far outside [0, 1] is a rounding slip and is clamped; beyond it the frame must be another one."""


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """One marked place. `coordinates` in original pixels, x1, y1, x2, y2 of a box (sorted) or x, y of a point.

    Example: Grounding(phrase="red apple", kind="box", coordinates=(12.8, 48.0, 64.0, 96.0))
    """

    phrase: str | None
    kind: GroundingKind
    coordinates: tuple[float, ...]


def parse_grounding(text: str, size: Size) -> list[Grounding]:
    """The boxes and points of a text in order, each with the nearest phrase marked before it (None without one).

    Written form: `<ref>phrase</ref>`, `<box>(x1,y1),(x2,y2)</box>`, `<point>(x,y)</point>`, several in square
    brackets, all as fractions of `size`, the original picture. Spaces, newlines and the kind of bracket do not
    matter; swapped corners are sorted. A mark without its closing tag, with another count of numbers, or with a
    number outside [0, 1] is left out: its frame is never guessed.
    """
    phrase: str | None = None
    places: list[Grounding] = []
    for mark in _MARK.finditer(text):
        name, content = mark[1].lower(), mark[2]
        if name == "ref":
            phrase = " ".join(content.split()) or None
            continue
        kind: GroundingKind = "box" if name == "box" else "point"
        fractions = _read_fractions(content)
        if len(fractions) != (4 if kind == "box" else 2):
            continue
        xs, ys = fractions[0::2], fractions[1::2]
        corners = zip(sorted(xs), sorted(ys))
        coordinates = tuple(value for x, y in corners for value in (x * size.width, y * size.height))
        places.append(Grounding(phrase=phrase, kind=kind, coordinates=coordinates))
    return places


def _read_fractions(content: str) -> list[float]:
    """The numbers between the tags, clamped to [0, 1]; empty when there is anything else or one lies outside."""
    fields = [field for field in re.split(r"[\s,()\[\]]+", content) if field]
    if not all(_NUMBER.fullmatch(field) for field in fields):
        return []
    values = [float(field) for field in fields]
    if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
        return []
    return [min(max(value, 0.0), 1.0) for value in values]
