"""Writing data files: what all formats write alike of a sample, what a format cannot hold, and rows into containers.

Containers are JSONL, JSON and Parquet files, plain or compressed, whole or not at all.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import zstandard

from looktwice.answers import find_answer_block
from looktwice.data.problems import Tally
from looktwice.data.sample import Sample
from looktwice.drafts import file_draft
from looktwice.errors import DataError
from looktwice.formats.files import require
from looktwice.messages import ANSWER_OPEN, ImagePart, Message, TextPart
from looktwice.paths import kind_of_name
from looktwice.processing.addresses import written_path

ROWS_PER_GROUP = 1000
"""Rows of a Parquet row group we write; a reader unpacks a whole group to get at one row."""
FORMAT_FIELDS = ("QnA", "messages", "conversations", "response_list")
"""The fields by which a row's format is known."""


@dataclass(kw_only=True)
class Writing:
    """Where pictures are, and what went missing: of samples that were written, and samples left out."""

    image_base_path: Path
    lost: Tally = field(default_factory=Tally)
    left_out: Tally = field(default_factory=Tally)

    def lose(self, sample: Sample, what: str) -> None:
        self.lost.add(what, sample.where)

    def leave_out(self, sample: Sample, why: str) -> None:
        self.left_out.add(why, sample.where)

    def image(self, source: object) -> str:
        """The text of a path: from `image_base_path` where it lies below it. A data: URL stands as it is."""
        if not isinstance(source, Path):
            return str(source)
        path = source.relative_to(self.image_base_path) if source.is_relative_to(self.image_base_path) else source
        return written_path(path)

    def gold(self, sample: Sample) -> dict[str, object]:
        """The optional fields of a sample, without an answer that a reader finds in the response by itself."""
        fields: dict[str, object] = {}
        found = find_answer_block(sample.response)
        if sample.solution and (sample.solution != found):
            fields["answer"] = sample.solution if isinstance(sample.solution, str) else list(sample.solution)
        elif not sample.solution and (found is not None or ANSWER_OPEN in sample.response):
            self.lose(sample, "that the answer block is not the gold answer")
        if sample.gold_boxes:
            boxes = [[_number(side) for side in box] for box in sample.gold_boxes]
            fields["box"] = boxes if len(boxes) > 1 else boxes[0]
        if sample.box_frame:
            fields["box_frame"] = sample.box_frame
        return fields

    def with_extra(self, row: dict[str, object], sample: Sample, known: Sequence[str]) -> dict[str, object]:
        """The row with the fields that had no meaning; one whose name has a meaning here is lost."""
        clashing = sample.extra.keys() & {*known, *FORMAT_FIELDS}
        for name in sorted(clashing):
            self.lose(sample, f'the field "{name}", a name with a meaning here')
        return {**{name: value for name, value in sample.extra.items() if name not in clashing}, **row}

    def is_one_question(self, sample: Sample, *, needs_answer: bool, may_answer_show: bool = False) -> bool:
        """Whether a format of one picture, one question and one answer can hold the sample; else it is left out.

        `may_answer_show`: an answer may show pictures that are not the crops of its calls.
        """
        first, *rest = sample.conversation.messages
        roles = [message.role for message in rest]
        if first.role == "system":
            self.leave_out(sample, "a system turn")
        elif first.role != "user" or roles not in ([], ["assistant"]):
            self.leave_out(sample, "several turns")
        elif needs_answer and not roles:
            self.leave_out(sample, "a question without an answer")
        elif not _are(first, ImagePart, TextPart):
            self.leave_out(sample, "a question that is not one picture and then a text")
        elif rest and not may_answer_show and not _are(rest[0], TextPart):
            self.leave_out(sample, "a picture in the answer that is not the crop of a call")
        else:
            if rest and not rest[0].is_trained:
                self.lose(sample, "that an assistant turn is not trained")
            return True
        return False


def _are(message: Message, *kinds: type) -> bool:
    """Whether the parts of a message are of these kinds, one of each."""
    return tuple(map(type, message.parts)) == kinds


def _number(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a data file and give back its number of rows; the kind is that of the name.

    Names end in .jsonl, .json or .parquet, the first two also with .gz or .zst. An older file of this name is
    replaced when the new one is complete, and stays as it was when writing fails.
    Raises DataError for another name and for what the kind cannot hold.
    """
    path = Path(path)
    kind, compression = kind_of_name(path)
    write = {".parquet": _write_parquet, ".jsonl": _write_lines, ".json": _write_list}[kind]
    try:
        with file_draft(path) as draft, draft.open("wb") as file, _packed(file, compression) as stream:
            return write(stream, rows, path)
    except OSError as error:
        raise DataError(
            f"{path}: the data file cannot be written ({error.strerror}); check folder and space"
        ) from error


@contextmanager
def _packed(file: IO[bytes], compression: str) -> Iterator[Any]:
    if compression == ".gz":
        # without name and time, equal rows give equal files
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as stream:
            yield stream
    elif compression == ".zst":
        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as stream:
            yield stream
    else:
        yield file


def _write_lines(stream: BinaryIO, rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    number = 0
    for number, row in enumerate(rows, 1):
        stream.write(_row_text(row, f"{path}:{number}") + b"\n")
    return number


def _write_list(stream: BinaryIO, rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    number = 0
    for number, row in enumerate(rows, 1):
        stream.write((b"[\n" if number == 1 else b",\n") + _row_text(row, f"{path}:row {number}"))
    stream.write(b"\n]\n" if number else b"[]\n")
    return number


def _row_text(row: Mapping[str, Any], where: str) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise DataError(f"{where}: {error}; only Parquet holds such a value") from error
    except ValueError as error:
        raise DataError(f"{where}: a number that is infinite or none, which JSON cannot hold; mend the row") from error
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8, but JSON can spell it
        return json.dumps(row).encode("ascii")


def _write_parquet(stream: BinaryIO, rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    source = iter(rows)
    tables, num_rows = [], 0
    try:
        # through structs: a table made of rows takes its columns from the first one alone
        while chunk := [dict(row) for row in islice(source, ROWS_PER_GROUP)]:
            tables.append(arrow.Table.from_batches([arrow.RecordBatch.from_struct_array(arrow.array(chunk))]))
            num_rows += len(chunk)
            if not tables[-1].num_columns:
                raise arrow.ArrowInvalid("rows without a field")
        table = arrow.concat_tables(tables, promote_options="permissive") if tables else arrow.table({})
        parquet.write_table(table, stream, row_group_size=ROWS_PER_GROUP, compression="zstd")
    except (arrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise DataError(
            f"{path}: Parquet cannot hold these rows ({error}); write .jsonl, or give each field one type in all rows"
        ) from error
    return num_rows
