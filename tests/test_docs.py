"""Every example of docs/data.md is read, and every command and table row in it does what it says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from looktwice.cli import main
from looktwice.data.near_calls import near_calls
from looktwice.data.sample import text_of
from looktwice.formats.catalogue import FORMATS
from looktwice.formats.sample_file import SampleFile, read_samples

TEXT = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
FILES = {name: (kind, rows) for name, kind, rows in re.findall(r"```jsonl (\S+) (\S+)\n(.*?)```", TEXT, re.DOTALL)}
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if "convert" in line
]


def table(title: str) -> list[tuple[str, str]]:
    """The rows of the table with this first heading, both cells without their quotes."""
    body = TEXT[TEXT.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    return [tuple(re.findall(r"`(.*?)` \|", line)) for line in body]  # type: ignore[misc]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, (_, rows) in FILES.items():
        (tmp_path / name).write_text(rows, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_an_example_of_every_format() -> None:
    assert {kind for kind, _ in FILES.values()} == set(FORMATS)


@pytest.mark.parametrize("name", FILES)
def test_each_example_is_recognised_and_read(name: str, folder: Path) -> None:
    kind, rows = FILES[name]
    assert SampleFile(name, "").format.name == kind
    samples = read_samples(name, "")
    assert len(samples) >= len(rows.splitlines())
    messages = [message for sample in samples for message in sample.conversation.messages]
    assert not any(near_calls(text_of(message)) for message in messages if message.role == "assistant")


@pytest.mark.parametrize(("written", "response"), table("Written in the answer"))
def test_each_crop_command_becomes_what_the_table_says(written: str, response: str, tmp_path: Path) -> None:
    row = {"image_path": "a.png", "QnA": [{"Q": "Q", "A3": written}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    assert read_samples(tmp_path / "d.jsonl", "")[0].response == response


@pytest.mark.parametrize(("written", "text"), table("Written in a turn"))
def test_each_escaped_placeholder_becomes_what_the_table_says(written: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": written}]}))
    assert read_samples(tmp_path / "d.jsonl", "")[0].question == text


def test_the_commands_work_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        words = shlex.split(command)
        assert main(words[1:]) == 0, capsys.readouterr().err
        assert Path(words[4]).exists()
    assert len(COMMANDS) == 4


LOOKS = [line for line in TEXT.splitlines() if line.startswith(("looktwice data show ", "looktwice data stats "))]


@pytest.mark.parametrize("command", LOOKS, ids=lambda command: " ".join(command.split()[2:5]))
def test_the_commands_that_look_at_data_run(command: str, folder: Path) -> None:
    (folder / "images" / "coco").mkdir(parents=True)
    Image.new("RGB", (120, 90), "red").save(folder / "images" / "coco" / "cups.jpg")
    words = shlex.split(command)[1:]
    assert main([*words, "--model_name", "tiny"]) == 0
    pages = [word for word in words if word.endswith(".html")]
    assert all((folder / page).stat().st_size > 1000 for page in pages)


def test_the_python_example_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images" / "coco").mkdir(parents=True)
    Image.new("RGB", (120, 90), "red").save(folder / "images" / "coco" / "cups.jpg")
    [example] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(example, {})
    where, *question, length, trained = capsys.readouterr().out.split()
    assert (where, " ".join(question)) == ("cups.jsonl:1", "How many cups are there?")
    assert int(length) > int(trained) > 0
