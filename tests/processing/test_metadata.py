"""Metadata of picture files: whatever stands in it, the picture opens, as upright as its orientation says."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from looktwice.processing.images import image_size, open_image, read_header
from looktwice.processing.metadata import ORIENTATION, orientation_of, without_metadata

Entry = tuple[int, int, int, bytes]
"""Tag, type, count and the four bytes of the value."""
ROTATED = 6
CORNER = Image.new("RGB", (24, 16), "white")
CORNER.paste((255, 0, 0), (0, 0, 8, 8))


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    CORNER.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


FILES = {kind: encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "AVIF") if kind != "AVIF" or features.check("avif")}
UPRIGHT = ImageOps.expand(CORNER).transpose(Image.Transpose.ROTATE_270)


def exif(*entries: Entry, order: str = "<", orientation: int = ROTATED) -> bytes:
    """EXIF of one directory, the orientation among the entries."""
    said = (ORIENTATION, 3, 1, struct.pack(f"{order}HH", orientation, 0))
    rows = sorted([said, *entries], key=lambda entry: entry[0])
    directory = b"".join(struct.pack(f"{order}HHI", *row[:3]) + row[3] for row in rows)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", 8, len(rows)) + directory + bytes(4)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_exif(kind: str, raw: bytes) -> bytes:
    """The picture of FILES with EXIF put into its file as it is, good or bad."""
    data = FILES[kind]
    if kind == "JPEG":
        return data[:2] + segment(0xE1, b"Exif\0\0" + raw) + data[2:]
    if kind == "PNG":
        return data[:33] + chunk(b"eXIf", raw) + data[33:]
    # both are changed by their own writers, which take EXIF as bytes
    return encoded(kind, exif=raw)


def seen(data: bytes, path: Path, *, warns: bool = False) -> Image.Image:
    """The picture of a file, its size the same however it is asked for, and no warning on the way."""
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if warns else "error")
        image = open_image(path)
        assert image.size == image_size(path) == read_header(path).size
    return image


entries = st.tuples(
    st.integers(0, 0xFFFF).filter(lambda tag: tag != ORIENTATION) | st.sampled_from([0x8769, 0x8825, 0xA005, 0x011A]),
    st.integers(0, 20) | st.integers(0, 0xFFFF),
    st.sampled_from([0, 1, 2, 5, 1000, 2**31, 2**32 - 1]),
    st.binary(min_size=4, max_size=4),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures") / "x"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@given(others=st.lists(entries, max_size=3), order=st.sampled_from("<>"))
def test_other_tags_change_nothing(kind: str, path: Path, others: list[Entry], order: str) -> None:
    image = seen(with_exif(kind, exif(*others, order=order)), path)
    assert image.size == UPRIGHT.size
    red, white = image.getpixel((image.width - 3, 2)), image.getpixel((2, 2))
    assert red[1] < 100 < white[1]  # type: ignore[index]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@given(junk=st.binary(max_size=60), start=st.sampled_from([b"", b"II*\0", b"MM\0*", exif()[:20]]))
def test_broken_exif_is_no_damage(kind: str, path: Path, junk: bytes, start: bytes) -> None:
    seen(with_exif(kind, start + junk), path)


def test_broken_exif_of_webp_is_no_damage(path: Path) -> None:
    assert seen(encoded("WEBP", exif=b"junk"), path).size == CORNER.size


@pytest.mark.skipif("AVIF" not in FILES, reason="this Pillow reads no AVIF")
def test_the_exif_of_avif_is_not_read_since_the_format_has_its_own_turn(path: Path) -> None:
    data = encoded("AVIF", exif=exif((0x010F, 2, 4, b"Me!\0")))
    assert seen(data, path).size == UPRIGHT.size
    start = data.index(b"II*\0")
    assert seen(data[:start] + b"junk" + data[start + 4 :], path).size == UPRIGHT.size


inline = st.tuples(
    st.integers(0, 253) | st.integers(701, 0xFFFF),
    st.sampled_from([1, 2, 3, 4, 6, 7, 8, 9, 13, 99]),
    st.integers(0, 1),
    st.binary(min_size=4, max_size=4),
)
"""Entries whose value lies in the directory: Pillow reads no further behind one that lies beyond the file."""


@given(others=st.lists(inline, max_size=3))
def test_private_tags_of_a_tiff_change_nothing(path: Path, others: list[Entry]) -> None:
    pixels = np.asarray(CORNER).tobytes()
    short = {256: 24, 257: 16, 259: 1, 262: 2, 277: 3, 278: 16}
    needed = [(tag, 4, 1, struct.pack("<I", value)) for tag, value in short.items()]
    start = 8 + 2 + 12 * (len(needed) + 4 + len(others)) + 4
    needed += [(258, 3, 1, struct.pack("<HH", 8, 0)), (273, 4, 1, struct.pack("<I", start))]
    needed += [(279, 4, 1, struct.pack("<I", len(pixels)))]
    image = seen(exif(*needed, *others) + pixels, path, warns=True)
    assert image.size == UPRIGHT.size
    assert image.getpixel((image.width - 3, 2)) == (255, 0, 0)


@pytest.mark.parametrize("value", [0, 1, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(value: int) -> None:
    assert orientation_of(exif(orientation=value)) == 1


def test_an_orientation_of_another_type_is_none_and_the_first_of_two_counts() -> None:
    assert orientation_of(exif((ORIENTATION, 2, 1, b"3\0\0\0"))) == ROTATED
    assert orientation_of(exif((ORIENTATION, 3, 1, b"\3\0\0\0"))) == ROTATED
    assert orientation_of(b"") == orientation_of(b"II*\0") == orientation_of(b"\xff" * 30) == 1


def test_exif_in_the_text_that_imagemagick_writes_turns_a_png(path: Path) -> None:
    raw = b"Exif\0\0" + exif()
    text = b"\nexif\n%8d\n%s\n" % (len(raw), raw.hex().encode())
    data = FILES["PNG"]
    for written in (
        chunk(b"tEXt", b"Raw profile type exif\0" + text),
        chunk(b"zTXt", b"Raw profile type APP1\0\0" + zlib.compress(text)),
    ):
        assert seen(data[:33] + written + data[33:], path).size == UPRIGHT.size
        assert seen(data[:-12] + written + data[-12:], path).size == UPRIGHT.size
    broken = chunk(b"zTXt", b"Raw profile type exif\0\0junk") + chunk(b"tEXt", b"Raw profile type exif\0\n\n\nxyz")
    assert seen(data[:33] + broken + data[33:], path).size == CORNER.size


BOMB = zlib.compress(bytes(70 << 20), 1)


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"zTXt", b"Comment\0\0" + BOMB),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * (70 << 20)),
        chunk(b"iCCP", b"sRGB\0\0" + BOMB),
        chunk(b"iCCP", b"x"),
        chunk(b"iCCP", b"sRGB\0\7junk"),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
        chunk(b"tEXt", b"\xff\0\xff")[:-1] + b"?",
        chunk(b"gAMA", b"") + chunk(b"pHYs", b"1") + chunk(b"cHRM", b"") + chunk(b"sRGB", b""),
        chunk(b"prIv", b"x" * 100),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", [33, -12])
def test_texts_and_profiles_of_a_png_are_never_unpacked(metadata: bytes, place: int, path: Path) -> None:
    data = FILES["PNG"]
    assert seen(data[:place] + metadata + data[place:], path).tobytes() == CORNER.tobytes()


def test_what_stands_behind_the_end_of_a_png_is_not_looked_at(path: Path) -> None:
    behind = chunk(b"IDAT", b"junk")[:-1] + b"?" + chunk(b"eXIf", exif())
    assert seen(FILES["PNG"] + behind, path).tobytes() == CORNER.tobytes()


def test_millions_of_chunks_are_one_gap(path: Path) -> None:
    data = FILES["PNG"]
    shown = without_metadata(io.BytesIO(data[:33] + chunk(b"tEXt", b"") * 5000 + data[33:])).file
    assert len(shown.raw.stops) == 2  # type: ignore[attr-defined]
    assert shown.read() == data


@pytest.mark.parametrize(
    "metadata",
    [
        segment(0xE2, b"MPF\0II*\0" + b"\xff" * 20),
        segment(0xE2, b"ICC_PROFILE\0\1\2junk"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\xff"),
        segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\2ab"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<x>" * 20_000),
        segment(0xE1, b"Exif\0\0"),
        segment(0xFE, b""),
        b"\xff\xff\xff" + segment(0xE1, b"Exif\0\0" + exif())[1:],
        b"junk" + segment(0xE1, b"Exif\0\0" + exif()),
    ],
)
def test_segments_of_a_jpeg_change_nothing(metadata: bytes, path: Path) -> None:
    data = FILES["JPEG"]
    with Image.open(io.BytesIO(data)) as image:
        wanted = image.transpose(Image.Transpose.ROTATE_270) if exif() in metadata else image.convert("RGB")
    assert seen(data[:20] + metadata + data[20:], path).tobytes() == wanted.tobytes()  # behind the JFIF segment


def test_a_file_without_metadata_is_shown_as_it_is() -> None:
    file = io.BytesIO(FILES["PNG"])
    assert without_metadata(file).file is file


@given(cuts=st.lists(st.integers(0, 400), max_size=6), size=st.integers(1, 50))
def test_pieces_of_a_file_read_like_the_file_they_make(cuts: list[int], size: int) -> None:
    data = FILES["PNG"]
    texts = b"".join(chunk(b"tEXt", b"k\0" + b"x" * cut) for cut in cuts)
    shown = without_metadata(io.BytesIO(data[:33] + texts + data[33:])).file
    assert b"".join(iter(lambda: shown.read(size), b"")) == data
    for place in range(0, len(data), 7):
        shown.seek(place)
        assert shown.read(size) == data[place : place + size]
    assert shown.seek(0, io.SEEK_END) == len(data)
