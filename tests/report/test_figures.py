"""Pictures on a page: their sizes, their bytes, the boxes on them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from looktwice.geometry import Box, Size
from looktwice.report.figures import (
    LARGEST_CROP,
    LARGEST_IMAGE,
    SMALLEST_CROP,
    SMALLEST_IMAGE,
    Mark,
    merged,
    shown_size,
    whole_figures,
)
from looktwice.report.html import MAX_EXACT_BYTES, MAX_IMAGE_BYTES, image_uri


def image_in(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("image", "kind", "size", "limit"),
    [
        (Image.new("RGB", (896, 896), "red"), "png", (896, 896), MAX_EXACT_BYTES),
        (noise(64, 64), "png", (64, 64), MAX_EXACT_BYTES),
        (noise(256, 256), "webp", (256, 256), MAX_IMAGE_BYTES),
        (noise(896, 896), "webp", (448, 448), MAX_IMAGE_BYTES),
    ],
)
def test_an_image_keeps_its_pixels_while_it_is_small_and_is_limited_in_bytes(
    image: Image.Image, kind: str, size: tuple[int, int], limit: int
) -> None:
    uri = image_uri(image)
    assert uri.startswith(f"data:image/{kind};base64,")
    assert len(base64.b64decode(uri.partition(",")[2])) <= limit
    assert image_in(uri).size == size
    assert kind == "webp" or np.array_equal(np.asarray(image_in(uri)), np.asarray(image))


@pytest.mark.parametrize(
    ("seen", "is_crop", "shown"),
    [
        (Size(400, 300), False, (400, 300)),
        (Size(960, 480), False, (400, 200)),
        (Size(440, 880), False, (200, 400)),
        (Size(80, 96), False, (240, 288)),
        (Size(96, 80), False, (288, 240)),
        (Size(112, 64), False, (336, 192)),
        (Size(48, 48), True, (96, 96)),
        (Size(512, 256), True, (288, 144)),
        (Size(32, 3200), False, (4, 400)),
        (Size(16, 16000), True, (1, 256)),
        (Size(1, 1), False, (240, 240)),
    ],
)
def test_images_are_enlarged_in_whole_steps_and_fitted_to_the_page(
    seen: Size, is_crop: bool, shown: tuple[int, int]
) -> None:
    largest, smallest = (LARGEST_CROP, SMALLEST_CROP) if is_crop else (LARGEST_IMAGE, SMALLEST_IMAGE)
    assert shown_size(seen, largest, smallest) == shown


def test_a_picture_is_as_wide_as_what_is_seen_of_it_and_small_ones_keep_their_pixels() -> None:
    picture, seen = whole_figures(noise(20, 24), noise(64, 80), caption="a", seen_caption="b")
    assert (picture.shown, seen.shown) == (Size(256, 307), Size(256, 320))
    assert picture.is_enlarged and seen.is_enlarged
    assert image_in(picture.source).size == (20, 24)
    picture, seen = whole_figures(noise(704, 832), noise(80, 96), caption="a", seen_caption="b")
    assert image_in(picture.source).size == picture.shown == (240, 284)
    assert not picture.is_enlarged and seen.is_enlarged


def test_equal_boxes_are_drawn_once_with_all_their_labels() -> None:
    box, other = Box(0, 0, 9, 9), Box(0, 0, 9, 8)
    gold = Mark(box=box, is_gold=True)
    marks = [Mark(box=box, label="1"), gold, Mark(box=other, label="2"), Mark(box=box, label="3")]
    assert merged(marks) == (Mark(box=box, label="1, 3"), gold, Mark(box=other, label="2"))


def test_a_box_stands_in_the_picture_and_its_label_where_there_is_room() -> None:
    marks = [Mark(box=Box(0, 0, 10, 10)), Mark(box=Box(80, 90, 130, 120)), Mark(box=Box(40, 40, 60, 60))]
    figure, _ = whole_figures(noise(100, 100), noise(96, 96), caption="a", seen_caption="b", marks=marks)
    assert [figure.inset(mark) for mark in marks] == [
        "0.00% 90.00% 90.00% 0.00%",
        "90.00% 0.00% 0.00% 80.00%",
        "40.00% 40.00% 40.00% 40.00%",
    ]
    assert [figure.near(mark) for mark in marks] == ["top", "bottom right", ""]
