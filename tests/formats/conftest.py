"""What the tests of all formats share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from looktwice.data.sample import Sample
from looktwice.formats.sample_file import read_samples


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Sample]]:
    def read_rows(*rows: object, **options: object) -> list[Sample]:
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_samples(path, "p", **options)

    return read_rows
