"""Grounding marks in an answer: `<ref>`, `<box>` and `<point>` read tolerantly and turned into original pixels."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from looktwice.calls import NUMBER
from looktwice.geometry import Size

GroundingKind = Literal["box", "point"]

_MARK = re.compile(r"<(ref|box|point)\s*>((?:(?!<(?:ref|box|point)\s*>).)*?)</\s*\1\s*>", re.DOTALL | re.IGNORECASE)
_BETWEEN = re.compile(r"[\s,;()\[\]{}]+")
_SLACK = 0.01
"""A fraction this far outside [0, 1] is a rounding slip and is clamped; beyond it the frame must be another one."""


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """One marked place. `coordinates` in original pixels, x1, y1, x2, y2 of a box (sorted) or x, y of a point.

    `written` is what stands between the tags; where it is no place in fractions of the picture, `coordinates` are None.

    Example: Grounding(phrase="cup", kind="box", coordinates=(12.8, 48.0, 64.0, 96.0), written="(0.1,0.5),(0.5,1.0)")
    """

    phrase: str | None
    kind: GroundingKind
    coordinates: tuple[float, ...] | None
    written: str


def parse_grounding(text: str, size: Size) -> list[Grounding]:
    """The boxes and points of a text in order, each with the nearest phrase marked before it (None without one).

    Written form: `<ref>phrase</ref>`, `<box>(x1,y1),(x2,y2)</box>`, `<point>(x,y)</point>`, several in square
    brackets, all as fractions of `size`, the original picture. Spaces, newlines and the kind of bracket do not
    matter, one `<box>` may hold several, and swapped corners are sorted. A mark with another count of numbers, or with
    a number outside [0, 1] (`<box>[100, 200, 300, 400]</box>`), has no coordinates: its frame is never guessed. A mark
    without its closing tag is left out.
    """
    phrase: str | None = None
    places: list[Grounding] = []
    for mark in _MARK.finditer(text):
        name, content = mark[1].lower(), " ".join(unicodedata.normalize("NFKC", mark[2]).split())
        if name == "ref":
            phrase = " ".join(mark[2].split()) or None
            continue
        kind: GroundingKind = "box" if name == "box" else "point"
        for place in _read_places(content, kind, size) or (None,):
            places.append(Grounding(phrase=phrase, kind=kind, coordinates=place, written=content))
    return places


def _read_places(content: str, kind: GroundingKind, size: Size) -> list[tuple[float, ...]]:
    """The places between two tags in pixels; empty when there is anything else or a number lies outside [0, 1]."""
    fields = [field for field in _BETWEEN.split(content) if field]
    count = 4 if kind == "box" else 2
    if not all(NUMBER.fullmatch(field) for field in fields) or len(fields) % count or len(fields) > count == 2:
        return []
    values = [float(field) for field in fields]
    if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
        return []
    values = [min(max(value, 0.0), 1.0) for value in values]
    places = (values[start : start + count] for start in range(0, len(values), count))
    corners = (zip(sorted(place[0::2]), sorted(place[1::2])) for place in places)
    return [tuple(value for x, y in pairs for value in (x * size.width, y * size.height)) for pairs in corners]
