"""How an HTML page is written: one file, styles and pictures inside, no scripts, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from looktwice.geometry import Size

MAX_IMAGE_BYTES = 200_000
JPEG_QUALITIES = (90, 75, 50)


def write_html(path: Path, template: str, *, styles: Sequence[str], **values: Any) -> None:
    """Fill in a template of this folder, with its style sheets as `style`, and write the page."""
    loader = PackageLoader("looktwice", "report")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    style = Markup("".join(loader.get_source(environment, name)[0] for name in styles))
    html = environment.get_template(template).render(style=style, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def image_uri(image: Image.Image) -> str:
    """The picture in an address of at most 200,000 bytes: PNG, else the best JPEG that fits, else a smaller one."""
    ways: list[tuple[str, dict[str, Any]]] = [("png", {}), *(("jpeg", {"quality": q}) for q in JPEG_QUALITIES)]
    for kind, options in ways:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        if len(buffer.getvalue()) <= MAX_IMAGE_BYTES:
            return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return image_uri(image.resize(Size(image.width // 2, image.height // 2)))
