"""The pictures of a page with many items: each once, small enough that all of them have room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from looktwice.errors import LooktwiceError
from looktwice.geometry import Box, Size
from looktwice.messages import ImageSource
from looktwice.processing.images import open_image, resize
from looktwice.report.figures import shown_size
from looktwice.report.html import image_uri

LARGEST_IMAGE, LARGEST_CROP = Size(360, 360), Size(200, 200)
SMALLEST_IMAGE, SMALLEST_CROP = 220, 96
TOTAL_BYTES = 6_000_000
MOST_BYTES = 24_000
FEWEST_BYTES = 700
"""Of one picture before base64; where there is less left for each, the remaining ones are left out."""


class Album:
    """Pictures by the number they have on the page. `expected` of them share the bytes there are."""

    def __init__(self, expected: int, total_bytes: int = TOTAL_BYTES) -> None:
        self.left_bytes, self.expected = total_bytes, expected
        self.entries: list[dict[str, Any]] = []
        self.num_left_out = 0
        self._numbers: dict[tuple[Any, ...], int | None] = {}
        self._opened: tuple[ImageSource | None, Image.Image | None] = (None, None)

    def whole(self, source: ImageSource) -> int | None:
        """The number of a picture; None where it cannot be opened any more or has no room."""
        key = (_name_of(source),)
        if key not in self._numbers:
            self._numbers[key] = self._add(self._open(source), LARGEST_IMAGE, SMALLEST_IMAGE)
        return self._numbers[key]

    def crop(self, source: ImageSource, box: Sequence[float], size: Sequence[int]) -> int | None:
        """The number of a crop as the model saw it: a box in pixels of its picture, at `size`."""
        key = (_name_of(source), tuple(box), tuple(size))
        if key not in self._numbers:
            image = self._open(source)
            left, top, right, bottom = map(int, Box(*box))
            seen = resize(image, Size(*size), (left, top, right, bottom)) if image else None
            self._numbers[key] = self._add(seen, LARGEST_CROP, SMALLEST_CROP)
        return self._numbers[key]

    def _open(self, source: ImageSource) -> Image.Image | None:
        """The last picture stays open: its crops follow."""
        if self._opened[0] is not source and self._opened[0] != source:
            try:
                self._opened = (source, open_image(source))
            except (LooktwiceError, OSError):
                self._opened = (source, None)
        return self._opened[1]

    def _add(self, image: Image.Image | None, largest: Size, smallest: int) -> int | None:
        share = min(MOST_BYTES, self.left_bytes // max(1, self.expected))
        self.expected -= 1
        if image is None or share < FEWEST_BYTES:
            self.num_left_out += image is not None
            return None
        shown = shown_size(Size(*image.size), largest, smallest)
        small = image if image.width <= shown.width else image.resize(shown, reducing_gap=2)
        source = image_uri(small, share)
        self.left_bytes -= len(source) * 3 // 4
        self.entries.append({"src": source, "w": shown.width, "h": shown.height, "big": small.width < shown.width})
        return len(self.entries) - 1


def _name_of(source: ImageSource) -> str | int:
    return id(source) if isinstance(source, Image.Image) else str(source)
