"""Writing raw rows: JSONL, JSON and Parquet files, plain or compressed, whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

from looktwice.data.files import require
from looktwice.errors import DataError

ROWS_PER_GROUP = 1000
"""Rows of a Parquet row group we write; a reader unpacks a whole group to get at one row."""


def check_target(target: Path, source: Path) -> None:
    """Raise DataError when `write_rows` could not write there, or would write over the file that is read."""
    _kind_of_name(target)
    if not target.absolute().parent.is_dir():
        raise DataError(f"{target}: there is no folder {target.parent}; make it, or name another place")
    if target.exists() and source.exists() and target.samefile(source):
        raise DataError(f"{target}: the file to read from; name another one to write to")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a data file and give back its number of rows; the kind is that of the name.

    Names end in .jsonl, .json or .parquet, the first two also with .gz or .zst. An older file of this name is
    replaced when the new one is complete, and stays as it was when writing fails.
    Raises DataError for another name and for what the kind cannot hold.
    """
    path = Path(path)
    write, compression = _kind_of_name(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file, _packed(file, compression) as stream:
            num_rows = write(stream, rows, path)
        os.replace(partial, path)
    except OSError as error:
        raise DataError(
            f"{path}: the data file cannot be written ({error.strerror}); check folder and space"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return num_rows


WriteRows = Callable[[BinaryIO, Iterable[Mapping[str, Any]], Path], int]


def _kind_of_name(path: Path) -> tuple[WriteRows, str]:
    """How to write a file of this name, and the suffix of its compression or ""."""
    name = path.name.lower()
    compression = next((suffix for suffix in (".gz", ".zst") if name.endswith(suffix)), "")
    kind = Path(name.removesuffix(compression)).suffix
    if kind == ".parquet" and not compression:
        return _write_parquet, ""
    if kind in (".jsonl", ".json"):
        return (_write_lines if kind == ".jsonl" else _write_list), compression
    raise DataError(f"{path}: end the name in .parquet, or in .jsonl or .json, these also with .gz or .zst")


@contextmanager
def _packed(file: IO[bytes], compression: str) -> Iterator[Any]:
    if compression == ".gz":
        # without name and time, equal rows give equal files
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as stream:
            yield stream
    elif compression == ".zst":
        with require("zstandard").ZstdCompressor().stream_writer(file, closefd=False) as stream:
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
