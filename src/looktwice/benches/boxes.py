"""Boxes that an answer writes, in whatever form, as original pixels."""

from __future__ import annotations

import re

from looktwice.benches.extraction import spoken
from looktwice.benches.item import Said
from looktwice.calls import NUMBER
from looktwice.errors import BoxError
from looktwice.geometry import Box, check_box, to_original
from looktwice.grounding import parse_grounding

_N = rf"({NUMBER.pattern})"
_FOUR = rf"{_N}\s*,\s*{_N}\s*,\s*{_N}\s*,\s*{_N}"
_FORMS = (
    re.compile(rf"\"bbox(?:_2d)?\"\s*:\s*\[\s*{_FOUR}\s*\]"),
    re.compile(rf"[\[(]\s*{_FOUR}\s*[\])]|\(\s*{_N}\s*,\s*{_N}\s*\)\s*,\s*\(\s*{_N}\s*,\s*{_N}\s*\)"),
    re.compile(rf"{_N}[\s,]+{_N}[\s,]+{_N}[\s,]+{_N}"),
)
"""JSON, then four numbers in brackets, then four numbers. The first form that is there is read, and no other."""


def said_boxes(said: Said) -> list[Box]:
    """The boxes of an answer in order, in original pixels; the last one is the answer to a question for one.

    `<box>` marks are read first: they hold fractions of the picture. Otherwise JSON, four numbers in brackets, or four
    numbers: all within [0, 1] they are fractions, else in `box_frame`. Reversed and broken boxes are left out.
    """
    text, size = spoken(said.text), said.image_size
    if text is None or size is None:
        return []
    marked = [Box(*place.coordinates) for place in parse_grounding(text, size) if _is_box(place.coordinates)]  # type: ignore[misc]
    if marked:
        return marked
    for form in _FORMS:
        found = [[float(number) for number in match.groups() if number is not None] for match in form.finditer(text)]
        if found:
            return [box for numbers in found if (box := _in_pixels(numbers, said)) is not None]
    return []


def _is_box(coordinates: tuple[float, ...] | None) -> bool:
    return coordinates is not None and len(coordinates) == 4


def _in_pixels(numbers: list[float], said: Said) -> Box | None:
    assert said.image_size is not None
    try:
        box = check_box(numbers)
    except BoxError:
        return None
    frame = "unit" if all(0 <= number <= 1 for number in numbers) else said.box_frame
    return to_original(box, frame=frame, original=said.image_size, resized=said.seen_size or said.image_size)  # type: ignore[arg-type]
