"""The HTML pages of `data show` and `data stats`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from looktwice.calls import TOOL_CALL_CLOSE, parse_call
from looktwice.checking.statistics import Statistics
from looktwice.errors import counted, short
from looktwice.geometry import Box, Size
from looktwice.processing.chat_template import TURN_CLOSE, TURN_OPEN
from looktwice.processing.images import name_of, open_image
from looktwice.report.charts import Chart, count_bars, histogram, size_dots
from looktwice.report.figures import Figure, Mark, crop_figure, merged, whole_figures
from looktwice.report.html import CHARTS, PLOTLY, write_html
from looktwice.report.passages import Passage, passages_of
from looktwice.report.sample_view import ImageView, Piece, SampleView, TurnView
from looktwice.report.tables import Table, token_table

_TEMPLATE = re.compile(rf"\A{re.escape(TURN_OPEN)}\w+\n|{re.escape(TURN_CLOSE)}\n?\Z")
"""What the chat template writes around a turn."""

Part = Passage | ImageView | Figure
"""Of a turn as people read it: words, the place of a picture, or a crop."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A sample with each of its turns as people read it."""

    view: SampleView
    turns: tuple[tuple[TurnView, tuple[Part, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The samples of one row of a file, and their pictures, each once: with its boxes, and as the model sees it."""

    anchor: str
    where: str
    summary: str
    images: tuple[tuple[Figure, Figure], ...]
    questions: tuple[Question, ...]


def write_samples_page(path: Path, *, title: str, lead: str, views: Sequence[SampleView]) -> None:
    """Samples as the model sees them, under the rows of the file that hold them."""
    rows = [row_of(list(of), number) for number, (_, of) in enumerate(groupby(views, key=lambda view: view.where), 1)]
    write_html(path, "samples.html.jinja", title=title, lead=lead, rows=rows, token_table=token_table)


def write_statistics_page(
    path: Path, *, title: str, lead: str, tables: Sequence[Table], charts: Sequence[Chart]
) -> None:
    """Tables of a data set and its charts."""
    scripts = (PLOTLY, CHARTS)
    write_html(path, "statistics.html.jinja", scripts=scripts, title=title, lead=lead, tables=tables, charts=charts)


def statistics_charts(statistics: Statistics) -> list[Chart]:
    """Lengths, crops of an answer, sizes of pictures; each where there is something to draw."""
    charts = [histogram(statistics.lengths, title="Sequence length", x_name="tokens", y_name="samples")]
    if crops := statistics.crops_per_answer:
        charts.append(count_bars(crops, title="Crops of an answer", x_name="crops", y_name="answers"))
    if sizes := statistics.image_sizes:
        charts.append(size_dots(sizes, title="Picture sizes"))
    return charts


def row_of(views: Sequence[SampleView], number: int) -> Row:
    """What the page shows of the samples of one row, the row being the page's `number`-th.

    Where it has several samples, crops have two numbers, as in `2.1`: that of the sample and their own.
    """
    images: defaultdict[tuple[str, Size], dict[str, ImageView]] = defaultdict(dict)
    marks: defaultdict[tuple[str, Size], list[Mark]] = defaultdict(list)
    prefixes = [f"{place}." if len(views) > 1 else "" for place in range(1, len(views) + 1)]
    for view, prefix in zip(views, prefixes):
        keys = [(str(image.source), image.seen) for image in view.whole_images]
        for key, image in zip(keys, view.whole_images):
            images[key][image.name] = image
        for image_number, mark in _marks_of(view, prefix):
            marks[keys[image_number - 1]].append(mark)
    return Row(
        anchor=f"row-{number}",
        where=views[0].where,
        summary=_summary(views),
        images=tuple(_pair(named, merged(marks[key])) for key, named in images.items()),
        questions=tuple(
            Question(view=view, turns=tuple((turn, tuple(_read(turn, prefix))) for turn in view.turns))
            for view, prefix in zip(views, prefixes)
        ),
    )


def _marks_of(view: SampleView, prefix: str) -> Iterator[tuple[int, Mark]]:
    """The boxes of a sample, each with the number of its picture, counted from 1."""
    for box in view.gold_boxes if view.whole_images else ():
        yield 1, Mark(box=box, label=prefix.rstrip("."), is_gold=True)
    for crop in view.crops:
        assert crop.rectangle
        yield crop.cut_from, Mark(box=Box(*crop.rectangle), label=f"{prefix}{crop.number}")


def _summary(views: Sequence[SampleView]) -> str:
    """A line of the contents."""
    if views[0].problem:
        return "cannot be trained"
    asked = [turn for turn in views[0].turns if turn.role == "user"][-1:]
    words = " ".join(part.text for turn in asked for part in _read(turn, "") if isinstance(part, Passage))
    more = f" and {counted(len(views) - 1, 'more question')}" if len(views) > 1 else ""
    return f"{short(words)}{more}"


def _pair(named: Mapping[str, ImageView], marks: Sequence[Mark]) -> tuple[Figure, Figure]:
    """A picture under the names that it has, of which there are several where a conversation shows it again."""
    image = next(iter(named.values()))
    assert image.source is not None
    return whole_figures(
        open_image(image.source),
        image.image,
        caption=f"{', '.join(named)}: {name_of(image.source)}, {image.original.width} x {image.original.height}",
        seen_caption=f"as the model sees it: {image.seen.width} x {image.seen.height}, {image.num_atoms} tokens",
        marks=marks,
    )


def _read(turn: TurnView, prefix: str) -> Iterator[Part]:
    """The words of a turn without what the template writes around them, each picture in its place."""
    for is_whole, run in groupby(turn.parts, key=lambda part: isinstance(part, ImageView) and not part.is_crop):
        parts = list(run)
        if is_whole:
            yield from parts  # type: ignore[misc]
            continue
        text = _TEMPLATE.sub("", "".join(part.text for part in parts if isinstance(part, Piece)))
        if turn.role != "assistant":
            if text.strip():
                yield Passage("text", text.strip())
            continue
        # a rollout's call may have been refused, and its last one never run
        crops = (after for part, after in pairwise([*parts, None]) if is_call_end(part))
        for passage in passages_of(text):
            crop = next(crops, None) if passage.kind == "call" else None
            yield _crop(crop, passage.text, prefix) if isinstance(crop, ImageView) else passage


def is_call_end(part: Piece | ImageView | None) -> bool:
    return isinstance(part, Piece) and part.text == TOOL_CALL_CLOSE


def _crop(crop: ImageView, written: str, prefix: str) -> Figure:
    """The crop with its box as it was written, and as it was cut where that is another."""
    assert crop.rectangle
    is_as_written = parse_call(written).box == crop.rectangle
    cut = "" if is_as_written else f", cut {','.join(map(str, crop.rectangle))}"
    caption = f"crop {prefix}{crop.number}: {written}{cut}, {crop.original.width} x {crop.original.height}"
    seen = f"seen as {crop.seen.width} x {crop.seen.height}, {crop.num_atoms} tokens"
    return crop_figure(crop.image, caption=f"{caption}, {seen}")
