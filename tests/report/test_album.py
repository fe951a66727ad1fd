"""Pictures of a page with many items: each once, all together within the bytes there are."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from looktwice.report.album import Album


def noise(seed: int, size: int = 400) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def image_of(entry: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry["src"].partition(",")[2])))


def test_a_picture_and_a_crop_are_there_once(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "a.png")
    album = Album(4)
    first, crop = album.whole(tmp_path / "a.png"), album.crop(tmp_path / "a.png", [10, 20, 58, 68], [48, 48])
    assert (first, crop) == (0, 1)
    assert album.whole(tmp_path / "a.png") == 0
    assert album.crop(tmp_path / "a.png", [10, 20, 58, 68], [48, 48]) == 1
    assert album.crop(tmp_path / "a.png", [0, 0, 48, 48], [48, 48]) == 2
    assert album.entries[1]["w"] == 96 and album.entries[1]["big"]


def test_a_crop_shows_the_pixels_of_its_box() -> None:
    image = Image.new("RGB", (100, 100), "white")
    image.paste("red", (10, 20, 30, 40))
    album = Album(1)
    album.crop(image, [10.0, 20.0, 30.0, 40.0], [20, 20])
    assert image_of(album.entries[0]).convert("RGB").getcolors() == [(400, (255, 0, 0))]


def test_many_pictures_share_the_bytes_and_each_is_smaller_for_it() -> None:
    few, many = Album(2, 20_000), Album(8, 20_000)
    for seed in range(2):
        few.whole(noise(seed))
    images = [noise(seed) for seed in range(8)]
    for image in images:
        many.whole(image)
    assert len(many.entries) == 8 and many.num_left_out == 0
    assert sum(len(entry["src"]) for entry in many.entries) * 3 / 4 < 20_500
    assert image_of(many.entries[0]).width < image_of(few.entries[0]).width
    assert {entry["w"] for entry in many.entries} == {360}  # as large on the page


def test_pictures_without_room_are_left_out_and_counted() -> None:
    album = Album(100, 1_000)
    assert album.whole(noise(0)) is None and album.num_left_out == 1


def test_a_file_that_has_gone_has_no_number(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    album = Album(2)
    assert album.whole(tmp_path / "gone.png") is None
    assert album.crop(tmp_path / "text.png", [0, 0, 4, 4], [4, 4]) is None
    assert album.num_left_out == 0 and album.entries == []
