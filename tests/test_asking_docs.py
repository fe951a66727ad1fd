"""docs/asking.md: its commands run as they stand, and so do its Python lines, one after the other."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from looktwice.asking.answer import Answer, answer_of
from looktwice.cli import main
from looktwice.rollout.trajectory import Trajectory

TEXT = (Path(__file__).parents[1] / "docs" / "asking.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```\w+ (\S+)\n(.*?)```", TEXT, re.DOTALL))
[BLOCK] = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = BLOCK.splitlines()


@pytest.fixture
def folder(tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    image.save(tmp_path / "photo.jpg")
    image.rotate(180).save(tmp_path / "other.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[1:4]))
def test_each_command_does_what_the_page_says(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)[1:]
    if "<" in words:
        *words, _, name = words
        monkeypatch.setattr(sys, "stdin", io.StringIO((folder / name).read_text()))
    code = main([*words, "--device", "cpu", "--max_new_tokens", "4"])
    told = capsys.readouterr()
    assert code == (1 if "--batch" in words else 0), told.err
    assert told.err.startswith("tiny: ")
    for word in words:  # what it is to write
        if word.endswith((".png", ".json")) or word == "answers.jsonl":
            assert (folder / word).stat().st_size > 0
    if "--batch" in words:
        lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert [line["error"] is None for line in lines] == [True, True, False]
    if words[0] == "chat":
        assert len(json.loads((folder / "talk.json").read_text())["turns"]) == 2


def test_the_python_lines_run_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    told = capsys.readouterr().out.splitlines()
    assert "<ref>cup</ref><box>(0.100,0.100),(0.500,0.600)</box>" in told
    assert "(20.0, 10.0, 100.0, 60.0)" in told and told[-1].startswith("done ")
    assert (folder / "found.png").is_file()


def test_every_key_of_an_answer_is_in_the_table() -> None:
    rows = TEXT[TEXT.index("| Attribute | Key |") :].split("\n\n")[0].splitlines()[2:]
    attributes, keys = ({*re.findall(r"`(\w+)`", " ".join(row.split("|")[cell] for row in rows))} for cell in (1, 2))
    answer = answer_of(Trajectory(prompt_ids=[]))
    assert keys | {"stop_reason", "error"} == {*answer}
    assert all(hasattr(answer, name) for name in attributes - {"answer_content"})
    assert {*Answer.__dataclass_fields__} - {"parsed"} <= attributes
