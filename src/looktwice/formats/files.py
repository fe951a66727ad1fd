"""Containers of raw rows: JSONL, JSON, Parquet, TSV and CSV files, plain or packed, read in any order and not all at
once.

What a row means is not known here; see `formats.py`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import re
import shutil
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, overload

import numpy as np
import zstandard

from looktwice import extras
from looktwice.errors import DataError, short
from looktwice.paths import check_data_file

GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
"""A frame of data, or one to be skipped, which parallel packers write first. Source: RFC 8878, 3.1."""
BLOCK = 1 << 24
"""Bytes that are scanned at a time."""
LOOKED_AT = 4096
"""Bytes at the beginning that are looked at to tell a text from something else."""
DELIMITERS = {".tsv": "\t", ".csv": ","}
csv.field_size_limit(2**31 - 1)  # a cell may hold a picture

_IS_BLANK = np.zeros(256, dtype=bool)
_IS_BLANK[list(b" \t\n\r\v\f")] = True
_AS_ROWS = "write [{…}, {…}], or one object a line in a .jsonl file"
_GAP = re.compile(r"[ \t\n\r]*")


class RowError(DataError):
    """A row that cannot be read, whatever it means. `reason` is a key of `problems.REASONS`."""

    def __init__(self, message: str, reason: str = "broken_row") -> None:
        super().__init__(message)
        self.reason = reason


class _EqualNames(ValueError):
    """An object with one name twice."""


class Row(NamedTuple):
    """One raw row. `where` is "file:line" in JSONL, "file:row N" (counted from 1) elsewhere."""

    where: str
    values: dict[str, Any]


class RowFile(Sequence[Row]):
    """The rows of a data file, parsed as they are asked for.

    Bytes say what is compressed (gzip, zstd: unpacked once into a temporary file that has no name), what is Parquet,
    and what of the rest is a JSON list or JSONL. A single JSON object is one row. Blank lines are no rows. The name
    says what is a table in text (`.tsv`, `.csv`): its first row has the names of the columns, all values are texts, and
    empty cells are left out.

    `file[i]` raises RowError for a row that is broken, and for that row alone, and DataError when the file was changed
    since it was opened.
    Raises DataError when the file cannot be read, ConfigError when a package for its kind is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_data_file(self.path)
        with _reading(self.path):
            file: IO[bytes] = self.path.open("rb")
            self._stamp = _stamp_of(file)
            unpacked = _unpacked(file)
        weakref.finalize(self, unpacked.close)
        self.is_packed = unpacked is not file
        self._watched = file if unpacked is file else None  # what is unpacked is ours alone
        self._rows = _open_rows(unpacked, self.path)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        where = self.where(index)
        if self._watched and _stamp_of(self._watched) != self._stamp:
            raise DataError(f"{self.path}: the data file changed while it was in use; leave it alone and start again")
        return Row(where, self._rows.values(range(len(self))[index], where))

    def where(self, index: int) -> str:
        """The place of a row in the file, for messages, whether the row can be read or not."""
        return f"{self.path}:{self._rows.place(range(len(self))[index])}"

    def sample_counts(self, num_samples: Callable[[dict[str, Any]], int]) -> np.ndarray:
        """Samples in each row [rows], int64, by the quickest parse there is.

        A row that cannot be read counts as one sample, so that whoever goes through the samples meets it.
        """
        counts = (1 if values is None else num_samples(values) for values in self._rows.quick_values())
        return np.fromiter(counts, dtype=np.int64, count=len(self))


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


class _Rows(Protocol):
    """What a container gives: its rows by index from 0."""

    def __len__(self) -> int: ...
    def place(self, index: int) -> str: ...
    def values(self, index: int, where: str) -> dict[str, Any]: ...
    def quick_values(self) -> Iterator[dict[str, Any] | None]: ...


def _open_rows(file: IO[bytes], path: Path) -> _Rows:
    if os.pread(file.fileno(), len(PARQUET_MAGIC), 0) == PARQUET_MAGIC:
        return _ParquetRows(file, path)
    if b"\0" in os.pread(file.fileno(), LOOKED_AT, 0):
        raise DataError(f"{path}: zero bytes, so no text in UTF-8; name a JSONL, JSON or Parquet file, saved as UTF-8")
    suffix = next((one.lower() for one in reversed(path.suffixes) if one.lower() in DELIMITERS), None)
    if suffix is not None:
        return _TableRows(file, DELIMITERS[suffix], path)
    return _line_rows(file) if _is_row_a_line(file, path) else _list_rows(file, path)


