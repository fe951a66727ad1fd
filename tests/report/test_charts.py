"""Charts: round borders, bars and dots where the numbers are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looktwice.geometry import Size
from looktwice.report.charts import HEIGHT, MAX_BINS, WIDTH, count_bars, curve, histogram, nice_step, size_dots

NAMES = {"title": "t", "x_name": "x", "y_name": "y"}


@pytest.mark.parametrize(("span", "step"), [(1, 1), (10, 1), (11, 2), (45, 5), (900, 100), (1001, 200), (5001, 1000)])
def test_steps_are_round_and_as_small_as_the_number_of_steps_allows(span: int, step: int) -> None:
    assert nice_step(span, 10) == step


def test_a_histogram_counts_each_value_in_its_bin() -> None:
    chart = histogram([100, 101, 109, 110, 320], **NAMES)
    assert [bar.tip for bar in chart.bars if bar.height] == ["100 to 109: 3", "110 to 119: 1", "320 to 329: 1"]
    tallest = chart.bars[0]
    assert tallest.height == HEIGHT and tallest.y == 0
    assert chart.bars[1].height == pytest.approx(HEIGHT / 3, abs=0.1)
    assert chart.x_ticks[0].label == "100"


@given(values=st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
def test_a_histogram_loses_no_value_and_stays_in_its_plot(values: list[int]) -> None:
    chart = histogram(values, **NAMES)
    assert len(chart.bars) <= MAX_BINS
    assert sum(int(bar.tip.rpartition(": ")[2]) for bar in chart.bars) == len(values)
    assert all(bar.x >= 0 and bar.x + bar.width <= WIDTH + 0.1 and bar.y >= 0 for bar in chart.bars)
    assert all(0 <= tick.at <= WIDTH + 0.1 for tick in chart.x_ticks)


def test_small_numbers_have_a_bar_each_and_large_ones_share_the_last() -> None:
    assert [bar.tip for bar in count_bars([0, 2, 2], **NAMES).bars] == ["0: 1", "1: 0", "2: 2"]
    chart = count_bars([3, 11, 40], **NAMES)
    assert len(chart.bars) == 12 and chart.bars[-1].tip == "11+: 2"


def test_sizes_are_dots_at_their_place_larger_where_frequent() -> None:
    chart = size_dots([Size(1000, 400)] * 4 + [Size(500, 200)], title="t")
    frequent, rare = chart.dots
    assert (frequent.x, frequent.y, frequent.tip) == (WIDTH, 0, "1000 x 400: 4")
    assert (rare.x, rare.y) == (WIDTH / 2, HEIGHT / 2)
    assert frequent.radius > rare.radius


def test_one_value_makes_a_chart_too() -> None:
    assert [bar.tip for bar in histogram([7], **NAMES).bars] == ["7: 1"]
    assert size_dots([Size(1, 1)], title="t").dots[0].x == WIDTH


def test_a_share_is_drawn_on_an_axis_from_0_to_1_over_its_steps() -> None:
    chart = curve([1, 50, 100], [0.25, 0.5, 1.0], title="t", y_name="share", is_share=True)
    assert [tick.label for tick in chart.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [(tick.at, tick.label) for tick in chart.x_ticks] == [(0, "0"), (150, "50"), (300, "100")]
    assert chart.line == ((3.0, 120.0), (150.0, 80.0), (300.0, 0.0))
    assert chart.x_name == "step"


def test_another_curve_begins_at_0_and_ends_at_a_round_number_above() -> None:
    chart = curve([10], [2.54], title="t", y_name="nats", is_share=False)
    assert [tick.label for tick in chart.y_ticks] == ["0", "1", "2", "3"]
    assert chart.line == ((300.0, 24.5),)


def test_a_chart_says_in_words_what_there_is_to_see() -> None:
    assert (
        histogram([100, 320], title="t", x_name="tokens", y_name="samples").summary == "2 samples of 100 to 320 tokens"
    )
    assert count_bars([0, 2, 2], title="t", x_name="crops", y_name="answers").summary == "3 answers of 0 to 2 crops"
    assert (
        size_dots([Size(4, 3), Size(4, 3), Size(1, 1)], title="t").summary == "3 pictures of 2 sizes; 4 x 3 most often"
    )
    assert curve([1, 9], [2.5, 0.5], title="t", y_name="nats", is_share=False).summary == (
        "nats from 2.5 at step 1 to 0.5 at step 9"
    )
