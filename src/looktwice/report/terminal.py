"""Samples and tables in the terminal, as rich draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table as Columns
from rich.text import Text

from looktwice.checking.check import Verdict
from looktwice.data.problems import PLACES_SHOWN
from looktwice.data.reasons import REASONS
from looktwice.report.sample_view import ImageView, SampleView
from looktwice.report.tables import Table, token_table

TRAINED_STYLES = ("#0b2a66 on #c7dbff", "#0b2a66 on #98bdfb")
UNTRAINED_STYLES = ("grey50", "grey62")
"""Each a pair of shades, in turn from token to token."""
IMAGE_STYLE, CROP_STYLE = "bold magenta", "bold red"


def sample_lines(view: SampleView) -> Iterator[RenderableType]:
    """A sample from its place in the file to its table of tokens."""
    yield Text.assemble((view.where, "bold"), f"  {view.place}")
    if view.problem:
        yield Text(view.problem, style="red")
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


def verdict_table(verdict: Verdict) -> Columns:
    """Reasons with their counts, mends and first places."""
    columns = Columns(box=None, header_style="bold", pad_edge=False)
    columns.add_column("reason", no_wrap=True)
    columns.add_column("training", no_wrap=True)
    columns.add_column("count", justify="right", no_wrap=True)
    columns.add_column("what it is, its mend, and the first places", overflow="fold")
    for name in verdict.reasons:
        reason, count = REASONS[name], verdict.counts[name]
        style, training = ("red", "stops") if reason.is_fatal else ("yellow", "note")
        text = Text(f"{reason.meaning}; {reason.mend}", style="bold")
        text.append("".join(f"\n{problem.place}" for problem in verdict.first[name][:PLACES_SHOWN]), style="not bold")
        text.append("\n..." * (count > PLACES_SHOWN), style="not bold")
        columns.add_row(Text(name, style=style), Text(training, style=style), f"{count:,}", text)
    return columns


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
    yield columns_of(table)
    if table.note:
        yield Text(table.note, style="dim")
