"""The tables of `data stats`, from literal measures."""

from __future__ import annotations

from looktwice.checking.statistics import Measures, Statistics
from looktwice.config import StatsConfig
from looktwice.geometry import Size
from looktwice.report.tables import statistics_tables


def measures(num_tokens: int, *crops: int) -> Measures:
    return Measures(
        num_text_tokens=num_tokens - 20,
        num_visual_tokens=20,
        num_trained_tokens=num_tokens // 4,
        num_turns=2 * len(crops),
        crops_per_answer=crops,
        image_sizes=(Size(num_tokens, 480),),
    )


def test_the_spread_of_each_quantity_and_its_sum_are_listed() -> None:
    statistics = Statistics(num_rows=2, measures=[measures(100, 0, 2), measures(1000, 1)])
    rows = {name: cells for name, *cells in statistics_tables(statistics, StatsConfig())[0].rows}
    assert rows["turns"] == ["2", "2", "4", "4", "4", "6"]
    assert rows["crops of an answer"] == ["0", "1", "2", "2", "2", "3"]
    assert rows["picture width"] == ["100", "100", "1,000", "1,000", "1,000", ""]
    assert rows["length in tokens"] == ["100", "100", "1,000", "1,000", "1,000", "1,100"]
    assert rows["trained tokens"][-1] == "275"


def test_the_whole_set_says_what_is_too_long_and_what_packing_saves() -> None:
    statistics = Statistics(num_rows=4, num_whole_rows=3, measures=[measures(length, 0) for length in (100, 300, 5000)])
    config = StatsConfig(max_length=1000, train_batch_size=2, max_tokens_per_row=800)
    rows = dict(statistics_tables(statistics, config)[1].rows)
    assert rows["rows measured"] == "3" and rows["samples"] == "3"
    assert rows["longer than max_length 1,000"] == "1 (33.3 %)"
    assert rows["padded batches of 2"] == "600 tokens"
    assert rows["packed rows of at most 800"] == "400 tokens in 1 row, 50.0 % full"
    assert rows["padding saved by packing"] == "33.3 %"
    assert rows["trained share of the tokens"] == "25.0 %"


def test_what_was_not_measured_has_a_table_of_its_own() -> None:
    statistics = Statistics(num_rows=2, measures=[measures(100, 1)])
    assert len(statistics_tables(statistics, StatsConfig())) == 2
    statistics.unmeasured.add("a row that cannot be read", "a.jsonl:1")
    assert statistics_tables(statistics, StatsConfig())[2].rows == (("1 x a row that cannot be read (a.jsonl:1)",),)


def test_a_set_without_any_measure_has_no_figures() -> None:
    statistics = Statistics(num_rows=1)
    statistics.unmeasured.add("a row that cannot be read", "a.jsonl:1")
    assert [table.title for table in statistics_tables(statistics, StatsConfig())] == ["Not measured"]
