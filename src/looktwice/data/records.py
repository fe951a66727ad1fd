"""Data files as samples: whole files with all their problems at once, or sample by sample without reading all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from looktwice.calls import format_call, parse_call, split_calls
from looktwice.data.fields import GOLD_FIELDS, Fields, Reading
from looktwice.data.files import RowFile
from looktwice.data.formats import FORMATS, ROWS_LOOKED_AT, Format, detect
from looktwice.data.problems import ROW_REASONS, Problem
from looktwice.data.sample import Sample, text_of
from looktwice.errors import BoxError, DataError, ImageError, nearest
from looktwice.geometry import Box, BoxFrame, Size, crop_rectangle, iou, to_original
from looktwice.processing.images import open_image

MAX_PROBLEMS_SHOWN = 20

_logger = logging.getLogger(__name__)


class SampleFile:
    """The samples of a data file, read as they are asked for.

    `len` counts rows, which costs nothing. Samples are counted by parsing the file once, when they are first asked
    for, and only in a format whose rows may hold several. May be sent to another process, as RowFile may.
    Raises DataError when the file cannot be read or no format fits it.
    """

    def __init__(
        self,
        path: str | Path,
        image_base_path: str | Path,
        *,
        data_format: str = "auto",
        answer_key: str | None = None,
        box_frame: BoxFrame | None = None,
    ) -> None:
        """`answer_key` is the field of a documented question that holds its answer; default: A3, else A.

        `box_frame` is the frame of boxes in calls where the file does not say.
        """
        self.rows = RowFile(path)
        self.reading = Reading(image_base_path=Path(image_base_path), answer_key=answer_key, box_frame=box_frame)
        self.format = self._detected() if data_format == "auto" else _named(data_format)

    @property
    def path(self) -> Path:
        return self.rows.path

    def __len__(self) -> int:
        return len(self.rows)

    def samples_of(self, row: int) -> list[Sample]:
        """The samples of a row. Raises DataError with all that is wrong with it."""
        reading = self.new_reading()
        samples = self.read_row(row, reading)
        raise_if_any(reading.problems, self.rows.where(row))
        return samples

    def read_row(self, row: int, reading: Reading) -> list[Sample]:
        """The samples of a row; problems and names are noted in `reading`."""
        try:
            where, values = self.rows[row]
        except DataError as error:
            where = self.rows.where(row)
            reason = ROW_REASONS.get(type(error.__cause__), "broken_row")
            what = str(error).removeprefix(f"{where}: ")
            reading.problems.append(Problem(reason=reason, where=where, field="", what=what))
            return []
        fields = Fields(values, known=(), where=where, path="", problems=reading.problems)
        return self.format.read(fields, reading)

    def new_reading(self) -> Reading:
        """What the caller said about the file, with nothing noted yet."""
        said = self.reading
        return Reading(image_base_path=said.image_base_path, answer_key=said.answer_key, box_frame=said.box_frame)

    def read(self, *, limit: int | None = None) -> list[Sample]:
        """All samples in order, or the first ones, with the last of their row.

        Raises one DataError that counts all problems of these rows and lists the first 20.
        """
        if not len(self):
            raise DataError(f"{self.path}: the file holds no records; write one JSON object a line")
        reading = self.new_reading()
        samples: list[Sample] = []
        for row in range(len(self)):
            if limit is not None and len(samples) >= limit:
                break
            samples += self.read_row(row, reading)
        raise_if_any(reading.problems, str(self.path))
        for warning in unused_names(reading):
            _logger.warning("%s: %s", self.path, warning)
        return samples

    @property
    def num_samples(self) -> int:
        return len(self) if self._ends is None else int(self._ends[-1]) if len(self._ends) else 0

    def sample(self, number: int) -> Sample:
        """The sample of a number counted from 0 through all rows. Raises DataError when its row is broken."""
        if not 0 <= number < self.num_samples:
            raise IndexError(f"sample {number} of {self.num_samples}")
        if self._ends is None:
            return self.samples_of(number)[0]
        row = int(np.searchsorted(self._ends, number, side="right"))
        return self.samples_of(row)[number - (int(self._ends[row - 1]) if row else 0)]

    @cached_property
    def _ends(self) -> np.ndarray | None:
        """Samples up to the end of each row [rows]; None where each row has one."""
        count = self.format.num_samples
        return None if count is None else np.cumsum(self.rows.sample_counts(count))

    def _detected(self) -> Format:
        return detect(islice(self._good_rows(), ROWS_LOOKED_AT), self.path)

    def _good_rows(self) -> Iterator[dict[str, object]]:
        for row in range(len(self)):
            try:
                yield self.rows[row].values
            except DataError:
                continue


def read_samples(
    path: str | Path,
    image_base_path: str | Path,
    *,
    data_format: str = "auto",
    answer_key: str | None = None,
    box_frame: BoxFrame | None = None,
) -> list[Sample]:
    """All samples of a data file, in order; pictures are taken from `image_base_path` unless their path is absolute.

    Pictures are not opened; see `check_pictures`. The rest is as in SampleFile.
    Raises one DataError that counts all problems and lists the first 20.
    """
    return SampleFile(path, image_base_path, data_format=data_format, answer_key=answer_key, box_frame=box_frame).read()


def unused_names(reading: Reading) -> Iterator[str]:
    """What was found in rows and means nothing: names below the row, and names close to an optional field."""
    yield from (f"ignored: {line}" for line in reading.ignored.lines())
    absent = [name for name in GOLD_FIELDS if name not in reading.names]
    for name, count in reading.names.items():
        if name not in GOLD_FIELDS and (hint := nearest(name, absent)):
            yield f'field "{name}" of {count} samples is ignored.{hint}'


def _named(name: str) -> Format:
    if name not in FORMATS:
        raise DataError(f'"{name}" is no format; known are {", ".join(FORMATS)}.{nearest(name, FORMATS)}')
    return FORMATS[name]


def check_responses(samples: Sequence[Sample]) -> None:
    """Make sure that every sample has an answer to train on. Raises DataError as `check_pictures` does."""
    problems = [
        f"{sample.where}: {sample.field}: no assistant turn to train on; add the answer, or use the row for R-GRPO"
        for sample in samples
        if not any(message.role == "assistant" and message.is_trained for message in sample.conversation.messages)
    ]
    raise_if_any(problems, "answers")


def check_solutions(samples: Sequence[Sample]) -> None:
    """Make sure that every sample has a gold answer to judge by. Raises DataError as `check_pictures` does."""
    problems = [
        f'{sample.where}: {sample.field}: no <answer>…</answer> to judge by; add it, or the field "answer"'
        for sample in samples
        if not sample.solution
    ]
    raise_if_any(problems, "answers")


def check_pictures(
    samples: Sequence[Sample],
    *,
    min_side: int,
    box_frame: BoxFrame = "original_px",
    overview_size: Callable[[Size], Size] | None = None,
) -> None:
    """Make sure, before anything long starts, that every picture can be opened and every box can be cut from it.

    Decodes each picture once, so that a file cut short is found too. Boxes of calls are in the frame of their sample,
    else in `box_frame`, and belong to the first picture, as gold boxes do, which are in original pixels; a box that
    lies partly outside is good. `min_side` is the smallest crop in pixels;
    `overview_size` (the size at which the model sees a picture) is needed for "resized_px".
    Raises one DataError that counts all problems and lists the first 20.
    """
    if overview_size is None and "resized_px" in (box_frame, *(sample.box_frame for sample in samples)):
        raise ValueError("box_frame resized_px needs overview_size")
    shown_in: dict[str | Path, list[Sample]] = {}
    for sample in samples:
        for picture in dict.fromkeys(sample.image_paths):
            shown_in.setdefault(picture, []).append(sample)
    problems: list[str] = []
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        sizes = list(pool.map(_decoded_size, shown_in))
    for (picture, asked), original in zip(shown_in.items(), sizes):
        if isinstance(original, ImageError):
            others = f" ({len(asked) - 1} more use it)" if len(asked) > 1 else ""
            hint = "" if not isinstance(picture, Path) or os.path.exists(picture) else " and --image_base_path"
            problems.append(f"{asked[0].where}: picture: {original}{hint}{others}")
            continue
        resized = overview_size(original) if overview_size else original
        for sample in asked:
            if sample.image_paths[0] == picture:
                problems += _box_problems(sample, original, resized, sample.box_frame or box_frame, min_side)
    raise_if_any(problems, f"{len(shown_in)} picture{'s' if len(shown_in) != 1 else ''}")


def _decoded_size(picture: str | Path) -> Size | ImageError:
    """The upright size of a picture that decodes to its end, else what is wrong with it."""
    try:
        return Size(*open_image(picture).size)
    except ImageError as error:
        return error


def _box_problems(sample: Sample, original: Size, resized: Size, box_frame: BoxFrame, min_side: int) -> Iterator[str]:
    answers = [text_of(message) for message in sample.conversation.messages if message.role == "assistant"]
    calls = [segment for answer in answers for segment in split_calls(answer)[:-1]]
    for number, segment in enumerate(calls, 1):
        requested = parse_call(segment)
        box = to_original(requested, frame=box_frame, original=original, resized=resized)
        try:
            crop_rectangle(box, original=original, min_side=min_side)
        except BoxError as error:
            yield (
                f"{sample.where}: {sample.field}: call {number} {format_call(requested)} read as {box_frame}: {error} "
                f"({_name(sample.image_paths[0])}); mend the box, or set box_frame to the frame the boxes are in"
            )
    if sample.gold_box and iou(sample.gold_box, Box(0, 0, *original)) == 0:
        yield (
            f"{sample.where}: {_place_of_gold(sample)}box: {list(sample.gold_box)} lies outside the picture "
            f"of {original.width}x{original.height} ({_name(sample.image_paths[0])}); write it in original pixels"
        )


def _place_of_gold(sample: Sample) -> str:
    """Where the gold fields stand in the row: beside the answer of a documented question, else in the row itself."""
    question, dot, _ = sample.field.rpartition(".")
    return question + dot if question.startswith("QnA") else ""


def _name(picture: str | Path) -> str:
    return str(picture) if isinstance(picture, Path) else "the picture in the row"


def raise_if_any(problems: Sequence[str | Problem], subject: str) -> None:
    """Raise one DataError that counts the problems and lists the first 20."""
    if not problems:
        return
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {subject}"
    shown = f", the first {MAX_PROBLEMS_SHOWN}" if len(problems) > MAX_PROBLEMS_SHOWN else ""
    raise DataError("\n  ".join([f"{count}{shown}:", *map(str, problems[:MAX_PROBLEMS_SHOWN])]))
