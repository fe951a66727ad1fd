"""The page of evaluations: what of a result is put into it, differences first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.evaluation.lines import RECIPE, line, write

from looktwice.errors import DataError
from looktwice.evaluation.result import read_result
from looktwice.report import evaluation_page
from looktwice.report.evaluation_page import all_items, bench_charts, summaries_of, write_evaluation_page

HOSTILE = "</script><img src=x onerror=alert(1)>"
SAID = f"<think>Look. <tool_call>[8, 8, 40, 40]</tool_call>It says {HOSTILE}.</think><answer>7</answer>"


def answer(id: str, score: float | None, condition: str = "crops", **other: Any) -> dict[str, Any]:
    """The line of an answer about the picture of the test's own set."""
    crop = {"image": 1, "box": [8, 8, 40, 40], "requested": [8, 8, 40, 40], "size": [48, 48], "error": None}
    own = {
        "bench": "jsonl",
        "where": f"{HOSTILE}:{id}",
        "about": "Digit?",
        "options": [],
        "gold": ["7"],
        "gold_boxes": [[8, 8, 40, 40]],
        "category": "a" if id < "3" else "b",
        "sizes": [[160, 120]],
        "prediction": "7" if score else HOSTILE,
        "response": SAID,
        "crops": [crop] if condition == "crops" else [],
    }
    return line(id, condition, score, **{**own, **other})


@pytest.fixture
def folder(tmp_path: Path, image: Image.Image) -> Path:
    """A set of three questions about one picture, and two results on it."""
    image.save(tmp_path / "a.png")
    row = {"image_path": "a.png", "QnA": [{"Q": "Digit?", "A3": "<answer>7</answer>", "answer": "7"}]}
    (tmp_path / "eval.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    scores = {"first": (1.0, 0.0, 0.0), "second": (1.0, 1.0, 0.0)}
    for name, of in scores.items():
        lines = [answer(f"{number}", score) for number, score in enumerate(of, 1)]
        if name == "second":
            lines += [answer(f"{number}", 0.0, "no_crop") for number in (1, 2, 3)]
        write_own(tmp_path / f"{name}.jsonl", lines, tmp_path)
    return tmp_path


def write_own(path: Path, lines: list[dict[str, Any]], folder: Path, model: str = "m") -> None:
    recipe = {"benches": {"jsonl": {"rows": 3}}, "model": {**RECIPE["model"], "name": model}}
    write(path, *lines, **recipe)
    start, *rest = path.read_text().splitlines()
    places = {"places": {"jsonl": [str(folder / "eval.jsonl")]}, "folders": {"jsonl": [str(folder)]}}
    path.write_text("\n".join([json.dumps({**json.loads(start), "start": places}), *rest, ""]))


def page_of(folder: Path, *names: str) -> tuple[str, dict[str, Any]]:
    path = folder / "page.html"
    write_evaluation_page(path, [folder / f"{name}.jsonl" for name in names])
    html = path.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.S)
    assert found
    return html, json.loads(found[1])


def test_questions_that_differ_stand_first_then_wrong_ones(folder: Path) -> None:
    html, data = page_of(folder, "first", "second")
    assert [(item["id"], item["spread"], item["mean"]) for item in data["items"]] == [
        ("2", 1.0, 0.5), ("3", 0.0, 0.0), ("1", 0.0, 1.0)
    ]  # fmt: skip
    assert html.index("second against first") < html.index("Score under each condition")
    assert data["names"] == ["first", "second"]


def test_an_item_has_its_picture_its_crops_and_what_each_result_said(folder: Path) -> None:
    _, data = page_of(folder, "first", "second")
    item = data["items"][0]
    assert len(data["images"]) == 2 and item["images"] == [0]  # three questions show one picture and one crop
    first, second, control = item["answers"]
    assert (first["right"], second["right"], control["condition"]) == (False, True, "no_crop")
    assert first["calls"][0]["crop"] == 1
    assert [kind for kind, _ in first["parts"]] == ["thinking", "call", "thinking", "answer"]
    assert control["text"] == SAID and "parts" not in control


def test_scores_have_their_intervals_by_condition_and_category(folder: Path) -> None:
    results = {"second": read_result(folder / "second.jsonl")}
    conditions, categories = bench_charts({name: summaries_of(of)["jsonl"] for name, of in results.items()})
    [trace] = conditions.traces
    assert trace["y"] == ["with crops", "no crop"] and trace["x"] == [66.6667, 0.0]
    assert trace["error_x"]["array"][0] > 0
    assert categories.traces[0]["y"] == ["a", "b"] and categories.traces[0]["x"] == [100.0, 0.0]


def test_one_result_alone_has_a_page_without_comparison(folder: Path) -> None:
    html, data = page_of(folder, "first")
    assert "against" not in re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert [item["id"] for item in data["items"]] == ["2", "3", "1"]


def test_what_a_model_said_never_becomes_markup(folder: Path) -> None:
    write_own(folder / "bad.jsonl", [answer("1", 0.0, category=HOSTILE), answer("2", 1.0)], folder, model=HOSTILE)
    html, _ = page_of(folder, "bad", "second")
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert HOSTILE not in own and "<img" not in own
    assert own.count("</script>") == own.count("<script")


def test_questions_whose_file_has_changed_stay_without_their_picture(folder: Path) -> None:
    (folder / "eval.jsonl").unlink()
    _, data = page_of(folder, "first")
    assert data["images"] == [] and data["items"][0]["images"] == [None]


def test_undecided_answers_count_for_nothing(folder: Path) -> None:
    write_own(folder / "open.jsonl", [answer("1", None), answer("2", 1.0)], folder)
    items = all_items({"open": read_result(folder / "open.jsonl")})
    assert [(item["mean"], item["answers"][0]["right"]) for item in items] == [(0.0, False), (1.0, True)]


def test_questions_without_room_are_left_out_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_page, "TEXT_BYTES", 2500)
    html, data = page_of(folder, "first", "second")
    assert [item["id"] for item in data["items"]] == ["2"]
    assert "2 more have no room on the page" in html


def test_results_of_other_questions_are_refused(folder: Path) -> None:
    write_own(folder / "other.jsonl", [answer("1", 1.0, about="Letter?")], folder)
    with pytest.raises(DataError, match="another one in each"):
        page_of(folder, "first", "other")
