"""Data files as samples: whole files with all their problems at once, or sample by sample without reading all."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from looktwice.config import SampleConfig
from looktwice.data.problems import Problem, raise_if_any
from looktwice.data.sample import Sample
from looktwice.errors import DataError, counted, nearest
from looktwice.formats.catalogue import FORMATS, ROWS_LOOKED_AT, Format, detect
from looktwice.formats.files import RowError, RowFile
from looktwice.formats.reading import Fields, Reading
from looktwice.geometry import BoxFrame
from looktwice.paths import check_image_folder

_logger = logging.getLogger(__name__)

SAMPLES_KEPT = 16_384
"""Samples of rows with several that are remembered, so that a row is read once for all its questions."""


class SampleFile:
    """The samples of a data file, read as they are asked for.

    `len` counts rows, which costs nothing. Samples are counted by parsing the file once, when they are first asked
    for, and only in a format whose rows may hold several. Raises DataError when the file cannot be read, holds no row,
    or fits no format.
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
        if not len(self.rows):
            raise DataError(f"{path}: the file holds no records; write one JSON object a line")
        self.reading = Reading(image_base_path=Path(image_base_path), answer_key=answer_key, box_frame=box_frame)
        self.format = self._detected() if data_format == "auto" else _named(data_format)
        self._kept: OrderedDict[int, list[Sample]] = OrderedDict()
        self._num_kept = 0

    @classmethod
    def of(cls, path: str | Path, config: SampleConfig) -> SampleFile:
        """The file as the settings say it is to be read. Raises ConfigError when there is no folder of pictures."""
        check_image_folder(config.image_base_path)
        return cls(path, config.image_base_path, data_format=config.source_format, answer_key=config.answer_key)

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
        except RowError as error:
            where = self.rows.where(row)
            words = str(error).removeprefix(f"{where}: ")
            reading.problems.append(Problem.told(words, reason=error.reason, where=where, field=""))
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
        samples, reading = self.read_noting(limit=limit)
        raise_if_any(reading.problems, self.path)
        return samples

    def read_noting(self, *, limit: int | None = None) -> tuple[list[Sample], Reading]:
        """As `read`, with the problems of these rows in place of an error; what means nothing in them is logged."""
        reading = self.new_reading()
        samples: list[Sample] = []
        for row in range(len(self)):
            if limit is not None and len(samples) >= limit:
                break
            samples += self.read_row(row, reading)
        for warning in unused_names(reading):
            _logger.warning("%s: %s", self.path, warning)
        return samples, reading

    @property
    def num_samples(self) -> int:
        return len(self) if self._ends is None else int(self._ends[-1])

    def sample(self, number: int) -> Sample:
        """The sample of a number counted from 0 through all rows. Raises DataError when its row is broken."""
        if not 0 <= number < self.num_samples:
            raise IndexError(f"sample {number} of {self.num_samples}")
        if self._ends is None:
            return self.samples_of(number)[0]
        row = int(np.searchsorted(self._ends, number, side="right"))
        return self._remembered(row)[number - (int(self._ends[row - 1]) if row else 0)]

    def _remembered(self, row: int) -> list[Sample]:
        """The samples of a row, kept with those of the rows that were asked for last."""
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        samples = self.samples_of(row)
        if len(samples) > 1:
            self._kept[row] = samples
            self._num_kept += len(samples)
        while self._num_kept > SAMPLES_KEPT and len(self._kept) > 1:
            self._num_kept -= len(self._kept.popitem(last=False)[1])
        return samples

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
            except RowError:
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

    Pictures are not opened; see `faults.refuse`. The rest is as in SampleFile.
    Raises one DataError that counts all problems and lists the first 20.
    """
    return SampleFile(path, image_base_path, data_format=data_format, answer_key=answer_key, box_frame=box_frame).read()


def unused_names(reading: Reading) -> Iterator[str]:
    """What was found in rows and means nothing in their format; names close to an optional field with a hint."""
    yield from (f"ignored: {line}" for tally in (reading.ignored, reading.unused) for line in tally.lines())
    for (name, hint), count in reading.misspelt.items():
        yield f'field "{name}" of {counted(count, "sample")} is ignored.{hint}'


def _named(name: str) -> Format:
    if name not in FORMATS:
        raise DataError(f'"{name}" is no format; known are {", ".join(FORMATS)}.{nearest(name, FORMATS)}')
    return FORMATS[name]
