"""Answers in the terminal: written as they come, or as lines when they are whole."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rich.console import Console

from looktwice.asking.answer import Crop, Seconds, answer_of
from looktwice.asking.events import Cropped, Done, Said, Thinking
from looktwice.geometry import Box, Size
from looktwice.report import live_answer
from looktwice.report.live_answer import LiveAnswer, cost_line, plain_lines, terminal_image
from looktwice.rollout.trajectory import ToolCall, Trajectory

CROP = Crop(
    text="",
    image_number=1,
    box=Box(1, 2, 30, 40),
    requested=None,
    size=None,
    error=None,
    source=Image.new("RGB", (60, 60), "red"),
)


def shown(*events) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    LiveAnswer(console).follow(events)
    return console.file.getvalue()


def done(**values) -> Done:
    return Done(answer_of(Trajectory(**{"prompt_ids": [], "stop_reason": "answered", **values})))


def test_each_part_stands_on_lines_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_answer, "terminal_image", lambda image: f"{image.width}x{image.height}")
    thinking = (Thinking("\nA"), Thinking(" cup."), Cropped(CROP), Thinking("\nRed."))
    written = shown(*thinking, Said("\n\n"), Said("red"), done())
    assert written == "thinking: A cup.\ncrop 1: [1, 2, 30, 40]\n29x38\nRed.\nanswer: red\n0 tokens\n"


def test_where_no_image_can_be_shown_its_box_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_answer, "terminal_image", lambda image: None)
    written = shown(Cropped(CROP), done(stop_reason="max_tokens"))
    assert written == "crop 1: [1, 2, 30, 40]\n(cut by --max_new_tokens)\n0 tokens\n"


def test_a_small_image_is_made_of_cells() -> None:
    pytest.importorskip("textual_image")
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    console.print(terminal_image(Image.new("RGB", (40, 20), "red")))
    assert len(console.file.getvalue().splitlines()) >= 3


def test_what_an_answer_took_is_said() -> None:
    answer = answer_of(Trajectory(prompt_ids=[], is_sampled=[True]), seconds=Seconds(first=0.1, total=1.26))
    assert cost_line(answer) == "1 token  1.3 s"


def test_an_answer_without_a_block_is_what_was_said() -> None:
    cut = done(text="<think>\nIt is", stop_reason="max_tokens").answer
    assert [*plain_lines(cut)] == ["thinking: It is\n", "answer: ", "(cut by --max_new_tokens)"]


def test_the_lines_of_a_whole_answer_say_which_image_a_crop_is_of() -> None:
    calls = [
        ToolCall(requested=None, box=Box(1, 2, 3, 4), size=Size(8, 8), error=None, image_number=2),
        ToolCall(requested=None, box=None, size=None, error="no_box"),
    ]
    lines = [*plain_lines(done(text="<answer>red</answer>", calls=calls).answer)]
    assert lines == ["crop 1: [1, 2, 3, 4] of picture 2", "crop 2: refused, no_box", "answer: red"]
