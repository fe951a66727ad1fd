"""`looktwice report`: which page belongs to what is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from looktwice.cli import main
from looktwice.cli.report import kind_of_all, runs_in
from looktwice.errors import ConfigError


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    for stage in ("sft", "grpo"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    (tmp_path / "grpo" / "trajectories").mkdir()
    (tmp_path / "grpo" / "trajectories" / "step-1.jsonl.zst").touch()
    (tmp_path / "result.jsonl").write_text('{"recipe": {}, "start": {}}\n')
    return tmp_path


def test_what_is_named_says_which_page_it_is(demo: Path) -> None:
    assert kind_of_all([demo / "sft", demo / "grpo"]) == "run"
    assert kind_of_all([demo / "grpo" / "trajectories"]) == "rollouts"
    assert kind_of_all([demo / "grpo" / "trajectories" / "step-1.jsonl.zst"]) == "rollouts"
    assert kind_of_all([demo / "result.jsonl"]) == "evaluation"


def test_a_folder_of_runs_stands_for_the_runs_in_it(demo: Path) -> None:
    assert runs_in([demo]) == [demo / "grpo", demo / "sft"]
    assert runs_in([demo / "sft"]) == [demo / "sft"]


def test_what_belongs_on_two_pages_is_refused(demo: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft is a run and .*result\.jsonl is a result .*one kind"):
        kind_of_all([demo / "sft", demo / "result.jsonl"])


def test_the_page_of_a_demo_is_written(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = demo / "pages" / "p.html"
    assert main(["report", str(demo), "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"page: {page}\n"
    assert "<h2>SFT: grpo, sft</h2>" in page.read_text()


def test_a_page_is_never_written_over_what_is_read(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = demo / "result.jsonl"
    assert main(["report", str(path), "--out", str(path)]) == 1
    assert "a file that is read" in capsys.readouterr().err


def test_a_result_without_answers_is_told(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(demo / "result.jsonl"), "--out", str(demo / "p.html")]) == 1
    assert "no question was answered" in capsys.readouterr().err
