"""The HTML pages of `data show` and `data stats`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from looktwice.checking.statistics import Statistics
from looktwice.geometry import Size
from looktwice.report.charts import Chart, count_bars, histogram, size_dots
from looktwice.report.html import image_uri, write_html
from looktwice.report.sample_view import ImageView, SampleView
from looktwice.report.tables import Table, token_table

STYLES = ("page.css", "data_page.css")
LARGEST_IMAGE, LARGEST_CROP = Size(480, 440), Size(288, 256)
SMALLEST_IMAGE, SMALLEST_CROP = 240, 96
"""Widths on the page in pixels; smaller pictures are enlarged to these, pixel by pixel."""


def write_samples_page(path: Path, *, title: str, lead: str, views: Sequence[SampleView]) -> None:
    """Samples as the model sees them."""
    functions = {"token_table": token_table, "source": image_uri, "shown_width": shown_width}
    write_html(path, "samples.html.jinja", styles=STYLES, title=title, lead=lead, views=views, **functions)


def write_statistics_page(
    path: Path, *, title: str, lead: str, tables: Sequence[Table], charts: Sequence[Chart]
) -> None:
    """Tables of a data set and its charts."""
    write_html(path, "statistics.html.jinja", styles=STYLES, title=title, lead=lead, tables=tables, charts=charts)


def statistics_charts(statistics: Statistics) -> list[Chart]:
    """Lengths, crops of an answer, sizes of pictures; each where there is something to draw."""
    charts = [histogram(statistics.lengths, title="Sequence length", x_name="tokens", y_name="samples")]
    if crops := statistics.crops_per_answer:
        charts.append(count_bars(crops, title="Crops of an answer", x_name="crops", y_name="answers"))
    if sizes := statistics.image_sizes:
        charts.append(size_dots(sizes, title="Picture sizes"))
    return charts


def shown_width(image: ImageView) -> int:
    """Width on the page: as the model sees it, unless there is no room for it or little to be seen."""
    room, smallest = (LARGEST_CROP, SMALLEST_CROP) if image.is_crop else (LARGEST_IMAGE, SMALLEST_IMAGE)
    width, height = image.seen
    wanted = max(width, smallest)
    return max(1, round(wanted * min(1.0, room.width / wanted, room.height * width / (height * wanted))))
