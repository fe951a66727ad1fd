"""Grounding marks: `<ref>`, `<box>` and `<point>` read tolerantly as original pixels, and written from them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from looktwice.calls import NUMBER
from looktwice.errors import DataError
from looktwice.geometry import Size

GroundingKind = Literal["box", "point"]

_MARK = re.compile(r"<(ref|box|point)\s*>((?:(?!<(?:ref|box|point)\s*>).)*?)</\s*\1\s*>", re.DOTALL | re.IGNORECASE)
_BETWEEN = re.compile(r"[\s,;()\[\]{}]+")
ASKED_FOR: dict[GroundingKind, str] = {
    "box": "Please provide the bounding box coordinates.",
    "point": "Please provide the point coordinates.",
}
"""What asks the released models for each kind; source: the model card."""
LAST = 0.999
"""The largest fraction that is written: they have three digits and stay below 1, as in the model card."""
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


def grounding_question(phrase: str, kind: GroundingKind) -> str:
    """The question for the boxes or points of a phrase, worded as the released models were trained on it."""
    return f"Find the <ref>{phrase}</ref> in the image. {ASKED_FOR[kind]}"


def format_grounding(
    places: Sequence[Sequence[float]], size: Size, *, kind: GroundingKind = "box", phrase: str | None = None
) -> str:
    """The text that a model is to write for these boxes or points: what `parse_grounding` reads.

    `places` are in pixels of a picture of this size, x1, y1, x2, y2 of a box or x, y of a point; several stand in
    square brackets. Tokenise the answer as a whole: digits and tags merge with their neighbours.
    Raises DataError for a place that is none, or lies outside the picture.

    Example: format_grounding([[20, 10, 100, 60]], Size(200, 100), phrase="cup")
    == "<ref>cup</ref><box>(0.100,0.100),(0.500,0.600)</box>"
    """
    marks = [_written_place(place, size, kind) for place in places]
    written = marks[0] if len(marks) == 1 else f"[{','.join(marks)}]"
    return written if phrase is None else f"<ref>{phrase}</ref>{written}"


def _written_place(place: Sequence[float], size: Size, kind: GroundingKind) -> str:
    count = 4 if kind == "box" else 2
    limits = (size.width, size.height) * 2
    if len(place) != count or not all(0 <= value <= limit for value, limit in zip(place, limits)):
        inside = f"inside {size.width}x{size.height} pixels"
        raise DataError(f"the {kind} {[*place][:6]} is not {count} numbers {inside}; mend it")
    xs, ys = ([min(value / limit, LAST) for value in sorted(place[start::2])] for start, limit in enumerate(size))
    return f"<{kind}>{','.join(f'({x:.3f},{y:.3f})' for x, y in zip(xs, ys))}</{kind}>"


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
