"""Consoles: where text is wrapped, where something may move, what no text may do, and what becomes of it unread."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from math import inf
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.text import Text

from looktwice.errors import shown_controls

if TYPE_CHECKING:
    from rich.progress import Progress

UNWRAPPED = 10_000
"""Columns of a console that is no terminal: as many as any table needs."""


class Screen(Console):
    """A console on a terminal: control letters in a text are shown, not sent, whatever they would do there."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, str):
            renderable = shown_controls(renderable)
        elif isinstance(renderable, Text) and (plain := shown_controls(renderable.plain)) != renderable.plain:
            renderable = renderable.copy()
            renderable.plain = plain
        return super().render(renderable, options)


def open_console(*, stderr: bool = False) -> Console:
    """A console that writes what it is given, without markup.

    On a terminal it wraps, and `is_interactive` says that bars may move; TERM, NO_COLOR and COLUMNS hold. In a pipe, a
    file or a notebook nothing moves, FORCE_COLOR or not, and nothing is wrapped but tables where COLUMNS is set. A line
    that must stay whole, such as one with a path, is written with `out`: then only the terminal itself wraps it.
    Files and pipes get texts as they are.
    """
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()  # it is None where the caller closed it
    has_width = is_terminal or os.environ.get("COLUMNS", "").isdigit()
    return (Screen if is_terminal else Console)(
        stderr=stderr,
        width=None if has_width else UNWRAPPED,
        force_interactive=None if is_terminal else False,
        force_jupyter=False,
        markup=False,
        emoji=False,
        highlight=False,
    )


def open_bar(title: str, console: Console, *, redirect_stdout: bool = True) -> Progress:
    """A bar with how many are done, the time spent and the time left; none where nobody watches."""
    # most commands show none
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_interactive,
        redirect_stdout=redirect_stdout,
        speed_estimate_period=inf,  # one step of R-GRPO may take longer than rich looks back
    )


def say(text: str, *, stderr: bool = False) -> None:
    """Print a line at once: as it is into a file or a pipe, on a terminal with its control letters as signs."""
    stream = sys.stderr if stderr else sys.stdout
    is_seen = stream is not None and stream.isatty()
    print(shown_controls(text) if is_seen else text, file=stream, flush=True)


def whole_line(*parts: str | tuple[str, str]) -> Group:
    """A line that only the terminal itself wraps, of texts and texts with their style; print it with `crop=False`."""
    # a group, because `print` makes one text of bare ones, which no longer says that it is not to be wrapped
    return Group(Text.assemble(*parts, no_wrap=True, overflow="ignore"))


class Outlasting(FileIO):
    """A stream that outlasts its reader: from when it cannot be written any more, what is written goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


@contextmanager
def outlasting_readers() -> Iterator[None]:
    """While it lasts nobody has to read stdout and stderr: a closed pipe, a terminal that is gone or a full disk ends
    nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_outlasting, before)
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = before


def _outlasting(stream: Any) -> Any:
    """The stream as one that outlasts its reader, where it writes into a descriptor."""
    if not isinstance(stream, TextIOWrapper):
        return stream
    with suppress(OSError):
        stream.flush()
    try:
        raw = Outlasting(stream.fileno(), "w", closefd=False)
    except OSError:  # one that a notebook or a test put there
        return stream
    return TextIOWrapper(BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True)