class _TextRows:
    """Rows that are pieces of a text file: row i is the bytes from starts[i] to ends[i]. All arrays [rows], int64."""

    def __init__(self, file: IO[bytes], unit: str, numbers: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        """`unit` is "line" or "row", `numbers` are the rows' own in that unit."""
        self.file = file
        self.unit, self.numbers, self.starts, self.ends = unit, numbers, starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    def place(self, index: int) -> str:
        return f"{self.numbers[index]}" if self.unit == "line" else f"{self.unit} {self.numbers[index]}"

    def raw(self, index: int) -> bytes:
        start, end = int(self.starts[index]), int(self.ends[index])
        raw = _read_at(self.file, start, end)
        return raw.removeprefix(codecs.BOM_UTF8) if start == 0 else raw

    def values(self, index: int, where: str) -> dict[str, Any]:
        try:
            text = self.raw(index).rstrip(b"\r\n").decode("utf-8")
            values = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
        except UnicodeDecodeError as error:
            place = f"byte {error.start + 1} of the {self.unit}"
            raise RowError(f"{where}: {place} is not UTF-8; save the file as UTF-8", "not_utf8") from error
        except json.JSONDecodeError as error:
            what = f"broken JSON at column {error.colno} ({error.msg})"
            raise RowError(f"{where}: {what}; mend the line", "broken_json") from error
        except RecursionError as error:
            raise RowError(f"{where}: JSON nested too deeply; mend the {self.unit}", "broken_row") from error
        except ValueError as error:
            reason = "equal_names" if isinstance(error, _EqualNames) else "broken_row"
            raise RowError(f"{where}: {error}; mend the {self.unit}", reason) from error
        if not isinstance(values, dict):
            what = f"{kind_of(values)} where an object belongs"
            raise RowError(f"{where}: {what}; write one JSON object a {self.unit}", "not_an_object")
        return values

    def quick_values(self) -> Iterator[dict[str, Any] | None]:
        for index in range(len(self)):
            try:
                values = json.loads(self.raw(index))
            except (ValueError, RecursionError):
                values = None
            yield values if isinstance(values, dict) else None


def _constant(name: str) -> float | None:
    # no JSON, but what Python writes; NaN is how tables say that a value is missing
    return None if name == "NaN" else float(name)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # plain JSON readers keep the last of two equal names and lose the first without a word
    values = dict(pairs)
    if len(values) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _EqualNames(f'the name "{short(name)}" stands twice in one object')
    return values


def _line_rows(file: IO[bytes]) -> _TextRows:
    """The lines that are not blank. Cut at line feeds only: JSON texts may hold what else Unicode ends lines with."""
    starts, doubtful = _line_starts(file)
    ends = np.append(starts[1:], os.stat(file.fileno()).st_size)
    is_row = np.ones(len(starts), dtype=bool)
    for line in doubtful:
        text = _read_at(file, int(starts[line]), int(ends[line]))
        is_row[line] = bool((text.removeprefix(codecs.BOM_UTF8) if line == 0 else text).strip())
    return _TextRows(file, "line", np.flatnonzero(is_row) + 1, starts[is_row], ends[is_row])


def _line_starts(file: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Where each line begins, and the numbers (from 0) of the lines that may be blank."""
    starts: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    is_doubtful: list[np.ndarray] = [np.empty(0, dtype=bool)]
    place, is_start = 0, True
    buffer = np.empty(BLOCK, dtype=np.uint8)
    file.seek(0)
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        block = buffer[:size]
        after = np.flatnonzero(block == ord("\n")) + 1
        begins = np.concatenate([[0] if is_start else [], after]).astype(np.int64)
        begins = begins[begins < size]
        starts.append(begins + place)
        is_doubtful.append(_IS_BLANK[block[begins]])
        is_start = block[-1] == ord("\n")
        place += size
    doubtful = np.concatenate(is_doubtful)
    doubtful[:1] = True  # the first line may be a byte order mark and nothing else
    return np.concatenate(starts), np.flatnonzero(doubtful)


class _TableRows(_TextRows):
    """Rows of a table in text, quoted as RFC 4180 has it: a quoted cell may hold line feeds."""

    def __init__(self, file: IO[bytes], delimiter: str, path: Path) -> None:
        self.delimiter = delimiter
        starts, lines = _record_starts(file)
        ends = np.append(starts[1:], os.stat(file.fileno()).st_size)[: len(starts)]
        super().__init__(file, "line", lines + 1, starts, ends)  # lines, since that is what an editor shows
        self.names = self._cells(0, str(path)) if len(starts) else []
        if len(set(self.names)) < len(self.names):
            raise DataError(f"{path}: two columns of one name; keep one of them")
        heads = zip(starts.tolist(), np.minimum(ends, starts + LOOKED_AT).tolist())
        kept = np.array([bool(_read_at(file, start, end).strip()) for start, end in heads], dtype=bool)
        kept[:1] = False
        self.numbers, self.starts, self.ends = self.numbers[kept], starts[kept], ends[kept]

    def values(self, index: int, where: str) -> dict[str, Any]:
        cells = self._cells(index, where)
        if len(cells) > len(self.names):
            what = f"{len(cells)} cells under {len(self.names)} columns"
            raise RowError(f"{where}: {what}; quote cells that hold tabs, commas or quotes", "broken_row")
        return {name: cell for name, cell in zip(self.names, cells) if cell != ""}

    def quick_values(self) -> Iterator[dict[str, Any] | None]:
        for index in range(len(self)):
            try:
                yield self.values(index, self.place(index))
            except RowError:
                yield None

    def _cells(self, index: int, where: str) -> list[str]:
        try:
            text = self.raw(index).rstrip(b"\r\n").decode("utf-8")
            return next(csv.reader([text], delimiter=self.delimiter, strict=True))
        except UnicodeDecodeError as error:
            raise RowError(f"{where}: not UTF-8; save the file as UTF-8", "not_utf8") from error
        except csv.Error as error:
            raise RowError(f"{where}: {error}; mend the row", "broken_row") from error


def _record_starts(file: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Where each record of a table begins, and on which line (from 0): after a line feed that is inside no quotes."""
    starts: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    lines: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    place = num_lines = num_quotes = 0
    buffer = np.empty(BLOCK, dtype=np.uint8)
    file.seek(0)
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        block = buffer[:size]
        feeds, quotes = np.flatnonzero(block == ord("\n")), np.flatnonzero(block == ord('"'))
        is_end = (num_quotes + np.searchsorted(quotes, feeds)) % 2 == 0
        starts.append(feeds[is_end] + 1 + place)
        lines.append(np.flatnonzero(is_end) + 1 + num_lines)
        place, num_lines, num_quotes = place + size, num_lines + len(feeds), num_quotes + len(quotes)
    found, numbers = np.concatenate(starts), np.concatenate(lines)
    is_inside = found < place
    return found[is_inside], numbers[is_inside]


def _is_row_a_line(file: IO[bytes], path: Path) -> bool:
    """Whether a text is JSONL rather than one JSON value, as its first line that is not blank tells, else its name."""
    file.seek(0)
    first = next((text for line in file if (text := line.removeprefix(codecs.BOM_UTF8).strip())), b"")
    is_named_json = ".json" in [suffix.lower() for suffix in path.suffixes[-2:]]
    try:
        value = json.loads(first)
    except RecursionError:
        return not is_named_json
    except ValueError:  # the beginning of a value of several lines, or a broken row
        second = next((text[:1] for line in file if (text := line.strip())), b"")
        return not is_named_json and first[:1] != b"[" and (first[:1] != b"{" or second not in (b'"', b"}"))
    is_list = isinstance(value, list) and (is_named_json or isinstance(next(iter(value), None), dict))
    return not is_list or any(line.strip() for line in file)


def _list_rows(file: IO[bytes], path: Path) -> _TextRows:
    """The elements of a JSON list. The whole text is read once, and its elements are found, not kept."""
    file.seek(0)
    # a bad byte then spoils its own row alone
    text = file.read().decode("utf-8", "surrogateescape")
    spans = _element_spans(text, path)
    edges = np.array(spans, dtype=np.int64).reshape(-1)
    if not text.isascii():
        pieces = (text[start:end] for start, end in zip([0, *edges.tolist()], edges.tolist()))
        edges = np.cumsum([len(piece.encode("utf-8", "surrogateescape")) for piece in pieces], dtype=np.int64)
    return _TextRows(file, "row", np.arange(len(spans)) + 1, edges[::2], edges[1::2])


def _element_spans(text: str, path: Path) -> list[tuple[int, int]]:
    """First and last place of each element of the list that is the text. Raises DataError when it is no list."""
    decode = json.JSONDecoder().raw_decode
    spans: list[tuple[int, int]] = []

    def gap(place: int) -> int:
        return _GAP.match(text, place).end()  # type: ignore[union-attr]

    try:
        place = gap(1 if text.startswith("\ufeff") else 0)
        if place == len(text):
            return []
        if text[place] != "[":
            value, end = decode(text, place)
            if not isinstance(value, dict) or gap(end) < len(text):
                seen = f"{kind_of(value)} and more" if gap(end) < len(text) else kind_of(value)
                raise DataError(f"{path}: {seen} where a list of rows belongs; {_AS_ROWS}")
            return [(place, end)]
        place = gap(place + 1)
        is_open = not text.startswith("]", place)
        while is_open:
            start = place
            _, end = decode(text, start)
            spans.append((start, end))
            place = gap(end)
            is_open = text.startswith(",", place)
            if not is_open and not text.startswith("]", place):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
            place = gap(place + 1) if is_open else place
        if (place := gap(place + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, place)
    except json.JSONDecodeError as error:
        place_in_file = f"{path}:{error.lineno}: broken JSON at column {error.colno} ({error.msg})"
        raise DataError(f"{place_in_file}, in row {len(spans) + 1} of the list; mend the file") from error
    except (RecursionError, ValueError) as error:
        reason = "JSON nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{path}:row {len(spans) + 1}: {reason}; mend the row") from error
    return spans


class _ParquetRows:
    """Rows of a Parquet file. A row group is unpacked when one of its rows is first asked for, into a nameless file.

    Reading in any order then costs no more than reading in order, and memory holds only the pages in use.
    Fields that are null or NaN are left out: Parquet gives every row the fields of all.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.arrow = require("pyarrow")
        try:
            self.file = require("pyarrow.parquet").ParquetFile(file)
        except (self.arrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a whole Parquet file ({error}); make it again") from error
        names = Counter(self.file.schema_arrow.names)
        if len(names) < len(self.file.schema_arrow.names):
            raise DataError(f'{path}: two columns named "{short(names.most_common(1)[0][0])}"; keep one of them')
        metadata = self.file.metadata
        self.ends = np.cumsum([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)], dtype=np.int64)
        self.groups: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def place(self, index: int) -> str:
        return f"row {index + 1}"

    def values(self, index: int, where: str) -> dict[str, Any]:
        group = int(np.searchsorted(self.ends, index, side="right"))
        try:
            if group not in self.groups:
                self.groups[group] = self._unpack(group)
            table = self.groups[group]
            [row] = table.slice(index - int(self.ends[group]) + len(table), 1).to_pylist()
        except (self.arrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            raise RowError(f"{where}: the row cannot be read ({error}); make the file again", "broken_row") from error
        return _without_missing(row)

    def quick_values(self) -> Iterator[dict[str, Any] | None]:
        for index in range(len(self)):
            try:
                yield self.values(index, self.place(index))
            except RowError:
                yield None

    def _unpack(self, group: int) -> Any:
        table = self.file.read_row_group(group)
        with tempfile.NamedTemporaryFile() as file:
            with self.arrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            return self.arrow.ipc.open_file(self.arrow.memory_map(file.name)).read_all()


def _without_missing(value: Any) -> Any:
    """Objects without their fields that are null or NaN, which is how tables say that a value is missing."""
    if isinstance(value, dict):
        known = ((name, _without_missing(inner)) for name, inner in value.items())
        return {name: inner for name, inner in known if inner is not None}
    if isinstance(value, list):
        return [_without_missing(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of the operating system as DataErrors about the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut short ({error}); make it again") from error
    except OSError as error:
        raise DataError(f"{path}: the data file cannot be read ({error.strerror}); check path and rights") from error


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    """The file itself, or what it packs, in a temporary file without a name."""
    head = file.read(4)
    file.seek(0)
    if head.startswith(GZIP_MAGIC):
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115, the caller's to close
        with file, gzip.open(file) as packed:
            shutil.copyfileobj(packed, unpacked, BLOCK)
    elif ZSTD_MAGIC.fullmatch(head):
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115
        with file:
            _unpack_zstd(file, unpacked)
    else:
        return file
    unpacked.flush()
    return unpacked


def _unpack_zstd(packed: IO[bytes], unpacked: IO[bytes]) -> None:
    # frame by frame: the package's own stream reader takes a file that is cut short for a whole one
    frame = None
    try:
        while block := packed.read(BLOCK):
            while block:
                if frame is None or frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                unpacked.write(frame.decompress(block))
                block = frame.unused_data
    except zstandard.ZstdError as error:
        raise EOFError(error) from error
    if frame is None or not frame.eof:
        raise EOFError("the last frame has no end")


def _stamp_of(file: IO[bytes]) -> tuple[int, int]:
    """Size and time of the last change; a file that was replaced by another of its name stays as it was."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _read_at(file: IO[bytes], start: int, end: int) -> bytes:
    # not seek and read: threads share the file
    return os.pread(file.fileno(), end - start, start)


def require(module: str) -> Any:
    """The module that a Parquet file needs. Raises ConfigError when it is not installed."""
    return extras.require(module, extra="parquet", needed_by="this kind of file")
