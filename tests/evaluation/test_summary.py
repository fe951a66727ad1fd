"""What is told of a benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.evaluation.lines import line, write

from looktwice.evaluation.result import Result
from looktwice.evaluation.summary import NEEDED, Summary, summary_of
from looktwice.report.evaluation_tables import finding, summary_tables

NUM = 30


def summary(path: Path, **right: int) -> Summary:
    """A result in which so many of 30 questions are right under each condition."""
    lines = [
        line(f"{number + 1}", condition, float(number < count))
        for condition, count in right.items()
        for number in range(NUM)
    ]
    found = summary_of(Result([write(path / "a.jsonl", *lines)]), "vstar")
    assert found is not None
    return found


def test_crops_help_only_where_they_beat_all_four_controls(tmp_path: Path) -> None:
    controls = dict.fromkeys(NEEDED, 10)
    helped = summary(tmp_path, crops=25, **controls)
    assert helped.helps is True
    assert finding(helped) == (
        "V*Bench: crops help (+50.0 over grey, +50.0 over another place, +50.0 over no crop, "
        "+50.0 over more pixels of equal tokens; all intervals above 0)."
    )
    for name in NEEDED:
        assert summary(tmp_path, crops=25, **{**controls, name: 24}).helps is False
    unsure = summary(tmp_path, crops=25, **{**controls, "more_pixels": 24})
    assert finding(unsure) == "V*Bench: not shown that crops help: no sure gain over more pixels of equal tokens."
    unknown = summary(tmp_path, crops=25, no_crop=0)
    assert unknown.helps is None and "blank_crop, random_crop, more_pixels" in finding(unknown)
    assert "crops help" in finding(unknown) and "not known" in finding(unknown)


def test_gain_and_harm_are_of_the_same_questions(tmp_path: Path) -> None:
    lines = [line(f"{n}", "crops", float(n in (1, 2))) for n in range(1, 6)]
    lines += [line(f"{n}", "no_crop", float(n in (2, 3, 4))) for n in range(1, 5)]
    found = summary_of(Result([write(tmp_path / "a.jsonl", *lines)]), "vstar")
    assert (found.tool.gain, found.tool.harm, found.tool.rate) == (0.25, 0.5, 1.0)
    gap = found.conditions["no_crop"].gap
    assert (gap.mean, gap.num_better, gap.num_worse, gap.num_units) == (-0.25, 1, 2, 4)


def test_hard_and_easy_are_by_five_answers_in_text_and_what_is_between_is_dropped(tmp_path: Path) -> None:
    rights = {"1": 0, "2": 1, "3": 3, "4": 4, "5": 5}
    lines = [
        line(name, "text_only", float(sample < count), sample=sample)
        for name, count in rights.items()
        for sample in range(5)
    ]
    calls = {"1": True, "2": False, "3": True, "4": True, "5": False}
    lines += [line(name, "crops", 1.0, **({} if called else {"crops": []})) for name, called in calls.items()]
    tool = summary_of(Result([write(tmp_path / "a.jsonl", *lines)]), "vstar").tool
    assert (tool.on_hard, tool.num_hard, tool.on_easy, tool.num_easy, tool.samples) == (0.5, 2, 0.5, 2, 5)


def test_variants_of_a_question_count_once_and_samples_have_a_spread(tmp_path: Path) -> None:
    lines = [line("1", "crops", 1.0, group="q"), line("2", "crops", 0.0, group="q"), line("3", "crops", 1.0, group="r")]
    lines += [{**one, "sample": 1, "score": 1.0} for one in lines]
    found = summary_of(Result([write(tmp_path / "a.jsonl", *lines)]), "vstar").conditions["crops"]
    assert (found.score.mean, found.score.num_units) == (pytest.approx((0.75 + 1) / 2), 2)
    assert found.spread == pytest.approx(((0.75 - 0.875) ** 2 * 2) ** 0.5)


def test_what_nobody_decided_is_left_out_and_told(tmp_path: Path) -> None:
    lines = [line("1", "crops", 1.0), line("2", "crops", None, by="undecided"), line("3", "crops", 0.0, by="none")]
    path = write(tmp_path / "a.jsonl", *lines, {**line("4", "crops", 0.0), "error": "no picture"})
    found = summary_of(Result([path]), "vstar")
    crops = found.conditions["crops"]
    assert (crops.score.mean, crops.score.num_units, crops.num_undecided, crops.num_without_answer) == (0.5, 2, 1, 1)
    [table, *_, failed] = summary_tables(found)
    assert "1 answer undecided by the judge, and left out" in table.note
    assert failed.rows == (("vstar 4 crops: no picture",),)


def test_categories_stand_beside_the_whole(tmp_path: Path) -> None:
    lines = [line(f"{n}", "crops", float(n > 2), category="ab"[n % 2]) for n in range(1, 5)]
    found = summary_of(Result([write(tmp_path / "a.jsonl", *lines)]), "vstar")
    assert {name: one.mean for name, one in found.categories.items()} == {"a": 0.5, "b": 0.5}


def test_a_result_without_an_answer_with_crops_has_no_summary(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", line("1", "no_crop", 1.0))
    assert summary_of(Result([path]), "vstar") is None
