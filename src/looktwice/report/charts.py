"""Charts as plotly draws them: what is drawn, and in words what there is to see.

A figure is plotly's own JSON (https://plotly.com/javascript/reference/); colours and fonts come from the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from looktwice.geometry import Size

HEIGHT, LEGEND_LINE = 240, 19
MAX_BINS = 24
MAX_DOTS = 1000
SMALLEST_DOT, LARGEST_DOT = 6, 20


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart: `traces` and `layout` are those of a plotly figure, `summary` says in words what there is to see."""

    title: str
    summary: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)

    @property
    def height(self) -> int:
        """Pixels of the page."""
        return int(self.layout.get("height", HEIGHT))

    @property
    def figure(self) -> dict[str, Any]:
        return {"data": [*self.traces], "layout": {"height": self.height, **self.layout}}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart: a value at each of some steps."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


def histogram(values: Sequence[int], *, title: str, x_name: str, y_name: str) -> Chart:
    """How many values lie in each of about 24 equal bins, whose borders are round numbers."""
    counts = sorted(Counter(values).items())
    trace = {
        "type": "histogram",
        "histfunc": "sum",
        "x": [value for value, _ in counts],
        "y": [count for _, count in counts],
        "nbinsx": MAX_BINS,
        "name": y_name,
    }
    return Chart(title=title, summary=_summary(values, x_name, y_name), traces=[trace], layout=_axes(x_name, y_name))


def count_bars(values: Sequence[int], *, title: str, x_name: str, y_name: str) -> Chart:
    """How often each small number occurs."""
    counts = sorted(Counter(values).items())
    trace = {"type": "bar", "x": [value for value, _ in counts], "y": [count for _, count in counts], "name": y_name}
    return Chart(title=title, summary=_summary(values, x_name, y_name), traces=[trace], layout=_axes(x_name, y_name))


def size_dots(sizes: Sequence[Size], *, title: str) -> Chart:
    """Widths across and heights upwards, a larger dot for a more frequent size; the thousand most frequent sizes."""
    counts = Counter(sizes)
    [(most_frequent, most)] = counts.most_common(1)
    shown = counts.most_common(MAX_DOTS)
    widest = LARGEST_DOT - SMALLEST_DOT
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [size.width for size, _ in shown],
        "y": [size.height for size, _ in shown],
        "text": [f"{size.width} x {size.height}: {count:,}" for size, count in shown],
        "hoverinfo": "text",
        "marker": {
            "size": [round(SMALLEST_DOT + widest * (count / most) ** 0.5, 1) if most > 1 else 8 for _, count in shown],
            "opacity": 0.6,
        },
    }
    layout = _axes("width in pixels", "height in pixels")
    layout["xaxis"]["rangemode"] = "tozero"
    return Chart(
        title=title,
        summary=f"{len(sizes):,} pictures of {len(counts):,} sizes; {' x '.join(map(str, most_frequent))} most often",
        traces=[trace],
        layout=layout,
    )


def curves(
    lines: Sequence[Line],
    *,
    title: str,
    y_name: str,
    is_share: bool = False,
    is_log: bool = False,
    stacked: bool = False,
) -> Chart:
    """Metrics over the steps of a run: on an axis from 0 to 1 for shares, else on one that fits, or a logarithmic one.

    Stacked lines lie on each other, as what adds up to a whole does.
    """
    traces = [
        {
            "type": "scatter",
            "mode": "lines" if len(line.steps) > 1 else "markers",
            "name": line.name,
            "x": [*line.steps],
            "y": [*line.values],
            **({"stackgroup": "all", "line": {"width": 0.5}} if stacked else {}),
        }
        for line in lines
    ]
    layout = _axes("", y_name)
    layout |= {"hovermode": "x unified", "showlegend": len(lines) > 1, "height": HEIGHT}
    layout["xaxis"] = {"hoverformat": "d", "tickprefix": "step ", "showtickprefix": "first"}
    if len(lines) > 1:
        layout["height"] += LEGEND_LINE * len(lines)
        layout["margin"] = {"l": 46, "r": 10, "t": 8, "b": 28 + LEGEND_LINE * len(lines)}
    if is_share:
        layout["yaxis"] |= {"range": [-0.02, 1.02]}
    elif is_log:
        layout["yaxis"] |= {"type": "log", "rangemode": "normal"}
    told = "; ".join(_course(line) for line in lines if line.steps)
    return Chart(title=title, summary=told, traces=traces, layout=layout)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value on a chart of intervals, all three in the chart's unit."""

    name: str
    value: float
    low: float
    high: float


def intervals(series: Mapping[str, Sequence[Interval]], *, title: str, x_name: str) -> Chart:
    """Bars from the left, a row a name and a colour a series, with their intervals; the first name stands on top."""
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [one.name for one in of],
            "x": [round(one.value, 4) for one in of],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [round(one.high - one.value, 4) for one in of],
                "arrayminus": [round(one.value - one.low, 4) for one in of],
                "thickness": 1.5,
            },
        }
        for name, of in series.items()
    ]
    rows = len(dict.fromkeys(one.name for of in series.values() for one in of))
    layout: dict[str, Any] = {
        "barmode": "group",
        "height": 90 + rows * (14 + 16 * len(series)),
        "showlegend": len(series) > 1,
        "xaxis": {"title": {"text": x_name}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "automargin": True, "ticklabelstandoff": 6},
    }
    told = "; ".join(f"{name} {one.name} {one.value:.3g}" for name, of in series.items() for one in of)
    return Chart(title=title, summary=told, traces=traces, layout=layout)


def _course(line: Line) -> str:
    first, last = (f"{line.values[place]:.3g} at step {line.steps[place]}" for place in (0, -1))
    return f"{line.name} from {first} to {last}"


def _summary(values: Sequence[int], x_name: str, y_name: str) -> str:
    return f"{len(values):,} {y_name} of {min(values):,} to {max(values):,} {x_name}"


def _axes(x_name: str, y_name: str) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x_name}},
        "yaxis": {"title": {"text": y_name}, "rangemode": "tozero"},
        "bargap": 0.08,
    }
