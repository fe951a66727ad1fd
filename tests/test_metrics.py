"""The record of a run: one line a step, no name outside the table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from looktwice.metrics import METRICS, Recorder


def record(folder: Path, lines: dict[int, dict[str, float]], *, append: bool = False) -> list[dict[str, float]]:
    with Recorder(folder, total_steps=9, shown=("loss", "optim/lr"), title="SFT", append=append) as recorder:
        for step, metrics in lines.items():
            recorder.log(step, metrics)
            recorder.advance(step, metrics)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_each_step_is_one_line_of_json(tmp_path) -> None:
    lines = record(tmp_path / "new" / "run", {1: {"loss": 2.5}, 3: {"loss": 1.123456789, "epoch": 1}})
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 3, "loss": 1.12345679, "epoch": 1.0}]


def test_a_new_run_begins_its_log_anew_and_a_resumed_one_appends(tmp_path) -> None:
    record(tmp_path, {1: {"loss": 3.0}})
    assert [line["step"] for line in record(tmp_path, {2: {"loss": 2.0}}, append=True)] == [1, 2]
    assert [line["step"] for line in record(tmp_path, {5: {"loss": 1.0}})] == [5]


def test_a_name_outside_the_table_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(KeyError, match="reward/totle"):
        record(tmp_path, {1: {"loss": 1.0, "reward/totle": 1.0}})
    assert not (tmp_path / "log.jsonl").exists()


def test_the_console_shows_the_chosen_metrics(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, {4: {"loss": 2.5, "optim/lr": 1e-5, "epoch": 1.0}})
    assert "step 4/9  loss 2.5  lr 1e-05\n" in capsys.readouterr().err


def test_every_name_is_lower_case_and_explained() -> None:
    for name, meaning in METRICS.items():
        assert re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+){0,2}", name), name
        assert meaning and meaning[0].islower(), name
