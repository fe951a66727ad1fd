"""The HTML pages of `data show` and `data stats`: one file each, pictures inside, no scripts, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from looktwice.data.statistics import Statistics
from looktwice.geometry import Size
from looktwice.report.charts import Chart, count_bars, histogram, size_dots
from looktwice.report.page import Table
from looktwice.report.sample_view import PictureView, SampleView
from looktwice.report.tables import token_table

MAX_PICTURE_BYTES = 200_000
JPEG_QUALITIES = (90, 75, 50)
LARGEST_PICTURE, LARGEST_CROP = Size(480, 440), Size(288, 256)
SMALLEST_PICTURE, SMALLEST_CROP = 240, 96
"""Widths on the page in pixels; smaller pictures are enlarged to these, pixel by pixel."""


def write_samples_page(path: Path, *, title: str, lead: str, views: Sequence[SampleView]) -> None:
    """Samples as the model sees them."""
    functions = {"token_table": token_table, "source": picture_uri, "shown_width": shown_width}
    _write(path, "samples.html.jinja", title=title, lead=lead, views=views, **functions)


def write_statistics_page(
    path: Path, *, title: str, lead: str, tables: Sequence[Table], charts: Sequence[Chart]
) -> None:
    """Tables of a data set and its charts."""
    _write(path, "statistics.html.jinja", title=title, lead=lead, tables=tables, charts=charts)


def statistics_charts(statistics: Statistics) -> list[Chart]:
    """Lengths, crops of an answer, sizes of pictures; each where there is something to draw."""
    charts = [histogram(statistics.lengths, title="Sequence length", x_name="tokens", y_name="samples")]
    if crops := statistics.crops_per_answer:
        charts.append(count_bars(crops, title="Crops of an answer", x_name="crops", y_name="answers"))
    if pictures := statistics.pictures:
        charts.append(size_dots(pictures, title="Picture sizes"))
    return charts


def shown_width(picture: PictureView) -> int:
    """Width on the page: as the model sees it, unless there is no room for it or little to be seen."""
    room, smallest = (LARGEST_CROP, SMALLEST_CROP) if picture.is_crop else (LARGEST_PICTURE, SMALLEST_PICTURE)
    width, height = picture.seen
    wanted = max(width, smallest)
    return max(1, round(wanted * min(1.0, room.width / wanted, room.height * width / (height * wanted))))


def picture_uri(image: Image.Image) -> str:
    """The picture in an address of at most 200,000 bytes: PNG, else the best JPEG that fits, else a smaller one."""
    ways: list[tuple[str, dict[str, Any]]] = [("png", {}), *(("jpeg", {"quality": q}) for q in JPEG_QUALITIES)]
    for kind, options in ways:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        if len(buffer.getvalue()) <= MAX_PICTURE_BYTES:
            return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return picture_uri(image.resize(Size(image.width // 2, image.height // 2)))


def _write(path: Path, template: str, **values: Any) -> None:
    loader = PackageLoader("looktwice", "report")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    style = Markup("".join(loader.get_source(environment, name)[0] for name in ("page.css", "data_page.css")))
    html = environment.get_template(template).render(style=style, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
