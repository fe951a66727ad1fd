"""Consoles: nothing wraps or moves where nobody watches, and what holds a path is never broken."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from looktwice.console import open_console, say, whole_line

LONG = " ".join(["outputs/a/long/path"] * 20)


def wide_table() -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("name")
    table.add_column("path")
    table.add_row("one", LONG)
    return table


def test_off_a_terminal_nothing_is_wrapped_styled_or_marked_up(capsys: pytest.CaptureFixture[str]) -> None:
    console = open_console()
    console.print(f"[bold]{LONG} :smile:", style="red")
    console.print(wide_table())
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == f"[bold]{LONG} :smile:"
    assert rows[1] == f"one   {LONG}"


def test_off_a_terminal_columns_limits_tables_and_no_lines(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    console = open_console()
    console.out(LONG)
    console.print(wide_table())
    line, *rows = capsys.readouterr().out.splitlines()
    assert line == LONG
    assert len(rows) > 2 and max(map(len, rows)) <= 60


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_colour_that_is_asked_for_off_a_terminal_moves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    console = open_console(stderr=True)
    assert console.is_terminal and not console.is_interactive


def test_on_a_terminal_text_wraps_and_bars_may_move(open_terminal) -> None:
    written = open_terminal()
    console = open_console(stderr=True)
    assert console.is_interactive and console.width == 80
    console.print(LONG)
    assert max(map(len, written().split("\r\n"))) <= 80


def test_a_dumb_terminal_gets_plain_text_and_no_bars(open_terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    written = open_terminal()
    monkeypatch.setenv("TERM", "dumb")
    console = open_console(stderr=True)
    console.out("text", style="bold red")
    assert not console.is_interactive and written() == "text\r\n"


def test_without_colours_a_terminal_gets_none(open_terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    written = open_terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    open_console(stderr=True).out("text", style="red")
    assert written() == "text\r\n"


def test_a_whole_line_is_never_broken() -> None:
    console = Console(file=io.StringIO(), width=40)
    console.print(whole_line((LONG, "bold"), "  QnA[0].A"), crop=False)
    assert console.file.getvalue() == f"{LONG}  QnA[0].A\n"  # type: ignore[attr-defined]


CONTROLS = "\x1b]0;title\x07\x1b[31mred\r\x9b2J\u202etxt.exe\x7f\ttab"
"""A title, a colour, an erased screen, a turned direction."""


def test_control_letters_of_a_text_never_reach_a_terminal(open_terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    written = open_terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    console = open_console(stderr=True)
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_row(CONTROLS)
    console.out(CONTROLS)
    console.print(CONTROLS, whole_line(CONTROLS), table)
    text = written()
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e", "\x7f"}
    # rich takes some away by itself
    assert text.count("\u241b]0;title") == text.count("\u241b[31mred") == 4


def test_signs_keep_their_style(open_terminal) -> None:
    written = open_terminal()
    open_console(stderr=True).print(whole_line(("a\x1bb", "bold")))
    assert written().startswith("\x1b[1ma\u241bb\x1b[0m")


def test_files_get_texts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    open_console().out("\x1b[31mred\u202e")
    assert capsys.readouterr().out == "\x1b[31mred\u202e\n"


def test_a_line_is_said_raw_into_a_pipe_and_with_signs_on_a_terminal(open_terminal, capsys) -> None:
    say("\x1b[31m\tred")
    assert capsys.readouterr().out == "\x1b[31m\tred\n"
    written = open_terminal()
    say("\x1b[31m\tred", stderr=True)
    assert written() == "\u241b[31m\tred\r\n"
