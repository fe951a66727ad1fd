"""Whatever text of a row is millions of letters long, no message tells more than a line of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from looktwice import cli
from looktwice.checking.check import judge
from looktwice.config import CheckConfig
from looktwice.errors import LINE, DataError
from looktwice.formats.catalogue import FORMATS
from looktwice.formats.sample_file import SampleFile

ROWS = Path(__file__).parent / "rows"
NUM_LETTERS = 100_000
LONG = {
    "letters": "x" * NUM_LETTERS,
    "lines": "a word; and\n" * (NUM_LETTERS // 12),
    "base64": "QUJD" * (NUM_LETTERS // 4),
    "picture": "iVBORw0KGgoAAAANSUhEUgAA" + "QUJD" * (NUM_LETTERS // 4),
    "call": f"<tool_call>{'1' * NUM_LETTERS}",
    "crop": f"{{Crop {'x' * NUM_LETTERS} [1, 2]}}",
}


def first_row(name: str) -> dict[str, Any]:
    text = next(ROWS.glob(f"{name}.*")).read_text(encoding="utf-8")
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    return rows[0]


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where the texts of a row are."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in inner:
        yield from places(one, (*path, step))
    if isinstance(value, str):
        yield path


def spoilt(row: dict[str, Any], path: tuple[str | int, ...], text: str) -> Iterator[dict[str, Any]]:
    """The row with the text in the place of another one, and as the name of its field."""
    for as_name in (False, True):
        copy: Any = deepcopy(row)
        holder = copy
        for step in path[:-1]:
            holder = holder[step]
        if not as_name:
            holder[path[-1]] = text
        elif isinstance(holder, dict):
            holder[text] = holder.pop(path[-1])
        yield copy


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("name", FORMATS)
def test_no_text_of_a_row_is_told_by_more_than_a_line(name: str, kind: str, tmp_path: Path) -> None:
    row = first_row(name)
    bad = [one for path in places(row) for one in spoilt(row, path, LONG[kind])]
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in bad), encoding="utf-8")
    config = CheckConfig(image_base_path=tmp_path, source_format=name)
    told = [str(problem) for of_reason in judge([tmp_path / "d.jsonl"], config).first.values() for problem in of_reason]
    with pytest.raises(DataError) as caught:
        SampleFile.of(tmp_path / "d.jsonl", config).read()
    told += str(caught.value).split("\n")
    assert told
    assert max(map(len, told)) <= 2 * LINE
    assert not any("\n" in line for line in told)
    assert not any(LONG[kind][:300] in line or LONG[kind][-300:] in line for line in told)


@pytest.mark.parametrize("kind", LONG)
def test_neither_is_a_flag(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for words in (
        ["ask", LONG[kind], "What?", "--model_path", "tiny"],
        ["ask", "--image_path", LONG[kind], "--question", "What?", "--model_path", "tiny"],
        ["data", "check", LONG[kind]],
        ["data", "convert", LONG[kind], "d.jsonl"],
        [LONG[kind]],
    ):
        assert cli.main(words) == 1
        output = capsys.readouterr()
        assert output.out.count("\n") + output.err.count("\n") <= 12
        assert LONG[kind][:300] not in output.out + output.err
