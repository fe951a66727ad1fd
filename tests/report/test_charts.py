"""Charts: plotly takes each figure, and what is drawn are the numbers."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as plotly
import pytest

from looktwice.geometry import Size
from looktwice.report.charts import (
    MAX_DOTS,
    Chart,
    Interval,
    Line,
    count_bars,
    curves,
    histogram,
    intervals,
    size_dots,
)

NAMES = {"title": "t", "x_name": "x", "y_name": "y"}
LINES = [Line(name="a", steps=(1, 9), values=(2.5, 0.5)), Line(name="b", steps=(2,), values=(0.1,))]
SCORES = {
    "m": [Interval(name="with crops", value=80.0, low=70.0, high=85.0), Interval(name="<b>", value=0, low=0, high=3)],
    "n": [Interval(name="with crops", value=50.0, low=40.0, high=60.0)],
}
CHARTS = {
    "histogram": histogram([100, 101, 320], **NAMES),
    "bars": count_bars([0, 2, 2], **NAMES),
    "dots": size_dots([Size(4, 3), Size(4, 3), Size(1, 1)], title="t"),
    "curves": curves(LINES, title="t", y_name="y", is_share=True),
    "log": curves(LINES, title="t", y_name="y", is_log=True),
    "stacked": curves(LINES, title="t", y_name="y", stacked=True),
    "intervals": intervals(SCORES, title="t", x_name="x"),
}


def only_trace(chart: Chart) -> Any:
    [trace] = chart.figure["data"]
    return trace


@pytest.mark.parametrize("name", CHARTS)
def test_plotly_knows_every_word_of_a_figure(name: str) -> None:
    plotly.Figure(CHARTS[name].figure)  # raises ValueError for a property that is none


def test_plotly_refuses_a_word_that_it_does_not_know() -> None:
    with pytest.raises(ValueError):
        plotly.Figure(Chart(title="t", summary="s", traces=[{"type": "bar", "colour": 1}]).figure)


def test_a_histogram_holds_each_value_once_with_its_count() -> None:
    trace = only_trace(histogram([100, 101, 100, 320], **NAMES))
    assert (trace["x"], trace["y"], trace["histfunc"]) == ([100, 101, 320], [2, 1, 1], "sum")


def test_bars_count_small_numbers() -> None:
    trace = only_trace(count_bars([3, 11, 3], **NAMES))
    assert (trace["x"], trace["y"]) == ([3, 11], [2, 1])


def test_sizes_are_dots_at_their_place_larger_where_frequent() -> None:
    trace = only_trace(size_dots([Size(1000, 400)] * 4 + [Size(500, 200)], title="t"))
    assert (trace["x"], trace["y"]) == ([1000, 500], [400, 200])
    assert trace["text"] == ["1000 x 400: 4", "500 x 200: 1"]
    assert trace["marker"]["size"][0] > trace["marker"]["size"][1]


def test_of_many_sizes_the_most_frequent_are_drawn() -> None:
    sizes = [Size(1, 1)] * 2 + [Size(width, 2) for width in range(MAX_DOTS)]
    trace = only_trace(size_dots(sizes, title="t"))
    assert len(trace["x"]) == MAX_DOTS and trace["x"][0] == 1


def test_curves_are_lines_over_their_steps_with_a_legend_where_there_are_several() -> None:
    chart = curves(LINES, title="t", y_name="y", is_share=True)
    assert [(trace["name"], trace["x"], trace["y"]) for trace in chart.traces] == [
        ("a", [1, 9], [2.5, 0.5]), ("b", [2], [0.1])
    ]  # fmt: skip
    assert [trace["mode"] for trace in chart.traces] == ["lines", "markers"]  # one point is no line
    assert chart.layout["showlegend"] and chart.layout["yaxis"]["range"][1] > 1
    assert not curves(LINES[:1], title="t", y_name="y").layout["showlegend"]
    assert chart.height > curves(LINES[:1], title="t", y_name="y").height


def test_intervals_stand_around_their_values_and_more_rows_make_a_chart_higher() -> None:
    chart = intervals(SCORES, title="t", x_name="x")
    error = chart.traces[0]["error_x"]
    assert (error["array"], error["arrayminus"]) == ([5.0, 3], [10.0, 0])
    assert chart.height > intervals({"n": SCORES["n"]}, title="t", x_name="x").height


def test_a_chart_says_in_words_what_there_is_to_see() -> None:
    assert CHARTS["histogram"].summary == "3 y of 100 to 320 x"
    assert CHARTS["dots"].summary == "3 pictures of 2 sizes; 4 x 3 most often"
    assert CHARTS["curves"].summary == "a from 2.5 at step 1 to 0.5 at step 9; b from 0.1 at step 2 to 0.1 at step 2"
    assert CHARTS["intervals"].summary == "m with crops 80; m <b> 0; n with crops 50"
