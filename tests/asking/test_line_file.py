"""Files of lines that a later process goes on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from looktwice.asking.line_file import LineFile
from looktwice.errors import ConfigError


def test_lines_are_added_whole_to_those_that_are_kept(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "new" / "a.jsonl")
    assert list(file.texts()) == []
    with file.writing(list) as add:
        add({"n": 1})
        add({"n": 2})
    with file.path.open("a") as half:
        half.write('{"n": 3')
    assert list(file.texts()) == [(1, '{"n": 1}\n'), (2, '{"n": 2}\n')]
    with file.writing(lambda: [{"n": 2}]) as add:
        add({"n": 4})
    assert [json.loads(text) for _, text in file.texts()] == [{"n": 2}, {"n": 4}]


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "a.jsonl")
    file.check_free()
    with file.writing(list):
        for claim in (file.check_free, file.writing(list).__enter__):
            with pytest.raises(ConfigError, match="another process is writing there"):
                claim()
    file.check_free()
