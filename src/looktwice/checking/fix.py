"""A cleaned copy of a data file: what training would refuse is mended where that is safe, else left out.

Two mends are made, and nothing else: the corners of a box that runs backwards are put in order where its numbers can be
read in no other way, and a question that cannot be used leaves its row, whose other questions stay. A byte order mark
and blank lines are not copied, because rows are written anew.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from looktwice.calls import parse_call
from looktwice.checking.check import Judge
from looktwice.config import CheckConfig
from looktwice.data.problems import Problem, calls_of
from looktwice.data.sample import Sample
from looktwice.errors import DataError, counted
from looktwice.formats.reading import Fields, Reading
from looktwice.formats.sample_file import SampleFile
from looktwice.formats.writing import write_rows
from looktwice.geometry import Size
from looktwice.paths import check_target, write_result

Step = str | int
Note = Callable[[list[float], list[float]], None]
"""Told the numbers of a box before and after its corners were put in order."""

_STEP = re.compile(r"([^.\[\]]+)|\[([0-9]+)\]")
_FOUR_NUMBERS = re.compile(r"\[(\s*[0-9.]+\s*(?:,\s*[0-9.]+\s*){3})\]")


@dataclass(kw_only=True)
class Fixed:
    """What was done: places and words of each mend, and each problem that left with its row or question.

    `lost_sign` is the format of the source where the copy, whose rows are fewer, is no longer recognised as that.
    """

    target: Path
    report: Path
    num_rows: int
    num_written: int = 0
    mended: list[dict[str, str]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    lost_sign: str | None = None

    def __str__(self) -> str:
        hint = f"; read it with --from {self.lost_sign}" if self.lost_sign else ""
        return (
            f"{self.target}: {self.num_written} of {counted(self.num_rows, 'row')}; boxes mended: {len(self.mended)}; "
            f"problems left out with their rows or questions: {len(self.left_out)}; see {self.report}{hint}"
        )


def check_outputs(path: Path, target: Path, *, overwrite: bool) -> None:
    """Raise DataError when the cleaned copy of a file, or its report, cannot be written, before the file is judged."""
    check_target(target, path, overwrite=overwrite)
    if report_of(target).exists() and path.exists() and report_of(target).samefile(path):
        raise DataError(f"{report_of(target)}: the file to read from; name another copy")


def report_of(target: Path) -> Path:
    """Where it is written what was done."""
    return Path(f"{target}.report.json")


def fix(judge: Judge, fatal: Mapping[str, list[Problem]], target: Path) -> Fixed:
    """Write a copy of a file in which nothing fatal is left, and beside it `target`.report.json.

    `judge` has judged this file, and `fatal` is what it found. Raises DataError when the file could not be read at all,
    when no row is left, and what `check_outputs` raises.
    """
    if not judge.num_training_files:
        raise DataError(*(problem for problems in fatal.values() for problem in problems))
    file = judge.files[0]
    if of_all := fatal.get(str(file.path)):
        raise DataError(f"no row would be left: {of_all[0]}")
    check_outputs(file.path, target, overwrite=judge.config.overwrite)
    done = Fixed(target=target, report=report_of(target), num_rows=len(file))
    rows = Cleaning(judge, fatal, done).rows()
    first = next(rows, None)
    if first is None:
        raise DataError(f"{file.path}: no row would be left; mend the file first")
    done.num_written = write_rows(target, chain([first], rows))
    if _format_of(target, judge.config) != file.format.name:
        done.lost_sign = file.format.name
    facts = {"source": str(file.path), "format": file.format.name}
    numbers = {"rows": done.num_rows, "rows_written": done.num_written}
    report = {**facts, **numbers, "mended": done.mended, "left_out": done.left_out}
    write_result(done.report, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return done


def _format_of(path: Path, config: CheckConfig) -> str | None:
    try:
        return SampleFile.of(path, config).format.name
    except DataError:
        return None


class Swap(NamedTuple):
    """A box whose corners were put in order, and the path of the field it stands in."""

    path: list[Step]
    old: list[float]
    new: list[float]


class Cleaning:
    """Going through the rows of a judged file."""

    def __init__(self, judge: Judge, fatal: Mapping[str, list[Problem]], done: Fixed) -> None:
        self.examiner, self.file, self.fatal, self.done = judge.examiner, judge.files[0], fatal, done

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that remain, mended."""
        for number in range(len(self.file)):
            problems = self.fatal.get(self.file.rows.where(number))
            if problems is None:
                yield self.file.rows[number].values
            elif (values := self.mended(number, problems)) is not None:
                yield values

    def mended(self, number: int, problems: Sequence[Problem]) -> dict[str, Any] | None:
        """A row without what is wrong with it, or None; either is noted."""
        try:
            where, values = self.file.rows[number]
        except DataError:
            self.leave_out(problems)
            return None
        values = deepcopy(values)
        swaps = self.sort_corners(values, problems, where)
        if swaps:
            problems = self.fatal_problems(values, where)
        bad = {_question(_steps(problem.field)) for problem in problems}
        if bad and None not in bad and len(bad) < len(values["QnA"]):
            values["QnA"] = [one for place, one in enumerate(values["QnA"]) if place not in bad]
            if not self.fatal_problems(values, where):
                self.leave_out(problems)
                problems = []
        if problems:
            self.leave_out(problems)
            return None
        self.done.mended += [
            {"where": where, "field": _name(path), "what": f"corners put in order: {old} to {new}"}
            for path, old, new in swaps
            if _question(path) not in bad
        ]
        return values

    def leave_out(self, problems: Sequence[Problem]) -> None:
        self.done.left_out += [
            {"where": one.where, "field": one.field, "reason": one.reason, "what": one.what} for one in problems
        ]

    def fatal_problems(self, values: dict[str, Any], where: str) -> list[Problem]:
        samples, reading = self.read(values, where)
        of_partial = self.examiner.partial_problems(reading.partial)
        problems = (*reading.problems, *of_partial, *self.examiner.sample_problems(samples))
        return [one for one in problems if one.is_fatal]

    def read(self, values: dict[str, Any], where: str) -> tuple[list[Sample], Reading]:
        reading = self.file.new_reading()
        fields = Fields(values, known=(), where=where, path="", problems=reading.problems)
        return self.file.format.read(fields, reading), reading

    def sort_corners(self, values: dict[str, Any], problems: Sequence[Problem], where: str) -> list[Swap]:
        """Put the corners of reversed boxes in order, in place, and give back what was done.

        Of one question, or of a row without questions, all of them or none.
        """
        by_question: defaultdict[int | None, list[list[Step]]] = defaultdict(list)
        for problem in problems:
            if problem.reason == "box_reversed" and (path := _steps(problem.field)) not in by_question[_question(path)]:
                by_question[_question(path)].append(path)
        trial = deepcopy(values)
        swaps: defaultdict[int | None, list[Swap]] = defaultdict(list)
        for question, paths in by_question.items():
            for path in paths:
                with suppress(LookupError):  # a name with a dot in it
                    holder = _at(trial, path[:-1])
                    holder[path[-1]] = _in_order(
                        holder[path[-1]], self.file.format.commands, _noting(swaps[question], path)
                    )
        samples = {_question(_steps(one.field)): one for one in self.read(trial, where)[0]}
        done: list[Swap] = []
        for question, paths in by_question.items():
            sample = samples.get(question)
            if sample and swaps[question] and all(self.is_certain(swap, sample) for swap in swaps[question]):
                for path in paths:
                    _at(values, path[:-1])[path[-1]] = _at(trial, path)
                done += swaps[question]
        return done

    def is_certain(self, swap: Swap, sample: Sample) -> bool:
        """Whether four numbers fit as corners in order, and neither as corner nor as centre with width and height."""
        is_gold = swap.path[-1] == "box" and "content" not in swap.path
        frame = "original_px" if is_gold else sample.box_frame or self.examiner.view.box_frame
        original = self.size_under(swap, sample, is_gold)
        if original is None:
            return False
        sizes = {
            "unit": Size(1, 1),
            "norm1000": Size(1000, 1000),
            "resized_px": self.examiner.view.overview_size(original),
        }
        size = sizes.get(frame, original)

        def fits(left: float, top: float, right: float, bottom: float) -> bool:
            return 0 <= left < right <= size.width and 0 <= top < bottom <= size.height

        a, b, c, d = swap.old
        is_corner_and_size = fits(a, b, a + c, b + d)
        is_centre_and_size = fits(a - c / 2, b - d / 2, a + c / 2, b + d / 2)
        return fits(*swap.new) and not is_corner_and_size and not is_centre_and_size

    def size_under(self, swap: Swap, sample: Sample, is_gold: bool) -> Size | None:
        """The size of the picture that a mended box refers to; None where it is not there, or not the only one."""
        self.examiner.look_at(sample.image_paths)
        headers = [self.examiner.facts_of(source).header for source in sample.image_paths]
        calls = [parse_call(call.text) for call in calls_of(sample)]
        numbers = {1} if is_gold else {call.image_number for call in calls if list(call.box) == swap.new}
        header = headers[min(numbers) - 1] if len(numbers) == 1 and numbers <= {*range(1, len(headers) + 1)} else None
        return header.size if header else None


