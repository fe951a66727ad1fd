"""Samples and tables in the terminal, as rich draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table as Columns
from rich.text import Text

from looktwice.checking.check import Verdict
from looktwice.console import whole_line
from looktwice.data.problems import PLACES_SHOWN, in_rows
from looktwice.data.reasons import REASONS
from looktwice.report.sample_view import ImageView, SampleView
from looktwice.report.tables import Table, token_table

TRAINED_STYLES = ("#0b2a66 on #c7dbff", "#0b2a66 on #98bdfb")
UNTRAINED_STYLES = ("grey50", "grey62")
"""Each a pair of shades, in turn from token to token."""
IMAGE_STYLE, CROP_STYLE = "bold magenta", "bold red"


def sample_lines(view: SampleView) -> Iterator[RenderableType]:
    """A sample from its place in the file to its table of tokens."""
    yield whole_line((view.where, "bold"), f"  {view.place}")
    if view.problem:
        yield whole_line((view.problem, "red"))
        return
    if view.note:
        yield Text(view.note, style="yellow")
    yield sequence_text(view)
    yield from _noted(token_table(view))
    if view.solution:
        yield Text(f"Gold answer: {view.solution}", style="dim")


def sequence_text(view: SampleView) -> Text:
    """The whole sequence: each token in its shade, each picture in one line of words."""
    text = Text()
    parts = [part for turn in view.turns for part in turn.parts]
    for number, part in enumerate(parts):
        if isinstance(part, ImageView):
            text.append(f"[{part.caption}]", CROP_STYLE if part.is_crop else IMAGE_STYLE)
        else:
            styles = TRAINED_STYLES if part.is_trained else UNTRAINED_STYLES
            text.append(part.shown, styles[number % 2])
    return text


def verdict_lines(verdict: Verdict) -> Iterator[RenderableType]:
    """Reasons with their counts, and below each what it is, its mend and the first places."""
    width = max(map(len, verdict.reasons), default=0)
    if verdict.reasons:
        yield whole_line((f"{'reason':{width}}  training  count", "bold"))
    for name in verdict.reasons:
        reason, count = REASONS[name], verdict.counts[name]
        style, training = ("red", "stops") if reason.is_fatal else ("yellow", "note")
        yield whole_line((f"{name:{width}}  {training:8}", style), f"  {count:5,}")
        yield whole_line((f"    {reason.meaning}; {reason.mend}", "bold"))
        for problem in verdict.first[name][:PLACES_SHOWN]:
            yield whole_line(f"    {problem.place}{in_rows(verdict.rows_with.get(problem.cause, 1))}")
        if len(verdict.first[name]) > PLACES_SHOWN:
            yield whole_line("    ...")


def columns_of(table: Table) -> Columns:
    """A table as rich draws it: the first column to the left, numbers to the right."""
    columns = Columns(box=None, header_style="bold", pad_edge=False, show_header=any(table.header))
    for number, title in enumerate(table.header):
        columns.add_column(title, justify="right" if number else "left", no_wrap=number > 0)
    for row in table.rows:
        columns.add_row(*(Text(cell) for cell in row))
    return columns


def titled(tables: Sequence[Table]) -> Iterator[RenderableType]:
    for table in tables:
        yield Text(f"\n{table.title}", style="bold")
        yield from _noted(table)


def _noted(table: Table) -> Iterator[RenderableType]:
    if len(table.header) == 1:  # texts, with paths
        yield from (whole_line(text) for [text] in table.rows)
    else:
        yield columns_of(table)
    if table.note:
        yield Text(table.note, style="dim")
