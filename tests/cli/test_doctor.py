"""`looktwice doctor` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from looktwice.cli import main
from looktwice.doctor import environment, parity


def test_this_machine_is_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", str(tmp_path / "found.json"), "--output_dir", str(tmp_path)]) in (0, 1)
    told = capsys.readouterr().out
    assert "ok      looktwice" in told and "attention auto is sdpa" in told
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["findings"][0]["name"] == "looktwice" and "parity" not in found


def test_a_problem_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(environment, "REQUIRED", {"torch": "99"})
    assert main(["doctor"]) == 1
    assert "pip install 'torch>=99'" in capsys.readouterr().out


def test_a_broken_threshold_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "LARGEST_GAP", 0.0)
    monkeypatch.setattr(parity, "find_spec", lambda name: None)
    words = ["doctor", "--parity", "tiny", "--device", "cpu", "--json", str(tmp_path / "found.json")]
    assert main(words) == 1
    told = capsys.readouterr().out
    assert "built-in engine, text: more than rounding in torch.float32" in told
    gaps = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["parity"]["gaps"]
    assert {gap["way"] for gap in gaps if not gap["is_kept"]} == {"built-in engine"}


def test_the_commands_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("looktwice doctor")]
    assert commands == [["doctor"], ["doctor", "--parity", "tiny"]]
    assert {main(command) for command in commands} <= {0, 1}
    assert "TRL's collator" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["--bf16"], "without --parity MODEL"), (["--parity", "./none"], "no such model folder")],
)
def test_bad_usage_is_told_at_once(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 1
    assert problem in capsys.readouterr().err
