"""The page of runs: curves together or side by side, alarms, settings, environment; read from folders alone."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from looktwice.errors import DataError
from looktwice.metrics import METRICS
from looktwice.report.run_page import (
    CURVES,
    alarm_table,
    charts_of,
    overview_table,
    read_runs,
    short_names,
    value_tables,
    write_run_page,
)

HOSTILE = "</script><img src=x onerror=alert(1)>"
GRPO = [
    {"step": step, "loss": 0.1 * step, "reward/total": float(step), "reward/own/taste": 1.0, "tool/refused/no_box": 0.5,
     "gap/mean": 1e-6, "time/rollout_s": 2.0, "time/update_s": 1.0, "time/step_s": 3.0, "rollout/right": 0.25,
     "alarm/no_crops": float(step > 1), "strange/word": 7.0}
    for step in (1, 2, 3)
]  # fmt: skip
SFT = [{"step": 1, "loss": 2.0, "optim/lr": 0.001}, {"step": 2, "loss": 1.0, "optim/lr": 0.0}]


def run_folder(folder: Path, lines: list[dict[str, Any]], *, stage: str = "grpo", **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    start = {"step": 0, "time": "2026-01-02T03:04:05+0000", "command": ["looktwice", HOSTILE], "gpus": []}
    (folder / "run.json").write_text(json.dumps({"stage": stage, "starts": [start]}))
    (folder / "config.yaml").write_text(json.dumps({"ModelConfig": {"model_name": HOSTILE, **settings}}))
    return folder


def titles(*folders: Path) -> list[str]:
    return [chart.title for chart in charts_of(read_runs(folders))]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "run", GRPO)


def test_metrics_that_belong_together_share_a_chart_and_none_is_lost(run: Path) -> None:
    charts = {chart.title: chart for chart in charts_of(read_runs([run]))}
    assert [trace["name"] for trace in charts["Reward by term"].traces] == ["total", "own/taste"]
    assert [trace["name"] for trace in charts["Refused calls"].traces] == ["refused/no_box"]
    assert charts["Gap of trainer and engine"].layout["yaxis"]["type"] == "log"
    assert all("stackgroup" in trace for trace in charts["Time by phase"].traces)
    assert charts["strange/word"].traces[0]["y"] == [7.0, 7.0, 7.0]  # a metric that no chart names has its own
    assert not any("alarm" in title for title in charts)


def test_no_metric_is_twice_in_one_chart_and_each_name_is_one_that_runs_log() -> None:
    for group in CURVES:
        assert len({*group.metrics}) == len(group.metrics)
        assert all(any(fnmatchcase(name, metric) for name in METRICS) for metric in group.metrics), group.title


def test_of_several_runs_a_metric_has_a_chart_and_a_run_a_line(run: Path, tmp_path: Path) -> None:
    other = run_folder(tmp_path / "other", GRPO[:2])
    charts = {chart.title: chart for chart in charts_of(read_runs([run, other]))}
    chart = charts["Reward by term: reward/total"]
    assert [(trace["name"], trace["y"]) for trace in chart.traces] == [("run", [1.0, 2.0, 3.0]), ("other", [1.0, 2.0])]
    assert charts["Loss"].traces[1]["x"] == [1, 2]


def test_stages_have_charts_of_their_own(run: Path, tmp_path: Path) -> None:
    sft = run_folder(tmp_path / "sft", SFT, stage="sft")
    write_run_page(tmp_path / "p.html", [run, sft])
    html = (tmp_path / "p.html").read_text()
    assert html.index("<h2>SFT</h2>") < html.index("<h2>R-GRPO</h2>")
    assert html.count(">Loss</figcaption>") == 2
    assert overview_table(read_runs([sft, run])).rows[1][:5] == ("run", "R-GRPO", "3", "0.1", "0.3")


def test_what_files_say_never_becomes_markup(run: Path, tmp_path: Path) -> None:
    write_run_page(tmp_path / "p.html", [run, run_folder(tmp_path / "<img src=x onerror=alert(1)>", GRPO)])
    html = (tmp_path / "p.html").read_text()
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert "<img" not in own and "&lt;img src=x onerror" in own
    assert own.count("</script>") == own.count('<script type="application/json">')
    figures = re.findall(r'<script type="application/json">(.*?)</script>', own, flags=re.S)
    assert any("<img src=x" in json.loads(figure)["data"][1]["name"] for figure in figures)


def test_only_the_scripts_of_the_page_may_run(run: Path, tmp_path: Path) -> None:
    write_run_page(tmp_path / "p.html", [run])
    html = unescape((tmp_path / "p.html").read_text())
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', html)
    assert policy and "default-src 'none'" in policy[1] and policy[1].count("'sha256-") == 2
    assert "unsafe-inline'; script" in policy[1] and "eval" not in policy[1]


def test_alarms_are_told_with_their_steps_and_what_helps(run: Path) -> None:
    [row] = alarm_table(GRPO, title="t").rows
    assert row[:3] == ("no_crops: while few rollouts get a crop", "2", "2 to 3") and row[3]
    assert alarm_table(SFT, title="t").note == "None was on at any step."


def test_settings_that_differ_stand_first(tmp_path: Path) -> None:
    runs = read_runs([run_folder(tmp_path / "a", SFT, lr=1), run_folder(tmp_path / "b", SFT, lr=2)])
    differing, whole = value_tables("Settings", {run.name: run.settings for run in runs})
    assert differing.rows == (("ModelConfig.lr", "1", "2"),)
    assert [row[0] for row in whole.rows] == ["ModelConfig.model_name", "ModelConfig.lr"]
    assert "same in all" in value_tables("S", {"a": {"x": "1"}, "b": {"x": "1"}})[0].note


def test_a_run_without_settings_or_start_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n{"st')
    write_run_page(tmp_path / "p.html", [tmp_path / "run"])
    assert "The run folder does not say." in (tmp_path / "p.html").read_text()


def test_a_run_that_has_taken_no_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no step in its metrics\.jsonl"):
        write_run_page(tmp_path / "p.html", [tmp_path])


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart() -> None:
    assert short_names([Path("/a/x/grpo"), Path("/a/y/grpo")]) == ["x", "y"]
    assert short_names([Path("/a/x/grpo"), Path("/a/y/grpo"), Path("/a/y/sft")]) == ["x/grpo", "y/grpo", "y/sft"]
    assert short_names([Path("/a/grpo")]) == ["grpo"]
    assert short_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert short_names([Path("/a"), Path("/a")]) == ["1. /a", "2. /a"]
