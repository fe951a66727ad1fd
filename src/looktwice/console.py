"""Consoles: where text is wrapped and coloured, where something may move, and what no text may do to a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.text import Text

from looktwice.errors import shown_controls

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


def say(text: str, *, stderr: bool = False) -> None:
    """Print a line at once: as it is into a file or a pipe, on a terminal with its control letters as signs."""
    stream = sys.stderr if stderr else sys.stdout
    is_seen = stream is not None and stream.isatty()
    print(shown_controls(text) if is_seen else text, file=stream, flush=True)


def whole_line(*parts: str | tuple[str, str]) -> Group:
    """A line that only the terminal itself wraps, of texts and texts with their style; print it with `crop=False`."""
    # a group, because `print` makes one text of bare ones, which no longer says that it is not to be wrapped
    return Group(Text.assemble(*parts, no_wrap=True, overflow="ignore"))
