"""How an HTML page is written: one file, styles and pictures inside, no scripts, no network."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from looktwice.geometry import Size
from looktwice.paths import write_result

MAX_IMAGE_BYTES = 100_000
MAX_EXACT_BYTES = 30_000
JPEG_QUALITIES = (80, 60, 40)


def write_html(path: Path, template: str, **values: Any) -> None:
    """Fill in a template of this folder and write the page."""
    environment = Environment(
        loader=PackageLoader("looktwice", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    write_result(path, environment.get_template(template).render(**values))


def image_uri(image: Image.Image) -> str:
    """The picture in an address of at most 100,000 bytes.

    As PNG, which keeps every pixel, up to 30,000 bytes; from there on as PNG or JPEG, whichever is smaller, of a lower
    quality or half the size where it is still too large.
    """
    png = _encoded(image, "png")
    if len(png) <= MAX_EXACT_BYTES:
        return _address("png", png)
    for quality in JPEG_QUALITIES:
        jpeg = _encoded(image, "jpeg", quality=quality)
        kind, content = min(("png", png), ("jpeg", jpeg), key=lambda one: len(one[1]))
        if len(content) <= MAX_IMAGE_BYTES:
            return _address(kind, content)
    return image_uri(image.resize(Size(max(1, image.width // 2), max(1, image.height // 2))))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return buffer.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
