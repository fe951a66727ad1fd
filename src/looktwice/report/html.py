"""How an HTML page is written: one file, styles, scripts and pictures inside, no network."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from plotly.offline import get_plotlyjs

from looktwice.geometry import Size
from looktwice.paths import write_result

MAX_IMAGE_BYTES = 100_000
MAX_EXACT_BYTES = 30_000
QUALITIES = (80, 60, 40)
PLOTLY, CHARTS = "plotly.js", "charts.js"


def write_html(path: Path, template: str, *, scripts: Sequence[str] = (), **values: Any) -> None:
    """Fill in a template of this folder and write the page, at its end the named scripts.

    The page names the hashes of its scripts as all that may run in it, so that nothing a model or a file said does,
    though it were not escaped.
    """
    environment = Environment(
        loader=PackageLoader("looktwice", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    texts = [script_text(name) for name in scripts]
    allowed = " ".join(f"'sha256-{_hash(text)}'" for text in texts) or "'none'"
    page = environment.get_template(template).render(scripts=texts, allowed=allowed, **values)
    write_result(path, page)


def script_text(name: str) -> str:
    """A script of this folder, or plotly's own as its package brings it."""
    if name == PLOTLY:
        return get_plotlyjs()
    return (files("looktwice.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def image_uri(image: Image.Image, max_bytes: int = MAX_IMAGE_BYTES) -> str:
    """The picture in an address of so many bytes before base64.

    As PNG, which keeps every pixel, up to 30,000 bytes; from there on as PNG or WebP, whichever is smaller, of a lower
    quality or half the size where it is still too large.
    """
    png = _encoded(image, "png")
    if len(png) <= min(MAX_EXACT_BYTES, max_bytes):
        return _address("png", png)
    for quality in QUALITIES:
        webp = _encoded(image, "webp", quality=quality)
        kind, content = min(("png", png), ("webp", webp), key=lambda one: len(one[1]))
        if len(content) <= max_bytes or image.size == (1, 1):
            return _address(kind, content)
    return image_uri(image.resize(Size(max(1, image.width // 2), max(1, image.height // 2))), max_bytes)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return buffer.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
