"""Writing raw rows: whole or not at all, and what each kind of file cannot hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from looktwice.errors import DataError
from looktwice.formats.files import RowFile
from looktwice.formats.writing import write_rows

pytest.importorskip("pyarrow")

ROWS = [{"a": 1}, {"b": [{"text": "größer"}, {"text": "\u2028"}]}, {"a": 2, "c": 0.5}]


def values(path: Path) -> list[dict[str, object]]:
    return [row.values for row in RowFile(path)]


def test_parquet_keeps_bytes_and_the_others_refuse_them(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.parquet", [{"image": b"\x89PNG"}])
    assert values(tmp_path / "d.parquet") == [{"image": b"\x89PNG"}]
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*bytes is not JSON serializable; only Parquet holds"):
        write_rows(tmp_path / "d.jsonl", [{"image": b"\x89PNG"}])


@pytest.mark.parametrize("rows", [[{"a": "text"}, {"a": [1]}], [{}], [{"a": {}}], [{"a": 1 << 80}], [{"a": "\ud800"}]])
def test_rows_that_parquet_cannot_hold_are_refused(rows: list, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.parquet: Parquet cannot hold these rows \(.*; write \.jsonl"):
        write_rows(tmp_path / "d.parquet", rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["d.csv", "d", "d.parquet.gz", "d.gz"])
def test_a_name_that_says_no_kind_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"end the name in \.parquet, or in \.jsonl or \.json"):
        write_rows(tmp_path / name, ROWS)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    write_rows(path, ROWS)
    with pytest.raises(DataError, match="only Parquet"):
        write_rows(path, [{"a": 1}, {"a": b""}])
    assert values(path) == ROWS
    write_rows(path, (row.values for row in RowFile(path)[1:]))
    assert values(path) == ROWS[1:]
    assert [other.name for other in tmp_path.iterdir()] == ["d.jsonl"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl: the data file cannot be written \(No such file or directory\)"):
        write_rows(tmp_path / "none" / "d.jsonl", ROWS)


def test_a_number_that_json_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:2: a number that is infinite or none"):
        write_rows(tmp_path / "d.jsonl", [{"a": 1}, {"a": float("inf")}])


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"a": "\ud800 é"}])
    assert values(tmp_path / "d.jsonl") == [{"a": "\ud800 é"}]
