"""Evaluations in words: cells, and sentences that claim no more than the numbers."""

from __future__ import annotations

from pathlib import Path

from tests.evaluation.lines import line, write

from looktwice.evaluation.result import Result
from looktwice.evaluation.summary import summary_of
from looktwice.report.evaluation_tables import p_value, summary_tables


def test_the_table_of_conditions_has_each_score_beside_what_crops_gain(tmp_path: Path) -> None:
    lines = [line(f"{n}", "crops", 1.0) for n in range(1, 21)]
    lines += [line(f"{n}", "no_crop", float(n > 15), stop_reason="max_tokens") for n in range(1, 21)]
    [table, tool] = summary_tables(summary_of(Result([write(tmp_path / "a.jsonl", *lines)]), "vstar"))
    crops, without = (dict(zip(table.header, row)) for row in table.rows)
    assert table.rows[0][:6] == ("with crops", "100.0", "83.9 to 100.0", "", "", "")
    assert (crops["calls"], crops["valid"], crops["cut off"], crops["tokens"]) == ("1.00", "100.0", "0.0", "39.0")
    assert table.rows[1][1] == "25.0" and table.rows[1][3] == "+75.0" and table.rows[1][5] == "< 0.0001"
    assert (without["calls"], without["valid"], without["cut off"]) == ("0.00", "", "100.0")
    assert ("gain: wrong without crops, right with them", "75.0") in tool.rows
    assert any("best IoU" in name and value == "100.0" for name, value in tool.rows)


def test_hard_and_easy_are_told_with_how_many_answers_said_so(tmp_path: Path) -> None:
    lines = [line("1", "crops", 1.0), line("2", "crops", 1.0, crops=[])]
    lines += [line("1", "text_only", 0.0), line("2", "text_only", 1.0)]
    *_, tool = summary_tables(summary_of(Result([write(tmp_path / "a.jsonl", *lines)]), "vstar"))
    assert ("calls, of 1 answer to what is hard in text alone", "100.0") in tool.rows
    assert ("no call, of 1 answer to what is easy in text alone", "100.0") in tool.rows
    assert tool.note == "Hard and easy by 1 answer to each question."


def test_a_p_value_is_never_written_as_0() -> None:
    assert (p_value(0.00001), p_value(0.04), p_value(1.0)) == ("< 0.0001", "0.0400", "1.0000")
