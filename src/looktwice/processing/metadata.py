"""Metadata of picture files: a decoder is not shown it, and of all there may be only the orientation is read.

Decoders raise errors for tags, texts and profiles that say nothing of the pixels, and hold limits for them.
"""

from __future__ import annotations

import io
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import IO, NamedTuple

ORIENTATION = 0x0112
PNG_SIGNATURE, JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
EXIF_MARK = b"Exif\0\0"
MOST_EXIF = 1 << 20
"""Bytes of EXIF that are read; the orientation stands near its beginning."""

_PNG_TEXTS = (b"tEXt", b"zTXt")
_PNG_KEPT = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
"""Chunks of a PNG that decoders may do without, and that say something of the pixels or the frames."""
_JPEG_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}
"""Markers of comments and of APPn, but for JFIF's and Adobe's, which say how colours are stored."""
_JPEG_ALONE = {0x00, 0x01, *range(0xD0, 0xD9)}
"""Markers without a segment."""
_JPEG_PIXELS = {0xD9, 0xDA}
_PROFILE = re.compile(rb"Raw profile type (?:exif|APP1)\0")
"""EXIF in a text chunk of a PNG, as ImageMagick wrote it."""
_AVIF_EXIF = re.compile(rb"(infe[\x02\x03].{3}(?:.{4}|.{6}))Exif", re.DOTALL)
"""The entry of EXIF in the list of items; source: ISO/IEC 14496-12, 8.11.6."""
_INTEGERS = {1: 1, 3: 2, 4: 4}
"""Bytes of EXIF's unsigned types."""


class Pixels(NamedTuple):
    """What a decoder is shown of a picture's file, and the EXIF that was left out of it (b"" without one)."""

    file: IO[bytes]
    exif: bytes


class _Pieces(io.RawIOBase):
    """Pieces of a file, each from its start to before its stop, as one file."""

    def __init__(self, file: IO[bytes], pieces: list[tuple[int, int]]) -> None:
        self.file = file
        self.stops = [stop for _, stop in pieces]
        self.ends = list(accumulate(stop - start for start, stop in pieces))
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = max(0, offset + (0, self.place, self.ends[-1])[whence])
        return self.place

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        number = bisect_right(self.ends, self.place)
        if number == len(self.ends):
            return 0
        left = self.ends[number] - self.place
        self.file.seek(self.stops[number] - left)
        size = self.file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]
        self.place += size
        return size


def without_metadata(file: IO[bytes]) -> Pixels:
    """The file of a picture as a decoder is to see it: of a PNG, JPEG or AVIF without its metadata."""
    head = file.read(32)
    file.seek(0)
    if head.startswith(PNG_SIGNATURE):
        return _without(file, *_png_metadata(file))
    if head.startswith(JPEG_SIGNATURE):
        return _without(file, *_jpeg_metadata(file))
    if head[4:8] == b"ftyp" and re.search(b"avi[fs]", head):
        # the decoder reads all of it at once anyway; how an AVIF is turned does not stand in its EXIF
        return Pixels(io.BytesIO(_AVIF_EXIF.sub(rb"\1free", file.read())), b"")
    return Pixels(file, b"")


def _without(file: IO[bytes], spans: list[tuple[int, int]], exif: bytes) -> Pixels:
    """The file without some spans of it."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if not spans:
        return Pixels(file, exif)
    edges = [0, *(min(edge, end) for span in spans for edge in span), end]
    pieces = [(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]
    return Pixels(io.BufferedReader(_Pieces(file, pieces)), exif)  # type: ignore[type-var]


def _add(spans: list[tuple[int, int]], start: int, stop: int) -> None:
    """One more span behind the others, as one with the last where they touch: a file may hold millions of chunks."""
    if spans and spans[-1][1] == start:
        start, _ = spans.pop()
    spans.append((start, stop))


def png_chunks(file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Start, stop and kind of each chunk of a PNG, of which only the head is read. Source: the PNG specification, 5."""
    place, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND" and file.seek(place) == place and len(head := file.read(8)) == 8:
        stop, kind = place + 12 + int.from_bytes(head[:4], "big"), head[4:]
        yield place, stop, kind
        place = stop


def _png_metadata(file: IO[bytes]) -> tuple[list[tuple[int, int]], bytes]:
    spans: list[tuple[int, int]] = []
    exif = profile = b""
    for start, stop, kind in png_chunks(file):
        if not kind.isalpha() or kind[:1].isupper() or kind in _PNG_KEPT:
            continue
        _add(spans, start, stop)
        if kind == b"eXIf":
            exif = file.read(min(stop - start - 12, MOST_EXIF))
        elif kind in _PNG_TEXTS:
            profile = _profile(file.read(min(stop - start - 12, MOST_EXIF))) or profile
    return spans, exif or profile


def _profile(text: bytes) -> bytes:
    """The EXIF in a text chunk: a heading of three lines and then hexadecimal digits; b"" where there is none."""
    keyword = _PROFILE.match(text)
    if not keyword:
        return b""
    text = text[keyword.end() :]
    try:
        if text.startswith(b"\0"):
            text = zlib.decompressobj().decompress(text[1:], 2 * MOST_EXIF)
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except (zlib.error, ValueError):
        return b""


def _jpeg_metadata(file: IO[bytes]) -> tuple[list[tuple[int, int]], bytes]:
    """Source: ITU-T T.81, B.1.1; Exif 3.0, 4.7."""
    spans: list[tuple[int, int]] = []
    exif, place = b"", len(JPEG_SIGNATURE)
    while file.seek(place) == place and len(head := file.read(10)) >= 4:
        marker = head[1]
        if head[0] != 0xFF:  # decoders pass over what stands between two segments
            skipped = (head + file.read(1 << 16)).find(b"\xff")
            if skipped < 0:
                break
            place += skipped
        elif marker == 0xFF:  # and over bytes that fill up
            place += 1
        elif marker in _JPEG_ALONE:
            place += 2
        elif marker in _JPEG_PIXELS or (size := int.from_bytes(head[2:4], "big")) < 2:
            break
        else:
            stop = place + 2 + size
            if marker in _JPEG_METADATA:
                _add(spans, place, stop)
            if marker == 0xE1 and head[4:] == EXIF_MARK and len(exif) < MOST_EXIF:
                exif += file.read(stop - place - 10)
            place = stop
    return spans, exif


def orientation_of(exif: bytes) -> int:
    """How a picture is to be turned: the orientation in its EXIF, 1 (not at all) where it does not say.

    1 to 8; nothing but this one tag is read, so that no other can be wrong. Source: TIFF 6.0, section 2.
    """
    exif = exif.removeprefix(EXIF_MARK)
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    if order is None:
        return 1

    def number(start: int, size: int) -> int:
        return int.from_bytes(exif[start : start + size], order)  # type: ignore[arg-type]

    place = number(4, 4)
    for entry in range(place + 2, min(place + 2 + 12 * number(place, 2), len(exif) - 11), 12):
        size = _INTEGERS.get(number(entry + 2, 2))
        if number(entry, 2) == ORIENTATION and size and number(entry + 4, 4) == 1:
            found = number(entry + 8, size)
            return found if 1 <= found <= 8 else 1
    return 1
