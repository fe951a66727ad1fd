"""How a picture may be named: paths, file addresses, and base64 as people and tools write it."""

from __future__ import annotations

import io
from base64 import b64encode, encodebytes, urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from looktwice.errors import ImageError
from looktwice.processing.addresses import data_url, held_bytes, source_of, written_path
from looktwice.processing.images import image_size, name_of, open_image


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((24, 16), 90).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


RAW = encoded("PNG")
BASE64 = b64encode(RAW).decode()
LINES = encodebytes(RAW).decode()
DRESSES: dict[str, Callable[[], str]] = {
    "bare": lambda: BASE64,
    "bare, in lines": lambda: LINES,
    "bare, in lines of CR LF and indented": lambda: "\r\n  " + LINES.replace("\n", "\r\n  "),
    "bare, with escaped line ends": lambda: LINES.replace("\n", "\\n"),
    "bare, as Python prints bytes": lambda: str(b64encode(RAW)),
    "bare, without padding": lambda: BASE64.rstrip("="),
    "bare, for addresses": lambda: urlsafe_b64encode(RAW).decode(),
    "bare, percent-encoded": lambda: quote(BASE64, safe=""),
    "base64://": lambda: f"base64://{BASE64}",
    "base64,": lambda: f"base64,{BASE64}",
    "in quotes": lambda: f"'{BASE64}'",
    "data:": lambda: f"data:image/png;base64,{BASE64}",
    "DATA:": lambda: f"DATA:image/PNG;BASE64,{BASE64}",
    "with the wrong kind": lambda: f"data:image/jpg;base64,{BASE64}",
    "without a kind": lambda: f"data:;base64,{BASE64}",
    "without anything": lambda: f"data:,{BASE64}",
    "without base64": lambda: f"data:image/png,{BASE64}",
    "with a charset": lambda: f"data:image/png;charset=utf-8;base64,{BASE64}",
    "with a name": lambda: f'data:image/png;name="a b.png";base64,{BASE64}',
    "with another kind": lambda: f"data:application/octet-stream;base64,{BASE64}",
    "with a blank after the comma": lambda: f"data:image/png;base64, {BASE64}",
    "with blanks around": lambda: f"  data:image/png;base64,{BASE64} \n",
    "in lines": lambda: f"data:image/png;base64,\n{LINES}",
    "for addresses": lambda: f"data:image/png;base64,{urlsafe_b64encode(RAW).decode()}",
    "without padding": lambda: f"data:image/png;base64,{BASE64.rstrip('=')}",
    "percent-encoded": lambda: f"data:image/png;base64,{quote(BASE64, safe='')}",
    "all percent-encoded": lambda: f"data:image/png,{quote(RAW)}",
}


@pytest.mark.parametrize("dress", DRESSES)
def test_base64_is_read_however_it_is_written(dress: str, tmp_path: Path) -> None:
    written = DRESSES[dress]()
    source = source_of(written, tmp_path)
    assert isinstance(source, str)
    assert held_bytes(source) == RAW
    assert image_size(written) == open_image(written).size == (24, 16)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_bare_base64_is_known_by_the_beginning_of_its_picture(kind: str) -> None:
    raw = encoded(kind)
    assert (
        source_of(b64encode(raw).decode())
        == data_url(raw)
        == f"data:image/{kind.lower()};base64,{b64encode(raw).decode()}"
    )


def test_a_file_whose_name_reads_as_base64_comes_first(tmp_path: Path) -> None:
    name = BASE64[:80].replace("/", "_")
    (tmp_path / name).write_bytes(RAW)
    assert source_of(name, tmp_path) == tmp_path / name


@pytest.mark.parametrize("path", ["a.png", "iVBORw0KGgo", "/9j/4AAQ", "aGVsbG8=", "images/0001", "data", "x" * 300])
def test_a_path_is_a_path(path: str, tmp_path: Path) -> None:
    assert source_of(path, tmp_path) == tmp_path / path


@pytest.mark.parametrize(
    "address", ["file:///p/a%20b.png", "FILE:///p/a%20b.png", "file://localhost/p/a b.png", "file:/p/a b.png"]
)
def test_file_addresses_are_paths(address: str) -> None:
    assert source_of(address, Path("base")) == Path("/p/a b.png")


@pytest.mark.parametrize(
    "address", ["https://x.org/a.png", " HTTP://x.org/a.png", "s3://b/a.png", "hf://datasets/a.png"]
)
def test_an_address_of_the_web_is_named(address: str) -> None:
    with pytest.raises(ImageError, match="is a web address; download the picture") as caught:
        open_image(address)
    assert caught.value.reason == "web_address"


@pytest.mark.parametrize("address", ["data:image/png;base64,", "data:image/png;base64,a", "data:x,y", "base64://?"])
def test_an_address_without_a_picture_is_named(address: str) -> None:
    with pytest.raises(ImageError, match="a data: URL without a base64 picture") as caught:
        source_of(address)
    assert caught.value.reason == "data_url"


@pytest.mark.parametrize("name", ["data:x.png", "DATA:,a", "file:/x", "a.png"])
def test_a_path_is_written_so_that_it_reads_as_a_path(name: str) -> None:
    assert source_of(written_path(Path(name)), Path("base")) == Path("base") / name


@pytest.mark.parametrize("written", [BASE64 * 99, "x" * 10_000, "x\n" * 500, f"data:image/png;base64,{BASE64}"])
def test_a_picture_is_called_by_less_than_a_line(written: str) -> None:
    assert len(name_of(written)) <= 80
    assert "\n" not in name_of(written)
