"""Pictures on a page: how large they are shown, what is written under them, and the boxes drawn on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from looktwice.geometry import Box, Size
from looktwice.report.html import image_uri

LARGEST_IMAGE, LARGEST_CROP = Size(400, 400), Size(288, 256)
SMALLEST_IMAGE, SMALLEST_CROP = 240, 96
"""Pixels of the page. Narrower pictures are enlarged up to these widths and beyond, in whole steps."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A box on a picture: what was cut for a crop, with its label, or the gold box."""

    box: Box
    label: str = ""
    is_gold: bool = False

    def __str__(self) -> str:
        return f"{'gold box' if self.is_gold else 'box of crop'} {self.label}".rstrip()


def merged(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """The same boxes, each drawn once with all its labels."""
    labels: dict[tuple[Box, bool], list[str]] = {}
    for mark in marks:
        labels.setdefault((mark.box, mark.is_gold), []).append(mark.label)
    return tuple(Mark(box=box, label=", ".join(of), is_gold=is_gold) for (box, is_gold), of in labels.items())


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture as it stands on a page: `source` is its address, `shown` its size there, `size` that of its boxes."""

    source: str
    shown: Size
    is_enlarged: bool
    caption: str
    alt: str
    size: Size
    marks: tuple[Mark, ...] = ()
    is_crop: bool = False

    def inset(self, mark: Mark) -> str:
        """How far the sides of a box are from those of the picture: top, right, bottom and left."""
        (width, height), (x1, y1, x2, y2) = self.size, mark.box
        shares = (y1 / height, 1 - x2 / width, 1 - y2 / height, x1 / width)
        return " ".join(f"{100 * min(1.0, max(0.0, share)):.2f}%" for share in shares)

    def near(self, mark: Mark) -> str:
        """The sides of the picture beyond which the label of a box would stand."""
        (width, height), (x1, y1, _, y2) = self.size, mark.box
        near = {"top": y1 < height / 6, "bottom": y2 > height * 5 / 6, "right": x1 > width * 2 / 3}
        return " ".join(name for name, is_near in near.items() if is_near)


def whole_figures(
    original: Image.Image,
    seen: Image.Image,
    *,
    caption: str,
    seen_caption: str,
    marks: Sequence[Mark] = (),
    smallest: int = SMALLEST_IMAGE,
) -> tuple[Figure, Figure]:
    """A whole picture with boxes in its pixels, and, as wide, what the model sees of it."""
    shown = shown_size(Size(*seen.size), LARGEST_IMAGE, smallest)
    height = max(1, round(shown.width * original.height / original.width))
    is_small = original.width <= shown.width
    thumbnail = original if is_small else original.resize(Size(shown.width, height), reducing_gap=2)
    return (
        Figure(
            source=image_uri(thumbnail),
            shown=Size(shown.width, height),
            is_enlarged=thumbnail.width < shown.width,
            caption=caption,
            alt=", ".join(["the whole picture", *map(str, marks)]),
            size=Size(*original.size),
            marks=tuple(marks),
        ),
        _exact(seen, shown, caption=seen_caption, alt="the whole picture as the model sees it"),
    )


def crop_figure(seen: Image.Image, *, caption: str) -> Figure:
    """A crop as the model sees it."""
    shown = shown_size(Size(*seen.size), LARGEST_CROP, SMALLEST_CROP)
    return _exact(seen, shown, caption=caption, alt="the crop as the model sees it", is_crop=True)


def _exact(seen: Image.Image, shown: Size, *, caption: str, alt: str, is_crop: bool = False) -> Figure:
    return Figure(
        source=image_uri(seen),
        shown=shown,
        is_enlarged=shown.width > seen.width,
        caption=caption,
        alt=alt,
        size=Size(*seen.size),
        is_crop=is_crop,
    )


def shown_size(size: Size, largest: Size, smallest: int) -> Size:
    """Size on the page: that of the picture, unless there is no room for it, or little to be seen.

    A picture is enlarged a whole number of times, so that its pixels stay squares of one size.

    Example: shown_size(Size(80, 96), Size(400, 400), 240) == Size(240, 288)
    """
    width, height = size
    times = max(1, min(math.ceil(smallest / width), largest.width // width, largest.height // height))
    scale = min(times, largest.width / width, largest.height / height)
    return Size(max(1, round(scale * width)), max(1, round(scale * height)))
