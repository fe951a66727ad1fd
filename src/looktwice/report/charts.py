"""Small charts as plain geometry for SVG: bars, dots and lines in a plot of 300 x 160, y downwards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from looktwice.geometry import Size

WIDTH, HEIGHT = 300, 160
MAX_BINS = 24
MAX_BARS = 12
MAX_DOTS = 1000
WIDEST_BAR = 40.0
SMALLEST_DOT, LARGEST_DOT = 2.5, 9.0


class Tick(NamedTuple):
    """A label at a place on an axis."""

    at: float
    label: str


SHARE_TICKS = tuple(Tick(HEIGHT * (1 - share), f"{share:g}") for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    tip: str


class Dot(NamedTuple):
    x: float
    y: float
    radius: float
    tip: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plot with axes; `x_name` and `y_name` say what they count, `summary` what there is to see, in words."""

    title: str
    summary: str
    x_name: str
    y_name: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...] = ()
    dots: tuple[Dot, ...] = ()
    line: tuple[tuple[float, float], ...] = ()


def nice_step(span: float, max_steps: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that covers `span` in at most `max_steps` steps.

    Example: nice_step(900, 10) == 100
    """
    power = 10 ** max(0, math.floor(math.log10(max(1.0, span / max_steps))))
    return next(step * power for step in (1, 2, 5, 10) if span <= step * power * max_steps)


def histogram(values: Sequence[int], *, title: str, x_name: str, y_name: str) -> Chart:
    """How many values lie in each of at most 24 equal bins, whose borders are round numbers."""
    low, high = min(values), max(values)
    step = nice_step(high - low + 1, MAX_BINS - 1)
    first = low // step
    counts = Counter(value // step - first for value in values)
    num_bins = high // step - first + 1
    tips = [_span(first + number, step) for number in range(num_bins)]
    width, every = WIDTH / num_bins, math.ceil(num_bins / 6)
    x_ticks = [Tick(number * width, f"{(first + number) * step:,}") for number in range(0, num_bins + 1, every)]
    return _bar_chart(values, counts, tips, x_ticks, title=title, x_name=x_name, y_name=y_name)


def count_bars(values: Sequence[int], *, title: str, x_name: str, y_name: str) -> Chart:
    """How often each small number occurs, from 0 on; the twelfth bar holds all larger ones too."""
    last = MAX_BARS - 1
    counts = Counter(min(value, last) for value in values)
    num_bars = max(counts) + 1
    labels = [f"{number}{'+' if number == last else ''}" for number in range(num_bars)]
    width = WIDTH / num_bars
    x_ticks = [Tick((number + 0.5) * width, label) for number, label in enumerate(labels)]
    return _bar_chart(values, counts, labels, x_ticks, title=title, x_name=x_name, y_name=y_name)


def _bar_chart(
    values: Sequence[int],
    counts: Counter[int],
    tips: Sequence[str],
    x_ticks: Sequence[Tick],
    *,
    title: str,
    x_name: str,
    y_name: str,
) -> Chart:
    """A bar for each of `tips`, as high as its number is counted."""
    top, y_ticks = _upwards(max(counts.values()))
    width = WIDTH / len(tips)
    bars = [
        _bar(number * width, width, counts[number] / top, f"{tip}: {counts[number]:,}")
        for number, tip in enumerate(tips)
    ]
    return Chart(
        title=title,
        summary=_summary(values, x_name, y_name),
        x_name=x_name,
        y_name=y_name,
        x_ticks=tuple(x_ticks),
        y_ticks=y_ticks,
        bars=tuple(bars),
    )


def size_dots(sizes: Sequence[Size], *, title: str) -> Chart:
    """Widths across and heights upwards, a larger dot for a more frequent size; the thousand most frequent sizes."""
    counts = Counter(sizes)
    right, x_ticks = _axis(max(size.width for size in counts), WIDTH)
    top, y_ticks = _upwards(max(size.height for size in counts))
    [(most_frequent, most)] = counts.most_common(1)
    dots = [
        Dot(
            x=round(WIDTH * size.width / right, 1),
            y=round(HEIGHT * (1 - size.height / top), 1),
            radius=round(SMALLEST_DOT + (LARGEST_DOT - SMALLEST_DOT) * math.sqrt(count / most), 1) if most > 1 else 3.0,
            tip=f"{size.width} x {size.height}: {count:,}",
        )
        for size, count in counts.most_common(MAX_DOTS)
    ]
    return Chart(
        title=title,
        summary=f"{len(sizes):,} pictures of {len(counts):,} sizes; {' x '.join(map(str, most_frequent))} most often",
        x_name="width in pixels",
        y_name="height in pixels",
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        dots=tuple(dots),
    )


def curve(steps: Sequence[int], values: Sequence[float], *, title: str, y_name: str, is_share: bool) -> Chart:
    """A metric over the steps of a run, on an axis from 0 up: to 1 for a share, else to a round number."""
    right, x_ticks = _axis(max(steps), WIDTH)
    top, y_ticks = (1, SHARE_TICKS) if is_share else _upwards(max(1, math.ceil(max(values))))
    return Chart(
        title=title,
        summary=f"{y_name} from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}",
        x_name="step",
        y_name=y_name,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        line=tuple(
            (round(WIDTH * step / right, 1), round(HEIGHT * (1 - value / top), 1)) for step, value in zip(steps, values)
        ),
    )


def _summary(values: Sequence[int], x_name: str, y_name: str) -> str:
    return f"{len(values):,} {y_name} of {min(values):,} to {max(values):,} {x_name}"


def _bar(x: float, width: float, share: float, tip: str) -> Bar:
    gap = max(min(2.0, width / 4), width - WIDEST_BAR)
    height = HEIGHT * share
    return Bar(round(x + gap / 2, 1), round(HEIGHT - height, 1), round(width - gap, 1), round(height, 1), tip)


def _span(number: int, step: int) -> str:
    return f"{number * step:,}" if step == 1 else f"{number * step:,} to {(number + 1) * step - 1:,}"


def _axis(highest: int, length: float) -> tuple[int, tuple[Tick, ...]]:
    """The end of an axis that begins at 0, and its labels."""
    step = nice_step(highest, 4)
    end = step * math.ceil(highest / step)
    return end, tuple(Tick(length * value / end, f"{value:,}") for value in range(0, end + 1, step))


def _upwards(highest: int) -> tuple[int, tuple[Tick, ...]]:
    end, ticks = _axis(highest, HEIGHT)
    return end, tuple(Tick(HEIGHT - tick.at, tick.label) for tick in ticks)
