"""`looktwice ask` as a person types it: several pictures, drawings, limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from looktwice.cli import main
from looktwice.rollout.episode import Episode


@pytest.fixture
def ask(model_folder: Path, image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image.save(tmp_path / "a.png")
    image.rotate(180).save(tmp_path / "b.png")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> int:
        return main(["ask", *words, "--model_path", str(model_folder), "--device", "cpu", "--max_new_tokens", "4"])

    return run


def test_several_images_come_before_the_question(ask, capsys) -> None:
    assert ask("a.png", "b.png", "What?", "--output_json", "x.json") == 0
    assert ask("--image_path", "a.png", "--image_path", "b.png", "--question", "What?", "--output_json", "y.json") == 0
    records = [json.loads(Path(name).read_text()) for name in ("x.json", "y.json")]
    assert records[0]["image_path"] == ["a.png", "b.png"]
    assert records[0]["tokens"]["prompt"] > 60
    assert [record.pop("seconds") is None for record in records] == [False, False] and records[0] == records[1]


def test_the_model_and_where_it_computes_are_said_aside(ask, model_folder, capsys) -> None:
    assert ask("a.png", "What?") == 0
    told = capsys.readouterr()
    assert told.err.startswith(f"{model_folder}: ") and told.err.endswith("M parameters, float32 on cpu\n")
    assert "parameters" not in told.out


def test_the_drawing_of_each_image_is_saved(ask) -> None:
    assert ask("a.png", "b.png", "What?", "--save", "drawn/x.png") == 0
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["x-2.png", "x.png"]
    assert Image.open("drawn/x.png").size == (160, 120)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a.png", "Q", "--save", "x.txt"], "--save x.txt: not the name of a picture; end it in .png or .jpg"),
        (["a.png", "Q", "--save", "a.png"], "--save a.png: a file that is read; give another path"),
        (["a.png", "Q", "--output_json", "a.png"], "--output_json a.png: a file that is read"),
        (["a.png", "Q", "--crops", "-1"], "max_crops (--crops) is '-1': input should be greater than or equal to 0"),
    ],
)
def test_what_would_fail_later_is_told_at_once(words, problem, ask, capsys) -> None:
    assert ask(*words) == 1
    assert problem in capsys.readouterr().err


def test_flags_reach_the_rules_of_the_answer(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Episode] = []
    begin = Episode.__init__

    def note(self, *arguments, **options) -> None:
        begin(self, *arguments, **options)
        seen.append(self)

    monkeypatch.setattr(Episode, "__init__", note)
    words = ["--no-thinking", "--crops", "9", "--thinking_budget", "7", "--system", "Short."]
    assert ask("a.png", "What?", *words) == 0
    rules, prompt = seen[0].rules, seen[0].processor.decode(seen[0].prompt.input_ids)
    assert (rules.thinking, rules.max_crops, rules.max_turns, rules.thinking_budget) == (False, 9, 11, 7)
    assert "system\nShort." in prompt and prompt.endswith("</think>\n\n")


def test_turns_that_are_given_hold_whatever_the_crops() -> None:
    from looktwice.config import AnswerConfig

    assert AnswerConfig(max_crops=9, max_turns=4).allowed_turns == 4
    assert AnswerConfig(max_crops=2).allowed_turns == AnswerConfig().allowed_turns == 6
