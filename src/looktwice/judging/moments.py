"""Moments: dates and times of day."""

from __future__ import annotations

import re
from datetime import date
from typing import NamedTuple

from looktwice.judging.wording import bare

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH_NAMES = (
    *("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november"),
    *("december", "sept", *_MONTHS),
)
_MONTH = rf"(?P<month>{'|'.join(_MONTH_NAMES)})\.?"
_DAY = r"(?P<day>[0-3]?[0-9])(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>[0-9]{4})"
_NAMED_DATES = tuple(
    re.compile(form)
    for form in (
        rf"{_DAY}(?: of)?[ -]{_MONTH}(?:,? |-){_YEAR}",
        rf"{_MONTH} {_DAY},? {_YEAR}",
        rf"{_YEAR}[ -]{_MONTH}[ -]{_DAY}",
        rf"{_DAY}(?: of)? {_MONTH}",
        rf"{_MONTH} {_DAY}",
        rf"{_MONTH},? {_YEAR}",
    )
)
_NUMERIC_DATES = tuple(
    re.compile(form)
    for form in (
        rf"{_YEAR}(?P<sign>[-/.])(?P<month>[01]?[0-9])(?P=sign){_DAY}",
        rf"{_YEAR} ?年 ?(?P<month>[01]?[0-9]) ?月(?: ?{_DAY} ?[日号])?",
        rf"(?P<month>[01]?[0-9]) ?月 ?{_DAY} ?[日号]",
    )
)
_SHORT_DATE = re.compile(r"([0-3]?[0-9])([-/.])([0-3]?[0-9])\2([0-9]{4}|[0-9]{2})")
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_WEEKDAY = re.compile(rf"({'|'.join(_WEEKDAYS)}),? (?=\S)")
_NAMED_TIMES = {"noon": 12 * 3600, "midnight": 0}
_TIME = re.compile(r"([0-2]?[0-9]):([0-5][0-9])(?::([0-5][0-9]))? ?([ap])?\.? ?(?(4)m\.?)")
_HOUR = re.compile(r"([01]?[0-9]) ?(?:([ap])\.? ?m\.?|o'clock)")
_HOUR_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_HOUR_IN_WORDS = re.compile(rf"({'|'.join(_HOUR_WORDS)}) o'clock")


class Moment(NamedTuple):
    """What is known of a moment; numbers whose meaning is open (03/04/2020, 3:00) are `unclear` and kept in order."""

    year: int = 0
    month: int = 0
    day: int = 0
    seconds: int | None = None
    unclear: tuple[int, ...] = ()


def read_moment(text: str) -> Moment | None:
    """The date or the time of day that a plain text is, or None.

    3:00 is no 3:00 PM, and 15:00 is; 25/12/2020 is Christmas, and 12/05/2020 is neither May nor December. 2010-12
    may be a range, and 5/2020 a fraction.
    """
    text = bare(text).casefold()
    if text in _NAMED_TIMES:
        return Moment(seconds=_NAMED_TIMES[text])
    if spelled := _HOUR_IN_WORDS.fullmatch(text):
        return Moment(unclear=(_HOUR_WORDS.index(spelled[1]) + 1, 0, 0))
    if weekday := _WEEKDAY.match(text):
        found = read_moment(text[weekday.end() :])
        return found if found and _is_weekday(found, _WEEKDAYS.index(weekday[1])) else None
    for form in (*_NAMED_DATES, *_NUMERIC_DATES):
        if named := form.fullmatch(text):
            found_parts = named.groupdict()
            month = found_parts.get("month") or ""
            number = int(month) if month.isdigit() else _MONTHS.index(month[:3]) + 1
            return _dated(int(found_parts.get("year") or 0), number, int(found_parts.get("day") or 0))
    if short := _SHORT_DATE.fullmatch(text):
        return _short_date(int(short[1]), int(short[3]), int(short[4]))
    return _time_of_day(text)


def _is_weekday(moment: Moment, weekday: int) -> bool:
    """Whether a whole date is that day of the week, counted from Monday."""
    try:
        return date(moment.year, moment.month, moment.day).weekday() == weekday
    except ValueError:
        return False


def _short_date(first: int, second: int, year: int) -> Moment | None:
    if year < 100 or (first <= 12 and second <= 12 and first != second):
        return Moment(unclear=(first, second, year))
    return (
        _dated(year, min(first, second), max(first, second))
        if first > 12 or second > 12
        else _dated(year, first, second)
    )


def _dated(year: int, month: int, day: int) -> Moment | None:
    return Moment(year, month, day) if 1 <= month <= 12 and day <= 31 else None


def _time_of_day(text: str) -> Moment | None:
    if written := _TIME.fullmatch(text):
        hour, minute, second, half = int(written[1]), int(written[2]), int(written[3] or 0), written[4]
    elif written := _HOUR.fullmatch(text):
        hour, minute, second, half = int(written[1]), 0, 0, written[2]
    else:
        return None
    if hour > (12 if half else 24) or (half and not hour) or (hour == 24 and minute + second):
        return None
    if half is None and 1 <= hour <= 12:
        return Moment(unclear=(hour, minute, second))
    if half:
        hour = hour % 12 + 12 * (half == "p")
    return Moment(seconds=3600 * (hour % 24) + 60 * minute + second)
