"""What a result says of a benchmark: scores with intervals, controls, categories, and what the tool is worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from looktwice.benches.catalogue import CATALOGUE
from looktwice.evaluation.conditions import CONDITIONS, CROPS
from looktwice.evaluation.grounding import Grounding, grounding_of
from looktwice.evaluation.result import Line, Result
from looktwice.evaluation.statistics import Difference, Estimate, difference, estimate
from looktwice.rollout.trajectory import COMPLETE

NEEDED = ("blank_crop", "random_crop", "no_crop", "more_pixels")
"""What crops have to beat before they are said to help."""
RIGHT = 0.5
EASY, HARD = 0.8, 0.2
"""Of the answers in text alone: a question is easy from 4 of 5 right on, hard up to 1 of 5. Source: Beacon, arXiv
2607.28595."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Answers under one condition. `spread` is the standard deviation of the scores of the samples, None with one;
    `gap` is crops minus this condition on the questions that have both, None of crops themselves."""

    score: Estimate
    spread: float | None
    gap: Difference | None
    num_answers: int
    num_undecided: int
    num_without_answer: int
    calls: float
    valid_share: float | None
    truncated_share: float
    visual_tokens: float


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """What the tool is worth. `gain` were wrong without crops and right with them, `harm` the other way round.

    `rate` is the share of answers that call; `on_hard` that of the hard questions that call, `on_easy` that of the easy
    ones that do not, and `samples` how many answers in text alone say which is which. None where not asked.
    """

    gain: float | None
    harm: float | None
    rate: float
    on_hard: float | None = None
    on_easy: float | None = None
    num_hard: int = 0
    num_easy: int = 0
    samples: int = 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All that is told of one benchmark. `figures` are its own, `measures` the means of those of its scorer."""

    bench: str
    conditions: dict[str, Asked]
    categories: dict[str, Estimate]
    figures: dict[str, float]
    measures: dict[str, float]
    tool: ToolUse
    grounding: Grounding | None
    failed: list[Line]

    @property
    def helps(self) -> bool | None:
        """Whether crops beat each of NEEDED with its interval above 0; None where one of them was not asked."""
        if any(name not in self.conditions for name in NEEDED):
            return None
        gaps = [self.conditions[name].gap for name in NEEDED]
        return all(gap is not None and gap.is_above for gap in gaps)


def summary_of(result: Result, bench: str) -> Summary | None:
    """The summary of a benchmark; None where no question was answered with crops."""
    lines = {name: result.of(bench, name) for name in CONDITIONS}
    crops = decided(lines[CROPS])
    if not crops:
        return None
    categories = {line["category"] for line in crops}
    named = {name: [line for line in crops if line["category"] == name] for name in sorted(categories)}
    figures = CATALOGUE[bench].figures
    return Summary(
        bench=bench,
        conditions={name: _asked(lines[name], lines[CROPS], name) for name in CONDITIONS if decided(lines[name])},
        categories={name: estimate(units(of)) for name, of in named.items()} if len(named) > 1 else {},
        figures=figures(crops) if figures else {},
        measures=_means(crops),
        tool=tool_use(lines),
        grounding=grounding_of(crops),
        failed=[line for key, line in result.failed.items() if key.bench == bench],
    )


def decided(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line["score"] is not None]


def units(lines: Iterable[Mapping[str, Any]]) -> list[float]:
    """The mean score of each question, its variants and samples together."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for line in lines:
        groups[line["group"]].append(line["score"])
    return [fmean(scores) for scores in groups.values()]


def paired(ours: Iterable[Line], theirs: Iterable[Line]) -> tuple[list[float], list[float]]:
    """The scores of the questions that both have answered, decided in both: as units, in the same order."""
    others = {_place(line): line for line in decided(theirs)}
    both = [(line, others[_place(line)]) for line in decided(ours) if _place(line) in others]
    return units(one for one, _ in both), units({**other, "group": one["group"]} for one, other in both)


def _place(line: Line) -> tuple[str, int]:
    return line["id"], line["sample"]


def _asked(lines: Sequence[Line], crops: Sequence[Line], condition: str) -> Asked:
    known = decided(lines)
    samples = [
        fmean(units(line for line in known if line["sample"] == number))
        for number in sorted({line["sample"] for line in known})
    ]
    calls = [crop for line in lines for crop in line["crops"]]
    pair = paired(crops, lines)
    return Asked(
        score=estimate(units(known)),
        spread=stdev(samples) if len(samples) > 1 else None,
        gap=difference(*pair) if condition != CROPS and pair[0] else None,
        num_answers=len(lines),
        num_undecided=len(lines) - len(known),
        num_without_answer=sum(line["by"] == "none" for line in lines),
        calls=len(calls) / len(lines),
        valid_share=fmean(crop["error"] is None for crop in calls) if calls else None,
        truncated_share=fmean(line["stop_reason"] not in COMPLETE for line in lines),
        visual_tokens=fmean(visual_tokens(line) for line in lines),
    )


def visual_tokens(line: Line) -> int:
    """The visual tokens of an answer: those of its pictures as they were seen, and of its crops."""
    return line["num_overview_tokens"] + line["tokens"]["crops"]


def _means(lines: Sequence[Line]) -> dict[str, float]:
    named: defaultdict[str, list[float]] = defaultdict(list)
    for line in lines:
        for name, value in line["measures"].items():
            named[name].append(value)
    return {name: fmean(values) for name, values in named.items()}


def tool_use(lines: Mapping[str, Sequence[Line]]) -> ToolUse:
    """What the tool is worth, by the answers under each condition."""
    with_crops, without = lines[CROPS], {_place(line): line for line in decided(lines["no_crop"])}
    pairs = [
        (line["score"] >= RIGHT, without[_place(line)]["score"] >= RIGHT)
        for line in decided(with_crops)
        if _place(line) in without
    ]
    in_text: defaultdict[str, list[float]] = defaultdict(list)
    for line in decided(lines["text_only"]):
        in_text[line["id"]].append(line["score"] >= RIGHT)
    shares = {name: fmean(rights) for name, rights in in_text.items()}
    hard = [bool(line["crops"]) for line in with_crops if shares.get(line["id"], 0.5) <= HARD]
    easy = [not line["crops"] for line in with_crops if shares.get(line["id"], 0.5) >= EASY]
    return ToolUse(
        gain=fmean(one and not other for one, other in pairs) if pairs else None,
        harm=fmean(other and not one for one, other in pairs) if pairs else None,
        rate=fmean(bool(line["crops"]) for line in with_crops),
        on_hard=fmean(hard) if hard else None,
        on_easy=fmean(easy) if easy else None,
        num_hard=len(hard),
        num_easy=len(easy),
        samples=max(map(len, in_text.values()), default=0),
    )
