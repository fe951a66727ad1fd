"""How the benchmarks measure and print: medians of interleaved repeats, and ratios between them."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Clock = Callable[[], float]


def medians(ways: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each way, after one that does not count."""
    for way in ways.values():
        way()
    return {name: statistics.median(values) for name, values in interleaved(ways, repeats=repeats).items()}


def interleaved(
    ways: Mapping[str, Callable[[], object]], *, repeats: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each way, by repeat. Repeats are interleaved, so that a busy moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = clock()
            way()
            seconds[name].append(clock() - started)
    return seconds


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of pairs that were measured one after the other."""
    return statistics.median(above / below for above, below in zip(over, under, strict=True))


def parser() -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser()
    options.add_argument("--json", type=Path, help="also write the figures to this file")
    return options


def publish(
    figures: dict[str, float], arguments: argparse.Namespace | None = None, goals: Mapping[str, str] | None = None
) -> None:
    """Print the figures, and with `--json FILE` write them as one flat object.

    `goals` are printed beside the figures they are of: by the whole name, or by what stands after its last dot.
    """
    arguments = arguments or parser().parse_args()
    for name, value in figures.items():
        goal = (goals or {}).get(name) or (goals or {}).get(name.rpartition(".")[2], "")
        print(f"{name:56} {value:12.4g}   {goal}".rstrip())
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
