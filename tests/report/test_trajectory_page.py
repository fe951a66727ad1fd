"""The page of rollouts: what of a trajectory is put into it, and what has no room."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard
from PIL import Image

from looktwice.errors import DataError
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.report import trajectory_page
from looktwice.report.trajectory_page import level_of, step_files, write_trajectory_page

HOSTILE = "</script><img src=x onerror=alert(1)>"
SAID = "Look. <tool_call>[8, 8, 40, 40]</tool_call>"


def rollout_of(processor: Ovis2_5Processor, image: Path, group: int = 0, **other: Any) -> dict[str, Any]:
    """The line of a rollout that crops once, is refused once, and answers."""
    config, encode = processor.config, lambda text: processor.tokenizer.encode(text, add_special_tokens=False)
    before, refusal = encode(SAID), encode(" no box ")
    after = encode(f"It says 3.</think><answer>3 {HOSTILE}</answer>")
    crop = [config.image_start_token_id, config.image_token_id, config.image_end_token_id]
    counts = [len(before), len(crop) + len(refusal), len(after)]
    sampled = counts[0] + counts[2]
    return {
        "where": f"{HOSTILE}.jsonl:1", "field": "Q", "group": group, "seed": 1, "version": 0, "images": [str(image)],
        "question": f"Which? {HOSTILE}", "solution": "3", "gold_box": [8.0, 8.0, 40.0, 40.0], "more_gold_boxes": [],
        "text": f"{SAID} no box It says 3.<answer>3</answer>",
        "calls": [
            {"requested": [8, 8, 40, 40], "box": [8, 8, 40, 40], "size": [48, 48], "error": None, "image_number": 1},
            {"requested": None, "box": None, "size": None, "error": "no_box", "image_number": 1},
        ],
        "stop_reason": "answered", "error": None, "reward": 1.25, "parts": {"accuracy": 1.0, "format": 0.25},
        "raw": {}, "reward_error": None, "advantage": -0.5, "num_turns": 2, "num_visual_tokens": 3,
        "image_sizes": [[160, 120]], "prompt_ids": [1], "completion_ids": [*before, *crop, *refusal, *after],
        "sampled": counts, "sampling_logprobs": [math.log(0.5)] * sampled,
        "trainer_logprobs": [[math.log(0.5) + 0.01] * sampled], **other,
    }  # fmt: skip


def write_step(run: Path, step: int, *lines: dict[str, Any]) -> Path:
    folder = run / "trajectories"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step}.jsonl.zst"
    path.write_bytes(zstandard.compress("".join(f"{json.dumps(line)}\n" for line in lines).encode()))
    return path


def data_in(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), flags=re.S)
    assert found
    return json.loads(found[1])


@pytest.fixture
def image_path(tmp_path: Path, image: Image.Image) -> Path:
    image.save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def run(tmp_path: Path, processor: Ovis2_5Processor, model_folder: Path, image_path: Path) -> Path:
    folder = tmp_path / "grpo"
    folder.mkdir()
    (folder / "final_model").symlink_to(model_folder)
    wrong = {"text": "<answer>4</answer>", "reward": None, "reward_error": f"ValueError: {HOSTILE}", "parts": {}}
    left_out = {"trainer_logprobs": []}
    lines = [rollout_of(processor, image_path, group) for group in (0, 0, 1)]
    write_step(folder, 3, lines[0], {**lines[1], **wrong, **left_out}, lines[2])
    write_step(folder, 12, rollout_of(processor, image_path))
    return folder


@pytest.fixture
def data(run: Path, tmp_path: Path) -> dict[str, Any]:
    write_trajectory_page(tmp_path / "p.html", [run / "trajectories"])
    return data_in(tmp_path / "p.html")


def test_groups_stand_by_their_steps_the_last_first(data: dict[str, Any]) -> None:
    assert [(group["step"], group["group"], len(group["rollouts"])) for group in data["groups"]] == [
        (12, 0, 1), (3, 0, 2), (3, 1, 1)
    ]  # fmt: skip
    assert data["terms"] == ["accuracy", "format"]


def test_text_is_told_by_who_wrote_it_with_crops_in_their_places(data: dict[str, Any]) -> None:
    said, crop, put, rest = data["groups"][0]["rollouts"][0]["text"]
    assert "".join(said["said"]) == SAID
    assert crop == {"crop": True}
    assert put == {"put": " no box "}
    assert "".join(rest["said"]) == f"It says 3.</think><answer>3 {HOSTILE}</answer>"
    assert len(said["said"]) == len(said["sure"]) == len(said["gap"])


def test_each_token_has_its_probability_and_the_level_of_its_gap(data: dict[str, Any]) -> None:
    said = data["groups"][0]["rollouts"][0]["text"][0]
    assert {*said["sure"]} == {50}
    assert {*said["gap"]} == {str(level_of(0.01))}
    assert data["groups"][0]["rollouts"][0]["gap"] == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(("gap", "level"), [(0, 0), (9e-7, 0), (1e-6, 1), (1e-3, 5), (1.0, 9), (40.0, 9)])
def test_levels_are_logarithmic(gap: float, level: int) -> None:
    assert level_of(gap) == level


def test_a_rollout_left_out_of_training_has_no_gap_and_a_failed_reward_its_error(data: dict[str, Any]) -> None:
    first, second = data["groups"][1]["rollouts"]
    assert (second["gap"], second["text"][0]["gap"]) == (None, "")
    assert (second["reward"], second["failed"]) == (None, f"ValueError: {HOSTILE}")
    assert (first["right"], first["answer"], first["advantage"]) == (True, "3", -0.5)
    assert (second["right"], second["answer"]) == (False, "4")


def test_siblings_share_their_picture_and_equal_crops(data: dict[str, Any]) -> None:
    assert len(data["images"]) == 2
    assert all(group["images"] == [0] for group in data["groups"])
    call, refused = data["groups"][0]["rollouts"][0]["calls"]
    assert call["crop"] == 1 and refused["error"] == "no_box" and "crop" not in refused


def test_what_a_model_said_never_becomes_markup(run: Path, tmp_path: Path) -> None:
    write_trajectory_page(tmp_path / "p.html", [run / "trajectories"])
    html = (tmp_path / "p.html").read_text()
    assert HOSTILE not in html and "<img" not in html
    assert html.count("</script>") == html.count("<script")


def test_a_run_without_a_tokenizer_shows_the_text_as_it_was_written(
    tmp_path: Path, processor: Ovis2_5Processor, image_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    write_step(tmp_path / "bare", 1, rollout_of(processor, image_path))
    write_trajectory_page(tmp_path / "p.html", [tmp_path / "bare" / "trajectories"])
    data = data_in(tmp_path / "p.html")
    assert data["groups"][0]["rollouts"][0]["text"] == [{"said": [f"{SAID} no box It says 3.<answer>3</answer>"]}]
    assert not data["hasTokens"] and "no model whose tokenizer" in (tmp_path / "p.html").read_text()


def test_pictures_that_have_gone_leave_their_rollouts(run: Path, tmp_path: Path, image_path: Path) -> None:
    image_path.unlink()
    write_trajectory_page(tmp_path / "p.html", [run / "trajectories"])
    data = data_in(tmp_path / "p.html")
    assert data["images"] == [] and data["groups"][0]["images"] == [None]


def test_rollouts_without_room_are_left_out_and_counted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory_page, "TEXT_BYTES", 1)
    with pytest.raises(DataError, match="no room"):
        write_trajectory_page(tmp_path / "p.html", [run / "trajectories"])
    monkeypatch.setattr(trajectory_page, "TEXT_BYTES", 3000)
    write_trajectory_page(tmp_path / "p.html", [run / "trajectories"])
    assert len(data_in(tmp_path / "p.html")["groups"]) == 1
    assert "3 rollouts of the earliest steps left out" in (tmp_path / "p.html").read_text()


def test_steps_are_named_one_by_one_or_as_a_folder(run: Path, tmp_path: Path) -> None:
    folder = run / "trajectories"
    assert [*step_files([folder])] == [12, 3]
    assert [*step_files([folder / "step-3.jsonl.zst"])] == [3]
    with pytest.raises(DataError, match="no step-N"):
        step_files([tmp_path])
    other = tmp_path / "other"
    other.mkdir()
    write_step(other, 3)
    with pytest.raises(DataError, match="of one step of two runs"):
        step_files([folder, other / "trajectories"])


def test_levels_fit_what_the_page_says_of_them() -> None:
    """The script gives a level back as 1e-6 * 10 ** (0.75 * (level - 1))."""
    for level in range(1, 10):
        assert level_of(1e-6 * 10 ** (0.75 * (level - 1)) * 1.001) == level
