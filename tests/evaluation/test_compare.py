"""Two results against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.evaluation.lines import RECIPE, line, write

from looktwice.errors import DataError
from looktwice.evaluation.compare import compare
from looktwice.evaluation.result import read_result
from looktwice.report.evaluation_tables import comparison_tables, verdict_of


def test_the_same_questions_are_compared_and_the_changed_ones_named(tmp_path: Path) -> None:
    ours = [line(f"{n}", "crops", float(n <= 2), category="ab"[n > 3]) for n in range(1, 7)]
    theirs = [line(f"{n}", "crops", float(n in (1, 3, 4, 5)), category="ab"[n > 3]) for n in range(1, 6)]
    first, second = write(tmp_path / "a.jsonl", *ours), write(tmp_path / "b.jsonl", *theirs)
    found = compare(read_result(first), read_result(second))
    [part] = found.parts
    assert (part.first, part.second, part.gap.mean) == pytest.approx((0.4, 0.8, 0.4))
    assert part.num_unpaired == 1
    assert (part.gap.num_better, part.gap.num_worse, part.gap.p_value) == (3, 1, pytest.approx(0.625))
    assert {name: gap.mean for name, gap in part.categories.items()} == pytest.approx({"a": 0.0, "b": 1.0})
    assert found.recipes == []
    assert verdict_of(found, "a", "b") == ["vstar crops: no sure difference (+40.0, p 0.6250)."]


def test_a_sure_difference_names_the_better_one(tmp_path: Path) -> None:
    ours = [line(f"{n}", "crops", 1.0) for n in range(1, 11)]
    theirs = [line(f"{n}", "crops", float(n > 8)) for n in range(1, 11)]
    paths = write(tmp_path / "a.jsonl", *ours), write(tmp_path / "b.jsonl", *theirs)
    found = compare(*map(read_result, paths))
    assert verdict_of(found, "sft", "rl") == ["vstar crops: sft is better (-80.0, p 0.0078)."]


def test_other_recipes_than_the_models_are_told(tmp_path: Path) -> None:
    model = {**RECIPE["model"], "name": "other", "fingerprint": "g"}
    first = write(tmp_path / "a.jsonl", line("1", "crops", 1.0))
    second = write(tmp_path / "b.jsonl", line("1", "crops", 1.0), model=model, pixels={"image_max_pixels": 200})
    found = compare(read_result(first), read_result(second))
    assert found.recipes == ["pixels.image_max_pixels: 100 there, 200 here"]
    assert "recipes differ" in comparison_tables(found, "a", "b")[-1].title


def test_other_questions_are_not_compared(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", line("1", "crops", 1.0))
    other = write(tmp_path / "b.jsonl", line("2", "crops", 1.0))
    with pytest.raises(DataError, match="share no question"):
        compare(read_result(first), read_result(other))
    other = write(tmp_path / "b.jsonl", line("1", "crops", 1.0, about="Another"))
    with pytest.raises(DataError, match="question 1 of vstar is another one in each"):
        compare(read_result(first), read_result(other))


def test_what_is_no_result_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such result"):
        read_result(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no question was answered"):
        read_result(write(tmp_path / "a.jsonl"))
