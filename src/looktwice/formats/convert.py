"""A data file in another format: what was read, what was written, and what the new format cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from looktwice.config import ConvertConfig
from looktwice.data.problems import Tally, raise_if_any
from looktwice.errors import DataError, counted
from looktwice.formats.catalogue import FORMATS
from looktwice.formats.sample_file import SampleFile
from looktwice.formats.writing import Writing, write_rows
from looktwice.paths import check_target


@dataclass(kw_only=True)
class Conversion:
    """What a conversion did. `left_out` are samples that the format cannot hold, `lost` is what others lost.

    `changed` is what reading does on purpose, such as dropping the words of crop commands.
    """

    source_format: str
    target_format: str
    num_rows: int = 0
    num_samples: int = 0
    num_written: int = 0
    lost: Tally = field(default_factory=Tally)
    left_out: Tally = field(default_factory=Tally)
    changed: Tally = field(default_factory=Tally)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """What was done, a line each."""
        lines = [
            f"read {counted(self.num_rows, 'row')} of the format {self.source_format}: "
            f"{counted(self.num_samples, 'sample')}",
            f"{counted(self.num_written, 'row')} of the format {self.target_format}",
        ]
        for title, tally in (("left out", self.left_out), ("lost", self.lost), ("read otherwise", self.changed)):
            lines += [f"{title}:", *(f"  {line}" for line in tally.lines())] if tally else []
        return lines


def convert_file(source: str | Path, target: str | Path, config: ConvertConfig) -> Conversion:
    """Write the samples of a file in another format; the kinds of the files follow from their names.

    Raises DataError when a row cannot be read, with all problems counted, and when something would be lost and
    `allow_loss` is off. Neither leaves a file behind.
    """
    check_target(Path(target), Path(source), overwrite=config.overwrite)
    file = SampleFile(
        source,
        config.image_base_path,
        data_format=config.source_format,
        answer_key=config.answer_key,
        box_frame=config.box_frame,
    )
    lost = Tally()
    reading = replace(file.new_reading(), ignored=lost)
    writing = Writing(image_base_path=config.image_base_path, lost=lost)
    done = Conversion(
        source_format=file.format.name,
        target_format=config.target_format,
        lost=lost,
        left_out=writing.left_out,
        changed=reading.changed,
    )
    write = FORMATS[config.target_format].write

    def rows() -> Iterator[dict[str, object]]:
        for row in range(len(file)):
            samples = file.read_row(row, reading)
            done.num_rows += 1
            done.num_samples += len(samples)
            for written in write(samples, writing):
                done.num_written += 1
                yield written
        # raised before the file is complete, so that none is left
        raise_if_any(reading.problems, source)
        if not done.num_written:
            raise DataError(f"{target}: not written, as no sample can stand in this format", *done.lines())
        if (done.lost or done.left_out) and not config.allow_loss:
            head = f"{target}: not written, as the format cannot hold everything; with --allow_loss there would be"
            raise DataError(head, *done.lines())

    write_rows(target, rows())
    return done
