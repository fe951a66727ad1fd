"""Errors and how messages word things: no value is ever told whole."""

from __future__ import annotations

import pickle

import pytest

from looktwice.errors import (
    LINE,
    MOST_LINES,
    BoxError,
    ConfigError,
    ImageError,
    LooktwiceError,
    nearest,
    one_line,
    short,
    short_path,
)

LONG = {"letters": "x" * 8_000_000, "words": "a b " * 2_000_000, "lines": "a\n" * 4_000_000}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("kind", [LooktwiceError, ConfigError, ImageError])
def test_whatever_stands_in_an_error_it_is_one_line(kind: type[LooktwiceError], name: str) -> None:
    line = str(kind(f"head: {LONG[name]}: the mend"))
    assert line.startswith("head: ")
    assert line.endswith("the mend")
    assert (line.count("\n"), len(line) <= LINE) == (0, True)


def test_an_error_of_several_lines_is_given_them_apart() -> None:
    assert str(ConfigError("head\nof it", "  one", "  two")) == "head of it\n  one\n  two"
    lines = str(ConfigError(*range(2 * MOST_LINES))).splitlines()
    assert lines[MOST_LINES:] == [f"... and {MOST_LINES} more lines"]


def test_what_has_too_many_letters_for_a_name_is_cut_within_a_line() -> None:
    line = one_line(f"{LONG['letters']} is not there; give another")
    assert line == f"{'x' * 57}...{'x' * 20} is not there; give another"
    assert one_line("x" * 255) == "x" * 255


def test_an_error_crosses_processes_as_it_was() -> None:
    for error in (ImageError("a\nb", "huge"), BoxError("reversed", "x" * 9999), ConfigError("a", "b")):
        there = pickle.loads(pickle.dumps(error))
        assert (str(there), vars(there)) == (str(error), vars(error))


def test_short_is_one_line_and_keeps_both_ends() -> None:
    assert short("a \n\t b") == "a b"
    assert len(short(LONG["words"])) == 80
    assert short(f"begin {LONG['letters']} end").startswith("begin x")
    assert short(f"begin {LONG['letters']} end").endswith("x end")


def test_a_path_is_written_whole_unless_no_file_has_such_a_name() -> None:
    assert short_path("a  b.png") == "a  b.png"
    assert short_path("a\n b.png") == "a b.png"
    assert len(short_path(LONG["letters"])) == 80


def test_no_hint_is_looked_for_what_is_no_name() -> None:
    assert nearest(LONG["letters"], ["x"]) == ""


def test_control_letters_in_a_message_are_signs() -> None:
    told = str(ConfigError("no\x1b[31m such\x07 file\nagain"))
    assert told == "no\u241b[31m such\u2407 file again"
    assert short("a\x1b\x9bb\u202e") == "a\u241b\ufffdb\ufffd"
