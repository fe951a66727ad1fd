"""The record of a run: one line a step, no name outside the table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from looktwice.errors import ConfigError
from looktwice.metrics import METRICS, Recorder, four_digits, keep_steps, read_log
from looktwice.trackers import Tracker


def record(
    folder: Path, lines: dict[int, dict[str, float]], *, start: int = 0, trackers: Sequence[Tracker] = ()
) -> list[dict[str, float]]:
    shown = ("loss", "optim/lr")
    with Recorder(folder, total_steps=9, shown=shown, title="SFT", start=start, trackers=trackers) as recorder:
        for step, metrics in lines.items():
            recorder.advance(step)
            recorder.log(step, metrics)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_one_line_of_json(tmp_path) -> None:
    lines = record(tmp_path / "new" / "run", {1: {"loss": 2.5}, 3: {"loss": 1.123456789, "epoch": 1}})
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 3, "loss": 1.12345679, "epoch": 1.0}]


def test_a_run_that_goes_on_drops_what_was_logged_of_later_steps(tmp_path) -> None:
    record(tmp_path, {step: {"loss": 3.0} for step in (1, 2, 3)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('a note\n{"step": 4, "lo')  # the process was killed while it wrote
    keep_steps(tmp_path / "metrics.jsonl", 2)
    *lines, note = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 3.0}]
    assert note == "a note"


def test_a_log_is_read_up_to_a_step_without_what_somebody_else_wrote(tmp_path) -> None:
    record(tmp_path, {step: {"loss": float(step)} for step in (1, 2, 3)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('a note\n3\n{"loss": 9}\n{"step": 4, "lo')
    steps = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    assert read_log(tmp_path / "metrics.jsonl") == steps
    assert read_log(tmp_path / "metrics.jsonl", last=2) == steps[:2]
    assert read_log(tmp_path / "none") == []


class Listener:
    """A tracker that notes what it is told, and fails at a step."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.told: list[object] = []
        self.fails_at = fails_at

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("no network")
        self.told.append((step, dict(metrics)))

    def flush(self) -> None:
        self.told.append("flush")

    def close(self) -> None:
        self.told.append("close")


def test_several_trackers_get_the_numbers_and_one_that_fails_stops_nothing(tmp_path, capsys) -> None:
    one, other = Listener(), Listener(fails_at=2)
    lines = record(tmp_path, {1: {"loss": 3.0}, 2: {"loss": 2.0}, 3: {"loss": 1.0}}, trackers=[other, one])
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert one.told == [(1, {"loss": 3.0}), (2, {"loss": 2.0}), (3, {"loss": 1.0}), "close"]
    assert other.told == [(1, {"loss": 3.0})]
    assert capsys.readouterr().err.count("Listener shows no more of this run (no network)") == 1


def test_a_number_that_json_does_not_know_is_left_out(tmp_path) -> None:
    tracker = Listener()
    [line] = record(tmp_path, {1: {"loss": math.nan, "optim/grad_norm": math.inf, "epoch": 1}}, trackers=[tracker])
    assert line == {"step": 1, "epoch": 1.0}
    assert tracker.told[0] == (1, {"epoch": 1})


def test_a_log_on_a_full_disk_is_named_with_the_mend(tmp_path) -> None:
    recorder = Recorder(tmp_path, total_steps=1, shown=(), title="SFT")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"metrics.jsonl: cannot be written \(No space left on device\); make"):
        recorder.log(1, {"loss": 1.0})


def test_a_name_outside_the_table_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(KeyError, match="reward/totle"):
        record(tmp_path, {1: {"loss": 1.0, "reward/totle": 1.0}})
    assert not (tmp_path / "metrics.jsonl").exists()


MANY = {"loss": 0.123456, "optim/lr": 1e-05, "epoch": 1.0, "perf/tokens_per_s": 18384.2, "tool/valid_share": 1.0}


def show(folder: Path, *, total_steps: int = 12, columns: tuple[str, ...] = tuple(MANY)) -> None:
    with Recorder(folder, total_steps=total_steps, shown=columns, title="R-GRPO") as recorder:
        for step in (1, 2, 12):
            recorder.advance(step)
            recorder.log(step, MANY)


def without_times(text: str) -> str:
    return re.sub(r"\d:\d\d:\d\d", "TIME", text)


def test_off_a_terminal_a_step_is_one_whole_line_and_nothing_moves(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # many job runners set it
    show(tmp_path)
    metrics = "loss 0.1235  lr 1e-05  epoch 1  tokens_per_s 18,384  tool/valid_share 1  elapsed TIME"
    assert without_times(capsys.readouterr().err).splitlines() == [
        f"step  1/12  {metrics}",
        f"step  2/12  {metrics}  left TIME",
        f"step 12/12  {metrics}  left TIME",
    ]


def test_a_terminal_has_a_history_of_steps_above_a_bar_with_count_and_time(tmp_path, open_terminal) -> None:
    written = open_terminal()
    show(tmp_path)
    lines = re.split(r"[\r\n]+", without_times(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written())).strip())
    assert max(map(len, lines)) <= 80
    history = [line for line in lines if not line.startswith("R-GRPO")]
    assert history[:2] == [
        "step  1/12  loss 0.1235  lr 1e-05  epoch 1  tokens_per_s 18,384",
        "    tool/valid_share 1",
    ]
    assert [line[:10] for line in history[::2]] == ["step  1/12", "step  2/12", "step 12/12"]
    assert re.fullmatch(r"R-GRPO ━{40} 12/12 TIME left TIME", lines[-1])


def test_a_bar_keeps_its_time_when_steps_take_minutes(tmp_path, monkeypatch) -> None:
    with Recorder(tmp_path, total_steps=10, shown=(), title="R-GRPO") as recorder:
        now = recorder.progress.get_time()
        for step in (1, 2, 3):
            monkeypatch.setattr(recorder.progress, "get_time", lambda step=step: now + 300 * step)
            recorder.advance(step)
        assert re.search(r"  left 0:35:0\d$", recorder.lines(3, {})[0])


@pytest.mark.parametrize(
    ("value", "text"), [(0.69314, "0.6931"), (2e-5, "2e-05"), (0, "0"), (123456.7, "123,457"), (2e12, "2e+12")]
)
def test_a_number_is_shown_to_four_digits(value: float, text: str) -> None:
    assert four_digits(value) == text


def test_every_name_is_lower_case_and_explained() -> None:
    for name, meaning in METRICS.items():
        assert re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+){0,2}(/[*])?", name), name
        assert meaning and meaning[0].islower(), name
