"""`looktwice chat` from a pipe: questions, its own commands, and errors that do not end it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from looktwice.cli import main


@pytest.fixture
def chat(model_folder: Path, image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image.save(tmp_path / "a.png")
    image.rotate(180).save(tmp_path / "b.png")
    monkeypatch.chdir(tmp_path)

    def run(*lines: str, words: tuple[str, ...] = ("a.png",)) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main(["chat", str(model_folder), *words, "--device", "cpu", "--max_new_tokens", "3"])

    return run


def test_each_line_is_a_question_of_one_conversation(chat, capsys) -> None:
    assert chat("What is it?", "", "/image b.png", "And this?", "/save talk.json", "/quit", "Never asked") == 0
    told = json.loads(Path("talk.json").read_text())
    assert told["images"] == ["a.png", "b.png"]
    assert [turn["question"] for turn in told["turns"]] == ["What is it?", "And this?"]
    assert told["turns"][1]["tokens"]["prompt"] > told["turns"][0]["tokens"]["prompt"] + 30
    assert capsys.readouterr().out.count("answer: ") == 2


def test_reset_forgets_conversation_and_images(chat) -> None:
    assert chat("What is it?", "/save one.json", "/image b.png", "/reset", "What is it?", "/save two.json") == 0
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert (one["images"], two["images"], len(two["turns"])) == (["a.png"], [], 1)
    assert two["turns"][0]["tokens"]["prompt"] < one["turns"][0]["tokens"]["prompt"]


def test_a_line_that_fails_is_told_and_the_next_is_answered(chat, capsys) -> None:
    assert chat("/image none.png", "/imag b.png", "/save", "caf\udce9?", "What?") == 1
    told = capsys.readouterr()
    problems = [line for line in told.err.splitlines() if line.startswith("looktwice: ")]
    assert [problem.split(";")[0].split(".")[0] for problem in problems] == [
        "looktwice: none",
        "looktwice: no such command /imag",
        "looktwice: /save needs the name of a file: /save talk",
        r"looktwice: the question holds '\udce9', which is no letter of UTF-8",
    ]
    assert told.out.count("answer: ") == 1


def test_the_commands_are_told(chat, capsys) -> None:
    assert chat("/help", words=()) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "/image",
        "/reset",
        "/save",
        "/help",
        "/quit",
    ]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["tiny", "--model_path", "tiny"], "the model is given twice, with --model_path and without"),
        (["tiny", "none.png"], "none.png: no such picture or video"),
        (["./none"], "./none: no such model folder"),
    ],
)
def test_what_cannot_be_talked_with_is_told_at_once(words, problem, capsys) -> None:
    assert main(["chat", *words]) == 1
    assert problem in capsys.readouterr().err


def test_an_answer_can_be_stopped_and_the_talk_goes_on(chat, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    shown = iter([KeyboardInterrupt, None])

    def show(*_: object, **asked: object) -> None:
        if error := next(shown):
            raise error

    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("looktwice.cli.chat.show_answer", show)
    monkeypatch.setattr("looktwice.cli.chat._lines", lambda: iter(["What?", "And?"]))
    monkeypatch.setattr(io, "StringIO", Typed)
    assert chat() == 0
    assert capsys.readouterr().out == "\n(stopped; the question is forgotten)\n" and next(shown, "all") == "all"
