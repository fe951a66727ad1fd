"""The documentation as a site: it builds without a warning, and what it says of errors and commands holds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from looktwice import errors
from looktwice.cli import main
from looktwice.demo.task import DatasetFiles

ROOT = Path(__file__).parents[1]


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        tmp_path / "trees",
        "docs",
        tmp_path / "site",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "batch_generate" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")


def test_every_error_is_in_the_index() -> None:
    kinds = [
        kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__
    ]
    named = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert ["LooktwiceError", *named] == kinds


@pytest.mark.parametrize("page", ["quickstart", "questions"])
def test_the_commands_of_a_page_run_with_the_tiny_model(
    page: str, dataset: DatasetFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(dataset.train.parent)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", "")
    for command in "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines():
        *settings, verb = command.replace("AIDC-AI/Ovis2.5-9B", "tiny").partition("looktwice ")[::2]
        for name, value in (word.split("=") for word in "".join(settings).split()):
            monkeypatch.setenv(name, value)
        assert main(shlex.split(verb)) == 0, command
