"""Pictures with what was found in them: the crops of an answer and its boxes and points, each with its label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from looktwice.asking.answer import Answer
from looktwice.processing.images import open_image

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")
"""Told apart on most pictures, white letters readable on each."""
SMALLEST_LETTER, LETTER_SHARE, LINE_SHARE = 12, 40, 300
"""Pixels of a letter's height at the least; the larger side of a picture over its letters and over its lines."""
MOST_LETTERS = 40
Rectangle = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What is drawn: `place` is a box (4 numbers) or a point (2), in pixels of the picture."""

    place: tuple[float, ...]
    label: str
    colour: str


def marks_of(answer: Answer) -> dict[int, list[Mark]]:
    """What to draw on each picture of an answer, by its number: crops, and on the first one boxes and points."""
    marks: dict[int, list[Mark]] = {}
    for number, crop in enumerate(answer.crops, 1):
        if crop.box is not None:
            colour = COLOURS[(number - 1) % len(COLOURS)]
            marks.setdefault(crop.image_number, []).append(
                Mark(place=tuple(crop.box), label=f"crop {number}", colour=colour)
            )
    phrases = list(dict.fromkeys(found.phrase for found in answer.grounding))
    for found in answer.grounding:
        if found.coordinates is not None:
            colour = COLOURS[-1 - phrases.index(found.phrase) % len(COLOURS)]
            label = found.phrase or found.kind
            marks.setdefault(1, []).append(Mark(place=found.coordinates, label=label, colour=colour))
    return marks


def annotated(answer: Answer) -> list[Image.Image]:
    """The pictures of an answer's conversation in order, at their own size, with what is drawn on each.

    Raises ImageError when the file of one has gone.
    """
    marks = marks_of(answer)
    return [draw(open_image(source), marks.get(number, [])) for number, source in enumerate(answer.history.images, 1)]


def draw(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """A copy of an RGB picture with the marks on it; no label hides another one where there is room."""
    image = image.copy()
    pen = ImageDraw.Draw(image)
    longest = max(image.size)
    width = max(2, longest // LINE_SHARE)
    font = ImageFont.load_default(max(SMALLEST_LETTER, longest // LETTER_SHARE))
    for mark in marks:
        _outline(pen, mark, width, image.size)
    taken: list[Rectangle] = []
    for mark in marks:
        text = mark.label if len(mark.label) <= MOST_LETTERS else f"{mark.label[: MOST_LETTERS - 3]}..."
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        size = (right - left + 4 * width, bottom - top + 4 * width)
        place = place_label(mark.place, size, taken, image.size, gap=width + 1)
        taken.append(place)
        pen.rectangle(place, fill=mark.colour, outline="white")
        pen.text((place[0] + 2 * width - left, place[1] + 2 * width - top), text, fill="white", font=font)
    return image


def _outline(pen: ImageDraw.ImageDraw, mark: Mark, width: int, bounds: tuple[int, int]) -> None:
    """A line around a box, outside of it where there is room, or a disc on a point, each with a white rim."""
    if len(mark.place) == 4:
        x1, y1, x2, y2 = mark.place
        for colour, reach in (("white", width + 1), (mark.colour, width)):
            left, top = max(0.0, x1 - reach), max(0.0, y1 - reach)
            right, bottom = min(bounds[0], x2 + reach) - 1, min(bounds[1], y2 + reach) - 1
            pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=reach)
        return
    x, y = mark.place
    radius = 2.5 * width
    pen.ellipse(
        (x - radius, y - radius, x + radius, y + radius), fill=mark.colour, outline="white", width=max(1, width // 2)
    )


def place_label(
    place: Sequence[float],
    size: tuple[float, float],
    taken: Sequence[Rectangle],
    bounds: tuple[int, int],
    *,
    gap: float,
) -> Rectangle:
    """Where the label of a box or a point goes, inside the picture: the first free place beside it, else the free one
    nearest to it, else above it, whatever is there.

    `size` of the label and `bounds` of the picture are width and height; `taken` are labels that are there.
    """
    x1, y1, x2, y2 = place if len(place) == 4 else (*place, *place)
    width, height = size
    beside = ((x, y) for y in (y1 - height - gap, y2 + gap, y1 + gap) for x in (x1, x2 - width))
    candidates = [_inside(x, y, size, bounds) for x, y in beside]
    rows = (_inside(x, y, size, bounds) for y in _steps(bounds[1], height) for x in _steps(bounds[0], width / 2))
    near = sorted(rows, key=lambda spot: (spot[0] - x1) ** 2 + (spot[1] - y1) ** 2)
    free = (spot for spot in (*candidates, *near) if not any(_overlap(spot, other) for other in taken))
    return next(free, candidates[0])


def _steps(length: float, step: float) -> Iterator[float]:
    return (number * step for number in range(max(1, int(length // max(1.0, step)) + 1)))


def _inside(x: float, y: float, size: tuple[float, float], bounds: tuple[int, int]) -> Rectangle:
    """The rectangle of this size at x, y, moved into the picture; a larger one begins at its edge."""
    x, y = (max(0.0, min(at, limit - 1 - side)) for at, side, limit in zip((x, y), size, bounds))
    return x, y, x + size[0], y + size[1]


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]
