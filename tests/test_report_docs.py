"""Every command of docs/reports.md, on small runs and results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from tests.report.test_evaluation_page import answer, write_own
from tests.report.test_run_page import GRPO, SFT, run_folder
from tests.report.test_trajectory_page import rollout_of, write_step

from looktwice.cli import main
from looktwice.processing.processor import Ovis2_5Processor

PAGE = (Path(__file__).parents[1] / "docs" / "reports.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^looktwice (report .+)$", PAGE, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, processor: Ovis2_5Processor, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> Path:
    image.save(tmp_path / "a.png")
    run_folder(tmp_path / "demo" / "sft", SFT, stage="sft")
    run_folder(tmp_path / "demo" / "grpo", GRPO)
    write_step(tmp_path / "demo" / "grpo", 2, rollout_of(processor, tmp_path / "a.png"))
    for name in ("sft", "grpo"):
        write_own(tmp_path / f"{name}.jsonl", [answer("1", 1.0), answer("2", 0.0)], tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_its_commands() -> None:
    assert len(COMMANDS) == 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_writes_what_it_names(command: str, folder: Path) -> None:
    *words, name = command.split()
    assert main([*words, name]) == 0
    html = (folder / name).read_text()
    assert html.startswith("<!doctype html>") and 5_000 < len(html) < 20_000_000
