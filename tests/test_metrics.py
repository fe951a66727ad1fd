"""The record of a run: one line a step, no name outside the table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from looktwice.metrics import METRICS, Recorder


def record(folder: Path, lines: dict[int, dict[str, float]], *, start: int = 0) -> list[dict[str, float]]:
    with Recorder(folder, total_steps=9, shown=("loss", "optim/lr"), title="SFT", start=start) as recorder:
        for step, metrics in lines.items():
            recorder.log(step, metrics)
            recorder.advance(step, metrics)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_each_step_is_one_line_of_json(tmp_path) -> None:
    lines = record(tmp_path / "new" / "run", {1: {"loss": 2.5}, 3: {"loss": 1.123456789, "epoch": 1}})
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 3, "loss": 1.12345679, "epoch": 1.0}]


def test_a_run_that_goes_on_drops_what_was_logged_of_later_steps(tmp_path) -> None:
    record(tmp_path, {step: {"loss": 3.0} for step in (1, 2, 3)})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed while it wrote
    lines = record(tmp_path, {3: {"loss": 2.0}}, start=2)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 3.0), (2, 3.0), (3, 2.0)]


def test_the_curves_of_a_run_that_goes_on_have_each_step_once(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(tmp_path, {step: {"loss": 3.0} for step in (1, 2, 3)})
    record(tmp_path, {3: {"loss": 2.0}}, start=2)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in curves.Scalars("loss")] == [(1, 3.0), (2, 3.0), (3, 2.0)]


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