def _noting(swaps: list[Swap], path: list[Step]) -> Note:
    return lambda old, new: swaps.append(Swap(path, old, new))


def _in_order(value: Any, commands: re.Pattern[str], note: Note) -> Any:
    """A field with the reversed corners of its boxes put in order: a box, a text, or a list of texts or parts.

    In a text only what stands in a command is a box.
    """
    if isinstance(value, str):
        return commands.sub(lambda command: _FOUR_NUMBERS.sub(lambda box: _text_in_order(box, note), command[0]), value)
    if isinstance(value, dict):
        return {
            name: _in_order(inner, commands, note) if isinstance(inner, str) else inner for name, inner in value.items()
        }
    if not isinstance(value, list):
        return value
    if len(value) != 4 or not all(isinstance(item, (int, float)) for item in value):
        return [_in_order(item, commands, note) for item in value]
    new = [min(value[0], value[2]), min(value[1], value[3]), max(value[0], value[2]), max(value[1], value[3])]
    if new != value:
        note(value, new)
    return new


def _text_in_order(found: re.Match[str], note: Note) -> str:
    written = [number.strip() for number in found[1].split(",")]
    try:
        old = [float(number) for number in written]
    except ValueError:
        return found[0]
    places = [place for one, other in ((0, 2), (1, 3)) for place in sorted((one, other), key=old.__getitem__)]
    order = [places[0], places[2], places[1], places[3]]
    if order == [0, 1, 2, 3]:
        return found[0]
    note(old, [old[place] for place in order])
    return f"[{', '.join(written[place] for place in order)}]"


def _question(path: Sequence[Step]) -> int | None:
    """The number of the documented question that a path lies in."""
    return path[1] if len(path) > 1 and path[0] == "QnA" and isinstance(path[1], int) else None


def _steps(path: str) -> list[Step]:
    """`QnA[0].A3` as ["QnA", 0, "A3"]."""
    return [name or int(index) for name, index in _STEP.findall(path)]


def _name(path: Sequence[Step]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _at(values: Any, path: Sequence[Step]) -> Any:
    for step in path:
        values = values[step]
    return values
