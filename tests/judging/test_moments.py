"""Dates and times of day."""

from __future__ import annotations

import pytest

from looktwice.judging.moments import Moment, read_moment


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("May 12th, 2020", Moment(2020, 5, 12)),
        ("2020-05-12", Moment(2020, 5, 12)),
        ("25/12/2020", Moment(2020, 12, 25)),
        ("12/05/2020", Moment(unclear=(12, 5, 2020))),
        ("Sept. 3", Moment(month=9, day=3)),
        ("3:30 p.m.", Moment(seconds=15 * 3600 + 1800)),
        ("15:30", Moment(seconds=15 * 3600 + 1800)),
        ("3:30", Moment(unclear=(3, 30, 0))),
        ("three o'clock", Moment(unclear=(3, 0, 0))),
        ("2010-12", None),
        ("5/2020", None),
        ("3.1416", None),
        ("24:00", Moment(seconds=0)),
        ("24:30", None),
        ("12 AM", Moment(seconds=0)),
        ("13 pm", None),
        ("2020-13-01", None),
        ("25:00", None),
        ("May", None),
        ("1/2", None),
    ],
)
def test_a_moment_is_what_is_certain_of_it(text: str, moment: Moment | None) -> None:
    assert read_moment(text) == moment
