"""Opening pictures: modes, orientation, damage; and cutting them into patches."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import looktwice.processing.images
from looktwice.errors import ImageError
from looktwice.geometry import Size
from looktwice.processing.images import image_size, normalise, open_image, patchify, read_header, resize, to_rgb

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(image: Image.Image, name: str, **options: object) -> Path:
        path = tmp_path / name
        image.save(path, **options)  # type: ignore[arg-type]
        return path

    return write


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


# -- modes


def test_transparent_pixels_become_white_not_the_colour_they_hide(save: Save) -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 255, 51)):
        image.putpixel((x, 0), (255, 0, 0, alpha))
    assert pixels(open_image(save(image, "x.png"))) == [WHITE, RED, (255, 204, 204)]


def test_transparent_grey_becomes_white(save: Save) -> None:
    image = Image.new("LA", (2, 1), (0, 0))
    image.putpixel((1, 0), (40, 255))
    assert pixels(open_image(save(image, "x.png"))) == [WHITE, (40, 40, 40)]


def test_a_transparent_palette_entry_becomes_white(save: Save) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((1, 0), 1)
    assert pixels(open_image(save(image, "x.png", transparency=0))) == [WHITE, RED]


def test_a_transparent_colour_becomes_white(save: Save) -> None:
    image = Image.new("RGB", (2, 1), (0, 0, 255))
    image.putpixel((1, 0), RED)
    assert pixels(open_image(save(image, "x.png", transparency=(0, 0, 255)))) == [WHITE, RED]


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_16_bits_are_scaled_not_clipped(save: Save, name: str) -> None:
    image = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16))
    assert [red for red, _, _ in pixels(open_image(save(image, name)))] == [0, 0, 1, 128, 255]


def test_the_transparent_value_of_16_bit_grey_becomes_white(save: Save) -> None:
    image = Image.fromarray(np.array([[0, 256, 512]], dtype=np.uint16))
    assert [red for red, _, _ in pixels(open_image(save(image, "x.png", transparency=256)))] == [0, 255, 2]


def test_16_bits_in_a_32_bit_image_are_scaled() -> None:
    image = Image.fromarray(np.array([[0, 300, 32768, 65535]], dtype=np.int32))
    assert [red for red, _, _ in pixels(to_rgb(image))] == [0, 1, 127, 255]


def test_8_bits_in_a_32_bit_image_stay_as_they_are() -> None:
    image = Image.fromarray(np.array([[0, 7, 255]], dtype=np.int32))
    assert [red for red, _, _ in pixels(to_rgb(image))] == [0, 7, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_beyond_16_bits_are_scaled_by_the_largest(dtype: type) -> None:
    image = Image.fromarray(np.array([[-5, 0, 100_000, 200_000]], dtype=dtype))
    assert [red for red, _, _ in pixels(to_rgb(image))] == [0, 0, 127, 255]


def test_floats_up_to_1_are_fractions_and_what_is_no_number_is_black(save: Save) -> None:
    image = Image.fromarray(np.array([[0, 0.5, 1.001, np.nan, -np.inf, np.inf]], dtype=np.float32))
    assert [red for red, _, _ in pixels(open_image(save(image, "x.tiff")))] == [0, 127, 255, 0, 0, 0]


def test_cmyk_becomes_rgb(save: Save) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert pixels(open_image(save(image, "x.tiff")))[0] == RED


def test_one_bit_becomes_black_and_white(save: Save) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(open_image(save(image, "x.png"))) == [BLACK, WHITE]


def test_an_animation_gives_its_first_frame(save: Save) -> None:
    first, second = Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), (0, 0, 255))
    path = save(first, "x.gif", save_all=True, append_images=[second])
    assert set(pixels(open_image(path))) == {RED}


# -- orientation

# where the top-left corner of the stored pixels belongs in the upright picture, and whether the sides swap
ORIENTATIONS = {
    1: ("top-left", False),
    2: ("top-right", False),
    3: ("bottom-right", False),
    4: ("bottom-left", False),
    5: ("top-left", True),
    6: ("top-right", True),
    7: ("bottom-right", True),
    8: ("bottom-left", True),
}


def marked(orientation: int) -> tuple[Image.Image, Image.Exif]:
    """40 x 20, white, red in the corner stored first; and the EXIF data that says how to turn it."""
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image, exif


def corner_of(image: Image.Image) -> str:
    places = {
        "top-left": (2, 2),
        "top-right": (image.width - 3, 2),
        "bottom-left": (2, image.height - 3),
        "bottom-right": (image.width - 3, image.height - 3),
    }
    (found,) = [name for name, place in places.items() if image.getpixel(place)[1] < 100]  # type: ignore[index]
    return found


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tiff", "x.webp"])
def test_images_are_turned_upright_and_their_size_agrees(save: Save, name: str, orientation: int) -> None:
    image, exif = marked(orientation)
    path = save(image, name, exif=exif)
    corner, is_turned = ORIENTATIONS[orientation]
    upright = open_image(path)
    assert corner_of(upright) == corner
    assert upright.size == image_size(path) == ((20, 40) if is_turned else (40, 20))


def png_with_chunk_after_pixels(image: Image.Image, kind: bytes, content: bytes) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = buffer.getvalue()
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:-12] + chunk + data[-12:]


def test_exif_behind_the_pixels_of_a_png_turns_it_too(tmp_path: Path) -> None:
    image, exif = marked(6)
    path = tmp_path / "x.png"
    path.write_bytes(png_with_chunk_after_pixels(image, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    assert open_image(path).size == image_size(path) == (20, 40)


def test_the_size_of_a_turned_image_already_in_memory_is_its_upright_size(save: Save) -> None:
    image, exif = marked(6)
    with Image.open(save(image, "x.png", exif=exif)) as mine:
        assert image_size(mine) == (20, 40)


def test_the_size_needs_no_pixels(save: Save) -> None:
    path = save(Image.new("RGB", (400, 300)), "x.png")
    path.write_bytes(path.read_bytes()[:60])
    assert image_size(path) == Size(400, 300)


# -- what cannot be used


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tiff", "x.webp", "x.gif"])
def test_a_truncated_image_is_damaged(save: Save, name: str) -> None:
    path = save(noise(40, 30), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=f"{path}: "):
        open_image(path)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.gif", "x.webp", "x.bmp", "x.tiff"])
def test_a_header_is_believed_of_a_whole_file_alone(save: Save, name: str) -> None:
    path = save(noise(40, 30), name)
    assert read_header(path).size == (40, 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size - 40])
    with pytest.raises(ImageError, match=f"{path}: "):
        read_header(path)


def test_a_webp_that_is_whole_is_not_decoded(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looktwice.processing.images, "open_image", None)
    assert read_header(save(noise(40, 30), "x.webp")).size == (40, 30)


def test_a_png_whose_pixels_pillow_would_make_up_is_damaged(save: Save) -> None:
    path = save(Image.new("RGB", (200, 200), (225, 225, 225)), "x.png")
    data = bytearray(path.read_bytes())
    middle = (data.index(b"IDAT") + len(data)) // 2
    data[middle : middle + 20] = bytes(20)
    path.write_bytes(data)
    with Image.open(path) as image:
        assert image.getpixel((199, 199)) == BLACK  # no error, and not white
    with pytest.raises(ImageError, match="the picture is damaged"):
        open_image(path)


@pytest.mark.parametrize("read", [open_image, read_header])
def test_a_gif_whose_frames_cannot_be_counted_is_damaged(read: Callable[[Path], object], save: Save) -> None:
    path = save(noise(40, 30), "x.gif", save_all=True, append_images=[noise(40, 30)])
    data = path.read_bytes()
    damaged = range(20, len(data), 97)
    for place in damaged:
        path.write_bytes(data[:place])
        with pytest.raises(ImageError):
            read(path)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("damaged", ["header", "pixels"])
def test_a_damaged_avif_is_refused(save: Save, damaged: str) -> None:
    path = save(noise(40, 30), "x.avif")
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    path.write_bytes(data.replace(b"av01", b"xxxx") if damaged == "header" else data[:start] + bytes(len(data) - start))
    with pytest.raises(ImageError, match=r"x\.avif: "):
        open_image(path)


@pytest.mark.parametrize("read", [open_image, image_size])
def test_a_missing_image_is_named(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: no such picture"):
        read(tmp_path / "gone.png")


@pytest.mark.parametrize("read", [open_image, image_size])
@pytest.mark.parametrize("content", [b"", b"\x01\x02\x03", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_refused(read: Callable[[Path], object], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.png: not a readable picture"):
        read(path)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not a readable picture"):
        open_image(tmp_path)


@pytest.mark.parametrize("read", [open_image, image_size])
def test_an_image_with_too_many_pixels_is_refused_with_its_size(
    read: Callable[[Path], object], save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looktwice.processing.images, "MAX_SOURCE_PIXELS", 1199)
    with pytest.raises(ImageError, match="40x30 pixels, more than 1199"):
        read(save(Image.new("RGB", (40, 30)), "x.png"))


def test_a_header_that_promises_billions_of_pixels_is_refused(save: Save) -> None:
    path = save(Image.new("RGB", (1, 1)), "x.bmp")
    data = bytearray(path.read_bytes())
    data[18:26] = struct.pack("<ii", 100_000, 100_000)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"10000000000 pixels.* exceeds limit") as caught:
        image_size(path)
    assert caught.value.reason == "huge"


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ImageError, match=r"x\.png: not a readable picture \(not a file\)"):
        open_image(tmp_path / "x.png")


# -- whose picture it is


@pytest.mark.parametrize("read", [open_image, image_size])
def test_an_image_given_open_stays_open_and_as_it_was(read: Callable[[Image.Image], object], save: Save) -> None:
    image, exif = marked(6)
    with Image.open(save(image, "x.png", exif=exif)) as mine:
        read(mine)
        assert mine.size == (40, 20)
        assert mine.getpixel((0, 0)) == RED


@pytest.mark.parametrize("read", [open_image, image_size])
def test_a_file_opened_here_is_closed(
    read: Callable[[Path], object], save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, really_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda source: opened.append(really_open(source)) or opened[0])
    read(save(Image.new("RGB", (4, 4)), "x.gif"))
    assert opened[0].fp is None


# -- resizing and patches


def test_resizing_is_pillows_bilinear_filter() -> None:
    image = noise(40, 30)
    wanted = image.resize((32, 64), Image.Resampling.BILINEAR)
    assert pixels(resize(image, Size(32, 64))) == pixels(wanted)


def test_a_rectangle_is_cut_before_it_is_resized() -> None:
    image = noise(40, 30)
    wanted = image.crop((5, 6, 15, 26)).resize((32, 64), Image.Resampling.BILINEAR)
    assert pixels(resize(image, Size(32, 64), (5, 6, 15, 26))) == pixels(wanted)


def test_a_rectangle_of_the_right_size_keeps_its_pixels() -> None:
    image = noise(40, 30)
    assert pixels(resize(image, Size(10, 20), (5, 6, 15, 26))) == pixels(image.crop((5, 6, 15, 26)))


def test_a_constant_image_has_its_own_bytes() -> None:
    patched = patchify(Image.new("RGB", (64, 32), (128, 128, 128)), patch_size=16, stride=2)
    assert torch.equal(patched.pixel_values, torch.full((8, 768), 128, dtype=torch.uint8))


def encoding_places() -> Image.Image:
    """96 wide, 64 high: red is the column, green the row, blue 255."""
    rows, columns = np.mgrid[0:64, 0:96]
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 255)], axis=-1).astype(np.uint8))


def test_patches_come_in_blocks_of_two_by_two() -> None:
    patched = patchify(encoding_places(), patch_size=16, stride=2)
    first_pixels = patched.pixel_values[:, [256, 0]]  # row and column
    places = [(0, 0), (0, 16), (16, 0), (16, 16), (0, 32), (0, 48), (16, 32), (16, 48), (0, 64)]
    assert [tuple(place) for place in first_pixels[:9].tolist()] == places


def test_a_patch_runs_over_columns_then_rows_then_channels() -> None:
    by_channel = patchify(encoding_places(), patch_size=16, stride=2).pixel_values[3].view(3, 16, 16)
    assert by_channel[0, 0].tolist() == list(range(16, 32))
    assert by_channel[1, :, 0].tolist() == list(range(16, 32))
    assert by_channel[2].unique().tolist() == [255]


def test_frames_follow_each_other_in_the_block_order_of_an_image() -> None:
    frames = [encoding_places(), encoding_places().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    patched = patchify(*frames, patch_size=16, stride=2, is_video=True)
    alone = [patchify(frame, patch_size=16, stride=2).pixel_values for frame in frames]
    assert torch.equal(patched.pixel_values, torch.cat(alone))
    assert (patched.grid_thw, patched.size, patched.num_tokens) == ((2, 4, 6), Size(96, 64), 12)
    assert patched.is_video


def test_a_patched_image_knows_its_grid_size_and_tokens() -> None:
    patched = patchify(encoding_places(), patch_size=16, stride=2)
    assert (patched.grid_thw, patched.size, patched.num_tokens) == ((1, 4, 6), Size(96, 64), 6)


def test_every_byte_is_divided_and_not_multiplied_by_a_rounded_reciprocal() -> None:
    values = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(normalise(torch.arange(256, dtype=torch.uint8)).numpy(), values)
