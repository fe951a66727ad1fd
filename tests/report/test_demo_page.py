"""The page of a demo, written from what its folder holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from looktwice.report.demo_page import demo_tables, example_of, read_curve, scores_of, write_demo_page
from looktwice.report.passages import Passage

KEYS = ("base", "sft", "grpo", "no_crop", "random_crop", "blank_crop", "gold_crop")
CROP = {"box": [8, 8, 24, 24], "requested": [8, 8, 24, 24], "size": [32, 32], "error": None}
REFUSED = {"box": None, "requested": None, "size": None, "error": "reversed"}


def reply(answer: str = "", *, is_right: bool = False, said: str = "", crops: tuple[dict[str, Any], ...] = ()) -> Any:
    return {
        "is_right": is_right,
        "response": f"<think>{said}</think><answer>{answer}</answer>" if answer else said,
        "parsed": {"answer_content": answer},
        "crops": list(crops),
        "stop_reason": "answered" if answer else "no_answer",
    }


def line(**replies: Any) -> dict[str, Any]:
    return {
        "image": "a.png",
        "seen": [16, 8],
        "question": "Which <b>digit</b>?",
        "solution": "3",
        "gold_box": [10.0, 8.0, 26.0, 24.0],
        "replies": {key: reply("4") for key in KEYS} | replies,
    }


LOOK = "look & see <tool_call>[8, 8, 24, 24]</tool_call> It says 3."
RIGHT = reply("3", is_right=True, said=LOOK, crops=(CROP,))
LINES = [line(grpo=RIGHT), line(grpo=RIGHT, base=reply()), line(sft=RIGHT), line(sft=RIGHT, grpo=RIGHT)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (80, 40), "blue").save(tmp_path / "a.png")
    summary = {
        "chance": 0.1,
        "seed": 7,
        "crop": {"valid_share": None, "mean_iou": 0.5, "calls_per_answer": 1.0},
        "seconds": {"data": 7.4, "total": 200.0},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "answers.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in LINES))
    for stage in ("sft", "grpo"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 2.0}\n{"step": 2}\n{"step": 3, "loss": 1.0}\n'
        )
    return tmp_path


@pytest.fixture
def html(folder: Path) -> str:
    return write_demo_page(folder).read_text(encoding="utf-8")


def test_the_page_is_whole_in_one_file_with_its_texts_escaped(html: str) -> None:
    assert "Which &lt;b&gt;digit&lt;/b&gt;?" in html and "look &amp; see" in html
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.S)  # plotly's code names its licence
    assert "://" not in own and "url(" not in own
    assert "prefers-color-scheme: dark" in html


def test_scores_have_their_counts_and_intervals_in_order() -> None:
    scores = scores_of(LINES, 0.1)
    assert [(score.kind, score.share) for score in scores] == [
        ("model", 0.0), ("model", 0.5), ("model", 0.75), *[("control", 0.0)] * 4, ("chance", 0.1)
    ]  # fmt: skip
    assert scores[0].counts == "0 right, 3 wrong, 1 without an answer"
    low, high = scores[1].interval or (0, 0)
    assert 0.14 < low < 0.16 and 0.84 < high < 0.86
    assert scores[-1].interval is None


def test_the_page_opens_with_a_bar_for_each_score(html: str) -> None:
    widths = re.findall(r'class="bar" style="width:([0-9.]+)%"', html)
    assert widths == ["0.00", "50.00", "75.00", "10.00", "0.00", "0.00", "0.00", "0.00"]
    assert html.count('class="interval"') == 7
    assert html.index('class="bar"') < html.index("<img")


def test_questions_stand_under_what_became_of_them_the_most_frequent_course_first(html: str) -> None:
    titles = re.findall(r'<h3 class="course">(.*?)</h3>', html)
    assert titles == [
        "pretrained not right, after SFT not right, after R-GRPO right: 2 of 4 questions",
        "pretrained not right, after SFT right, after R-GRPO not right: 1 of 4 questions",
        "pretrained not right, after SFT right, after R-GRPO right: 1 of 4 questions",
    ]
    assert html.count("<article") == 4


def test_an_example_has_the_replies_of_all_stages_and_their_boxes_on_the_picture(folder: Path) -> None:
    example = example_of(line(base=reply(said="I see."), grpo=RIGHT), folder)
    assert [(one.verdict, one.is_right) for one in example.replies] == [
        ("no answer", False), ("4 is wrong", False), ("3 is right", True)
    ]  # fmt: skip
    picture, seen = example.image
    assert [(mark.is_gold, mark.label) for mark in picture.marks] == [(True, ""), (False, "R-GRPO")]
    assert seen.caption == "as the model sees it: 16 x 8"
    before, crop, after = example.replies[2].parts
    assert (before, after) == (Passage("thinking", "look & see"), Passage("thinking", "It says 3."))
    assert crop.caption == "[8, 8, 24, 24], seen as 32 x 32"  # type: ignore[union-attr]


def test_a_refused_call_is_told_with_what_the_tool_said(folder: Path) -> None:
    said = "a <tool_call>[9, 9, 1, 1]</tool_call><tool_response>No.</tool_response> b"
    cut = reply(said=said, crops=(REFUSED,)) | {"stop_reason": "max_tokens"}
    of_base = example_of(line(base=cut), folder).replies[0]
    assert [part.kind for part in of_base.parts] == ["text", "call", "tool", "text"]  # type: ignore[union-attr]
    assert of_base.verdict == "no answer before the limit"


@pytest.mark.parametrize(
    ("stop_reason", "verdict"),
    [
        ("error", "ended by an error: OSError: gone"),
        ("no_room", "no answer: longer than the cache"),
        ("max_turns", "no answer before the limit"),
        ("no_answer", "no answer"),
    ],
)
def test_an_answer_that_never_came_is_told_by_what_ended_it(stop_reason, verdict, folder: Path) -> None:
    ended = reply(said="I see.") | {"stop_reason": stop_reason, "error": "OSError: gone"}
    assert example_of(line(base=ended), folder).replies[0].verdict == verdict


def test_the_alarms_of_the_run_stand_on_the_page_with_what_they_mean(folder: Path, html: str) -> None:
    assert "None was on at any step." in html
    log = folder / "grpo" / "metrics.jsonl"
    log.write_text("".join(f'{{"step": {n}, "alarm/no_crops": {n in (2, 3)}}}\n'.lower() for n in (1, 2, 3, 4)))
    assert "no_crops: while few rollouts get a crop" in write_demo_page(folder).read_text(encoding="utf-8")


def test_a_call_that_never_ran_is_told_too(folder: Path) -> None:
    of_base = example_of(line(base=reply(said="<tool_call>[9, 9, 19, 19]</tool_call>")), folder).replies[0]
    assert of_base.parts == (Passage("call", "[9, 9, 19, 19]"),)


def test_steps_without_the_metric_are_left_out_of_a_curve(folder: Path) -> None:
    chart = read_curve(folder, "sft", "loss", "SFT: loss", "nats")
    assert chart and chart.summary == "nats from 2 at step 1 to 1 at step 3"
    assert chart.traces[0]["x"] == [1, 3]
    assert read_curve(folder, "grpo", "reward/accuracy", "t", "share") is None


def test_seconds_stand_at_the_end(html: str) -> None:
    assert "<footer>Seconds: data 7, total 200.</footer>" in html


def test_the_terminal_gets_the_same_figures(folder: Path) -> None:
    accuracy, crops = demo_tables(folder)
    assert accuracy.rows[2] == ("after R-GRPO", "75.0 %", "30.1 % to 95.4 %")
    assert accuracy.rows[-1] == ("guessing", "10.0 %", "")
    assert crops.rows[1] == ("valid calls", "-")
