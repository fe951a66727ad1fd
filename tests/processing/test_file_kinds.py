"""Files that are no pictures are named for what they are, by their bytes and not by their name."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from looktwice.errors import ImageError
from looktwice.processing.file_kinds import LOOKED_AT, image_kind, other_kind
from looktwice.processing.images import image_size, open_image


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), "teal").save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", b"x")
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 4)))
    return buffer.getvalue()


BRANDS = b"\0\0\0\x18ftyp%s\0\0\0\0mif1%s"
OTHERS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n": ("a Git LFS pointer", "git lfs pull"),
    b"../../.git/annex/objects/aa/bb/MD5E-s3--0.jpg": ("a git-annex pointer", "git annex get"),
    BRANDS % (b"heic", b"heic"): ("a HEIC picture", "convert it to PNG or JPEG"),
    BRANDS % (b"mif1", b"heic"): ("a HEIC picture", "convert it"),
    BRANDS % (b"mif1", b"miaf"): ("a HEIF picture", "convert it"),
    BRANDS % (b"isom", b"mp41"): ("an MP4 video", "write the frames you mean"),
    BRANDS % (b"qt  ", b"qt  "): ("a QuickTime video", "write the frames you mean"),
    BRANDS % (b"crx ", b"isom"): ("a camera's raw file", "develop it"),
    b"\x1aE\xdf\xa3\x01\0\0\0": ("a Matroska or WebM video", "frames"),
    b"RIFF\0\0\0\0AVI LIST": ("an AVI video", "frames"),
    b"\0\0\1\xba\x44\0\4\0" * 4: ("an MPEG video", "frames"),
    b"\0\0\1\xb3\x14\0\xf0\x13" * 4: ("an MPEG video", "frames"),
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": ("an SVG drawing", "convert it"),
    b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- made -->\n<svg viewBox='0 0 1 1'/>": ("an SVG drawing", "convert it"),
    b"<!DOCTYPE html><title>Expired</title>": ("an HTML page", "download the picture again"),
    b"\n\n<html lang=en>": ("an HTML page", "download"),
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": ("an XML text", "download"),
    b'{"message": "Not Found"}': ("a JSON text", "name the file of the picture"),
    json.dumps([{"a": 1}] * 2000).encode(): ("a JSON text", "name"),
    b"name,width,height\na.png,3,4\nb.png,5,6\n": ("a table (CSV)", "name"),
    "Name;Größe\na;1\n".encode("latin-1"): ("a table (CSV)", "name"),
    b"see the other folder": ("a text", "name"),
    "ein Bild\r\n".encode("utf-16"): ("a text", "name"),
    b64encode(encoded("PNG")): ("a text that holds a picture in base64", "decode it"),
    b"data:image/png;base64," + b64encode(encoded("PNG")): ("a text that holds a picture as a data: URL", "decode"),
    b"%PDF-1.7\n": ("a PDF document", "write the page you mean"),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n": ("a PostScript file", "convert it"),
    encoded("EPS"): ("a PostScript file", "convert it"),
    zipped(): ("a ZIP archive", "unpack it"),
    gzip.compress(b"x", mtime=0): ("a gzip archive", "unpack it"),
    b"a.png" + bytes(252) + b"ustar\0": ("an archive", "unpack it"),
    array(): ("a NumPy array", "write it as PNG"),
    b"PAR1" + bytes(20): ("a file of data", "name"),
    b"\x89HDF\r\n\x1a\n" + bytes(80): ("a file of data", "name"),
    b"GRIB" + bytes(3) + b"\1": ("a file of data", "name"),
    b"gimp xcf v011\0": ("a GIMP picture", "convert it"),
    bytes(128) + b"DICM": ("a DICOM picture", "convert it"),
    b"\xff\x0a\xfa\x7f": ("a JPEG XL picture", "convert it"),
    b"II*\0\x10\0\0\0CR\2\0": ("a camera's raw file", "develop it"),
    b"\x80\x04\x95\x0b": ("a Python pickle", "write the picture"),
    bytes(64): ("zeros where a picture begins", "copy or download it again"),
}


@pytest.mark.parametrize("read", [open_image, image_size])
@pytest.mark.parametrize(("content", "what", "mend"), [(content, *words) for content, words in OTHERS.items()])
def test_a_file_that_is_something_else_is_named(content: bytes, what: str, mend: str, read, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a readable picture ({what}")
    assert mend in message
    assert (message.count("\n"), caught.value.reason) == (0, "other")


def test_the_preview_in_a_raw_file_is_not_taken_for_the_picture(tmp_path: Path) -> None:
    (tmp_path / "x.nef").write_bytes(encoded("TIFF", tiffinfo={254: 1}))
    with pytest.raises(ImageError, match=r"not a readable picture \(a camera's raw file.*develop it"):
        open_image(tmp_path / "x.nef")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000"])
def test_a_picture_is_no_other_file_and_damaged_where_it_cannot_be_opened(kind: str, tmp_path: Path) -> None:
    data = encoded(kind)
    assert other_kind(data) is None
    assert image_kind(data)
    (tmp_path / "x").write_bytes(data[:20])
    with pytest.raises(ImageError, match="not a readable picture|is damaged") as caught:
        open_image(tmp_path / "x")
    assert caught.value.reason == "damaged"


@pytest.mark.parametrize("name", ["x.ppm", "x.tga", "x.ico", "x.pcx", "x.xbm", "x.dds"])
def test_rarer_pictures_that_pillow_reads_are_read(name: str, tmp_path: Path) -> None:
    Image.new("1" if name.endswith("xbm") else "RGB", (16, 16)).save(tmp_path / name)
    assert image_size(tmp_path / name) == (16, 16)


def test_a_text_that_is_cut_within_a_character_is_a_text() -> None:
    assert other_kind(("x" + "é" * LOOKED_AT).encode()[:LOOKED_AT])


def test_many_comments_before_the_first_tag_take_no_time(tmp_path: Path) -> None:
    file = tmp_path / "page.jpg"
    file.write_text("<!-- a comment -->\n" * 500 + "<rss>")
    with pytest.raises(ImageError, match="not a readable picture"):
        open_image(file)
