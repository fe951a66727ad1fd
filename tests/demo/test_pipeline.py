"""The demo from end to end, on a random model and a handful of questions: what it writes, not how well it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from looktwice.demo import pipeline
from looktwice.errors import ConfigError
from looktwice.report.demo_page import write_demo_page


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    sizes = {"NUM_TRAIN": 4, "NUM_RL": 4, "NUM_EVAL": 4, "SFT_EPOCHS": 1, "GRPO_STEPS": 1, "MAX_NEW_TOKENS": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "TINY", str(model_folder))
        for name, value in sizes.items():
            patch.setattr(pipeline, name, value)
        return folder, pipeline.run_demo(folder, seed=0)


def test_the_summary_has_every_figure(run: tuple[Path, dict[str, Any]]) -> None:
    _, summary = run
    assert summary["accuracy"].keys() == {"base", "sft", "grpo"}
    assert summary["controls"].keys() == {"no_crop", "random_crop", "blank_crop", "gold_crop"}
    assert summary["crop"].keys() == {"valid_share", "mean_iou", "calls_per_answer"}
    assert summary["n_eval"] == 4
    assert summary["seconds"]["total"] >= summary["seconds"]["sft"] > 0


def test_the_summary_is_written_as_it_is_returned(run: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = run
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == summary


def test_the_report_shows_the_questions(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    shown = (folder / "report.html").read_text(encoding="utf-8").count("<article")
    assert shown == 2  # a random model is never right: one course, two examples


def test_the_answers_of_all_models_and_controls_to_each_question_are_kept(run: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = run
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert (folder / line["image"]).is_file() and len(line["gold_box"]) == 4
        assert line["replies"].keys() == summary["accuracy"].keys() | summary["controls"].keys()
        assert line["replies"]["sft"].keys() >= {"is_right", "response", "crops", "stop_reason"}


def test_the_page_can_be_written_again_from_the_folder(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    before = (folder / "report.html").read_bytes()
    assert write_demo_page(folder).read_bytes() == before


def test_both_final_models_are_left_behind(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    assert all((folder / stage / "final_model" / "config.json").is_file() for stage in ("sft", "grpo"))


def test_a_demo_replaces_nothing_that_is_not_a_demos(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match="data: not written by a demo"):
        pipeline.run_demo(tmp_path)
    assert (tmp_path / "data").is_dir()
