"""Every command of the README is one the program accepts, and every file it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from looktwice.cli.train import train_configs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("looktwice train")
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[2:4]))
def test_train_commands_of_the_readme_parse(command: list[str]) -> None:
    stage, model, data, sft, grpo = train_configs(command[2:])
    assert stage in command


def test_the_readme_shows_both_stages() -> None:
    assert len(COMMANDS) == 2


def test_files_of_the_file_map_exist() -> None:
    rows = re.search(r"## File map\n(.*?)\nStart reading", README, re.DOTALL)
    assert rows is not None
    named = re.findall(r"`([^`<]+)`", "\n".join(line.split("|")[1] for line in rows[1].splitlines() if "|" in line))
    package = ROOT / "src" / "looktwice"
    missing = [name for name in named if name != "Where" and not ((ROOT / name).exists() or (package / name).exists())]
    assert missing == []


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) < 200
