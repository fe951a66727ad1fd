"""Containers of raw rows: what is a row, where it stands, and how each broken row or file is named."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import looktwice.formats.files
from looktwice.errors import ConfigError, DataError
from looktwice.formats import writing
from looktwice.formats.files import RowFile
from looktwice.formats.writing import write_rows

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

ROWS = [{"a": 1}, {"b": [{"text": "größer"}, {"text": "\u2028"}]}, {"a": 2, "c": 0.5}]
KINDS = ["d.jsonl", "d.json", "d.parquet", "d.jsonl.gz", "d.jsonl.zst", "d.json.gz", "d.json.zst", "D.JSONL"]
Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def write(content: bytes, name: str = "d.jsonl") -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def values(path: Path) -> list[dict[str, object]]:
    return [row.values for row in RowFile(path)]


def places(path: Path) -> list[str]:
    return [row.where.removeprefix(f"{path}:") for row in RowFile(path)]


def problem(path: Path, index: int = 0) -> str:
    """What is wrong with the row, or with the whole file, without its folder."""
    with pytest.raises(DataError) as caught:
        RowFile(path)[index]
    return str(caught.value).replace(f"{path.parent}/", "")


# -- all kinds alike


@pytest.mark.parametrize("name", KINDS)
def test_rows_written_are_rows_read(name: str, tmp_path: Path) -> None:
    assert write_rows(tmp_path / name, iter(ROWS)) == 3
    file = RowFile(tmp_path / name)
    assert [row.values for row in file] == ROWS
    assert [file[2].values, file[0].values, file[-1].values] == [ROWS[2], ROWS[0], ROWS[2]]
    assert [row.values for row in file[1:]] == ROWS[1:]
    with pytest.raises(IndexError):
        file[3]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_no_rows_is_read_as_such(name: str, tmp_path: Path) -> None:
    assert write_rows(tmp_path / name, []) == 0
    assert len(RowFile(tmp_path / name)) == 0


def test_a_file_that_is_changed_while_it_is_read_is_refused_and_one_that_is_replaced_is_not(put: Put) -> None:
    path = put(b'{"a": 1}\n')
    file, packed = RowFile(path), RowFile(put(gzip.compress(b'{"a": 1}\n'), "d.jsonl.gz"))
    path.rename(path.with_name("old.jsonl"))
    put(b'{"a": 2}\n{}\n')
    assert file[0].values == {"a": 1}
    with path.with_name("old.jsonl").open("ab") as old:
        old.write(b'{"a": 3}\n')
    with pytest.raises(DataError, match=r"d\.jsonl: the data file changed while it was in use"):
        file[0]
    put(b"{}", "d.jsonl.gz")
    assert packed[0].values == {"a": 1}


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet"])
def test_samples_are_counted_by_row(name: str, tmp_path: Path) -> None:
    write_rows(tmp_path / name, [{"q": [1, 2]}, {"q": [3]}, {"q": [4, 5, 6]}])
    assert RowFile(tmp_path / name).sample_counts(lambda row: len(row["q"])).tolist() == [2, 1, 3]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.none(), max_size=3), max_size=5))
def test_any_rows_survive_lines_and_lists(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for name in ("d.jsonl", "d.json", "d.jsonl.gz"):
        write_rows(folder / name, rows)
        assert values(folder / name) == rows


# -- lines


def test_lines_are_counted_from_one_with_the_blank_ones(put: Put) -> None:
    path = put(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n \t{"a": 2}\n\n{"a": 3}')
    assert (places(path), values(path)) == (["1", "4", "6"], [{"a": 1}, {"a": 2}, {"a": 3}])


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \r\n", b" " * 100])
def test_blank_lines_are_no_rows(content: bytes, put: Put) -> None:
    assert len(RowFile(put(content))) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([b"{}", b"", b" ", b'{"a": "b"}', b"\r"]), max_size=8), st.integers(1, 9), st.booleans()
)
def test_lines_are_found_whatever_the_block(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block: int, is_ended: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "d.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * is_ended)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looktwice.formats.files, "BLOCK", block)
        found = list(RowFile(path))
    expected = [(f"{path}:{number}", json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    assert found == expected


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'\n{"image_path": "x" "QnA"}', "d.jsonl:2: broken JSON at column 20 (Expecting ',' delimiter); mend"),
        (b'{"image_path": "\xff"}', "d.jsonl:1: byte 17 of the line is not UTF-8; save the file as UTF-8"),
        (b'{"a": 1, "b": 2, "b": 3}', 'd.jsonl:1: the name "b" stands twice in one object; mend the line'),
        (b'{"a": {"b": 2, "b": 3}}', 'd.jsonl:1: the name "b" stands twice in one object; mend the line'),
        (b"[" * 100_000, "d.jsonl:1: JSON nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "d.jsonl:1: Exceeds the limit (4300 digits)"),
        (b'["a"]', "d.jsonl:1: a list where an object belongs; write one JSON object a line"),
        (b"null", "d.jsonl:1: null where an object belongs"),
    ],
)
def test_a_broken_line_is_named(content: bytes, expected: str, put: Put) -> None:
    assert problem(put(content)).startswith(expected)


def test_a_broken_line_spoils_no_other_and_counts_as_one(put: Put) -> None:
    file = RowFile(put(b'{"q": [1, 2]}\n{"q": \n\xff\n[]\n{"q": [3, 4, 5]}\n'))
    assert file[4].values == {"q": [3, 4, 5]}
    assert file.sample_counts(lambda row: len(row["q"])).tolist() == [2, 1, 1, 1, 3]
    assert file.where(-1) == f"{file.path}:5"


# -- lists


def test_rows_of_a_list_are_numbered_whatever_the_lines(put: Put) -> None:
    path = put('\ufeff [{"a": "é"},\n\n {"a":\n "ü𝕏"} , {"b": [{}]} ]\n'.encode(), "d.json")
    assert (places(path), values(path)) == (["row 1", "row 2", "row 3"], [{"a": "é"}, {"a": "ü𝕏"}, {"b": [{}]}])


@pytest.mark.parametrize(
    "name, content",
    [
        ("d.json", b'\n{"a": 1}\n\n'),
        ("d.json", b'{"a":\n 1\n}\n'),
        ("d.jsonl", b'[\n{"a":\n 1}]'),
        ("d.jsonl", b'\xef\xbb\xbf[{"a": 1}]\n'),
        ("d.json.jsonl", b'{"a": 1}'),
        ("d.txt", b'{\n "a": 1\n}'),
    ],
)
def test_an_object_or_a_list_is_known_by_its_bytes_whatever_the_name(name: str, content: bytes, put: Put) -> None:
    assert values(put(content, name)) == [{"a": 1}]


def test_lines_under_the_name_of_a_list_are_read_as_lines(put: Put) -> None:
    path = put(b'{"a": 1}\n{"a": 2}\n', "d.json")
    assert (places(path), values(path)) == (["1", "2"], [{"a": 1}, {"a": 2}])


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'[{"a": 1},\n {"a" 1}]', "d.json:2: broken JSON at column 7 (Expecting ':' delimiter), in row 2 of the list"),
        (b'[{"a": 1} {"a": 1}]', "d.json:1: broken JSON at column 11 (Expecting ',' or ']'), in row 2"),
        (b'[{"a": 1},]', "d.json:1: broken JSON at column 11 (Expecting value), in row 2"),
        (b'[{"a": 1}', "d.json:1: broken JSON at column 10 (Expecting ',' or ']'), in row 2"),
        (b"[", "d.json:1: broken JSON at column 2 (Expecting value), in row 1"),
        (b"[{}] x", "d.json:1: broken JSON at column 6 (Extra data), in row 2"),
        (b"[" * 100_000, "d.json:row 1: JSON nested too deeply"),
        (b'{"a":\n 1} {"a": 2}', "d.json: an object and more where a list of rows belongs; write [{…}, {…}], or one"),
        (b'"a\n"', "d.json:1: broken JSON at column 3 (Invalid control character at"),
    ],
)
def test_a_broken_list_is_named(content: bytes, expected: str, put: Put) -> None:
    assert expected in problem(put(content, "d.json"))


@pytest.mark.parametrize(
    "row, expected",
    [
        (b'{"a": "\xff"}', "d.json:row 2: byte 8 of the row is not UTF-8"),
        (b'{"a": 1, "a": 2}', 'd.json:row 2: the name "a" stands twice in one object; mend the row'),
        (b"3", "d.json:row 2: a number where an object belongs; write one JSON object a row"),
    ],
)
def test_a_broken_element_spoils_no_other(row: bytes, expected: str, put: Put) -> None:
    path = put('[{"é": 1}, '.encode() + row + b', {"a": 3}]', "d.json")
    assert problem(path, 1).startswith(expected)
    assert [RowFile(path)[0].values, RowFile(path)[2].values] == [{"é": 1}, {"a": 3}]


# -- Parquet


def test_rows_of_parquet_are_found_across_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "ROWS_PER_GROUP", 2)
    rows = [{"a": number} if number % 2 else {"b": {"c": str(number)}} for number in range(5)]
    write_rows(tmp_path / "d.parquet", rows)
    file = RowFile(tmp_path / "d.parquet")
    assert [file[i].values for i in (4, 0, 3, 1, 2)] == [rows[i] for i in (4, 0, 3, 1, 2)]
    assert file[3].where == f"{file.path}:row 4"


def parquet(path: Path, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(list(columns.values()), names=[name[0] for name in columns]), path)
    return path


def test_a_value_of_parquet_that_is_none_of_python_spoils_no_file(tmp_path: Path) -> None:
    not_utf8 = pyarrow.array([b"\xff", b"a"]).cast(pyarrow.binary()).view(pyarrow.string())
    file = RowFile(parquet(tmp_path / "d.parquet", a=not_utf8))
    assert problem(file.path).startswith("d.parquet:row 1: the row cannot be read ('utf-8' codec")
    assert file[1].values == {"a": "a"}
    assert file.sample_counts(lambda values: 2).tolist() == [1, 2]
    far = pyarrow.array([1 << 50]).cast(pyarrow.timestamp("ms"))
    assert problem(parquet(tmp_path / "d.parquet", a=far)).startswith("d.parquet:row 1: the row cannot be read (")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", a1=[1], b=[2], a2=[3])
    assert problem(path) == 'd.parquet: two columns named "a"; keep one of them'


def test_a_damaged_parquet_file_is_named(put: Put) -> None:
    assert problem(put(b"PAR1 and no more")).startswith("d.jsonl: not a whole Parquet file (")


# -- compression, whole files


def test_what_is_packed_is_seen_by_its_bytes_not_its_name(put: Put) -> None:
    assert values(put(gzip.compress(b'{"a": 1}') + gzip.compress(b'\n{"a": 2}'))) == [{"a": 1}, {"a": 2}]
    packed = zstandard.compress(b'{"a": 1}\n')
    assert values(put(packed * 3)) == [{"a": 1}] * 3
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    assert values(put(skipped + packed + skipped + packed)) == [{"a": 1}] * 2


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("spoil", [lambda data: data[:-6], lambda data: data[:12] + b"\xff" * 9 + data[20:]])
def test_a_packed_file_that_is_cut_short_or_damaged_is_named(pack: Callable, spoil: Callable, put: Put) -> None:
    path = put(spoil(pack(b"".join(b'{"a": %d}\n' % number for number in range(999)))))
    assert problem(path).startswith("d.jsonl: the compressed file is damaged or cut short (")


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "d.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r'pyarrow is not installed.*pip install "looktwice\[parquet\]"'):
        RowFile(tmp_path / "d.parquet")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.jsonl")
    assert problem(tmp_path / "d.jsonl").startswith("d.jsonl: a pipe or a device, not a data file; write its rows")


def test_a_file_that_is_no_text_is_named(put: Put) -> None:
    assert problem(put("{}".encode("utf-16"))).startswith("d.jsonl: zero bytes, so no text in UTF-8; name a JSONL,")


def test_a_missing_file_or_a_directory_is_named(put: Put) -> None:
    folder = put(b"{}", "train.jsonl").parent
    with pytest.raises(DataError, match=r'trian\.jsonl: no such data file; .* Did you mean "train\.jsonl"'):
        RowFile(folder / "trian.jsonl")
    with pytest.raises(DataError, match="a directory, not a data file"):
        RowFile(folder)


def test_a_table_in_text_has_rows_by_name_and_cells_with_line_feeds(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b'index\tquestion\tA\r\n1\t"two\nlines and a ""word"""\tx\n2\tplain\t\n\n3\tend\ty')
    rows = RowFile(path)
    assert [row.values for row in rows] == [
        {"index": "1", "question": 'two\nlines and a "word"', "A": "x"},
        {"index": "2", "question": "plain"},
        {"index": "3", "question": "end", "A": "y"},
    ]
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4", f"{path}:6"]
    assert rows[2].values["question"] == "end"


def test_a_table_of_commas_may_be_compressed_and_hold_a_large_cell(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    large = "x" * 1_000_000
    path.write_bytes(gzip.compress(f'image,question\n{large},"a, b"\n'.encode()))
    [row] = RowFile(path)
    assert row.values == {"image": large, "question": "a, b"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a\tb\n1\t2\t3\n", "a.tsv:2: 3 cells under 2 columns"),
        ("a\ta\n1\t2\n", "two columns of one name"),
        ('a\tb\n"1\t2\n', "unexpected end of data"),
    ],
)
def test_a_broken_table_says_where(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        RowFile(path)[0]


def test_a_table_without_rows_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    for text in ("", "a\tb\n"):
        path.write_text(text)
        assert len(RowFile(path)) == 0
