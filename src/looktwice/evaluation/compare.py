"""Two results against each other, question by question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from looktwice.errors import DataError
from looktwice.evaluation.conditions import CONDITIONS
from looktwice.evaluation.recipe import binding, differences
from looktwice.evaluation.result import Line, Result
from looktwice.evaluation.statistics import Difference, difference
from looktwice.evaluation.summary import decided, paired, units


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two results on the same questions of one benchmark, under one condition: their scores, the second minus the first
    with its test, and the same of each category."""

    bench: str
    condition: str
    first: float
    second: float
    gap: Difference
    categories: dict[str, Difference]
    num_unpaired: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that two results share. `recipes` tells in what their recipes differ, the model aside."""

    parts: list[Compared]
    recipes: list[str]


def compare(first: Result, second: Result) -> Comparison:
    """Compare two results on what both have answered.

    Raises DataError where they share no question, or the same question has another text or gold answer in each.
    """
    benches = [name for name in first.recipe["benches"] if name in second.recipe["benches"]]
    parts = []
    for bench in benches:
        for condition in CONDITIONS:
            ours, theirs = first.of(bench, condition), second.of(bench, condition)
            if decided(ours) and decided(theirs) and (part := _compared(bench, condition, ours, theirs)):
                parts.append(part)
    if not parts:
        raise DataError("the two results share no question; compare those of the same benchmark")
    after, before = binding(second.recipe, first.recipe)
    told = differences(_without_model(after), _without_model(before))
    return Comparison(parts=parts, recipes=told)


def _without_model(recipe: Line) -> Line:
    return {**recipe, "model": {name: recipe["model"][name] for name in ("dtype", "quantization")}}


def _compared(bench: str, condition: str, ours: Sequence[Line], theirs: Sequence[Line]) -> Compared | None:
    _check_questions(bench, ours, theirs)
    one, other = paired(ours, theirs)
    if not one:
        return None
    categories = sorted({line["category"] for line in ours})
    split = {}
    for name in categories if len(categories) > 1 else ():
        pair = paired([line for line in ours if line["category"] == name], theirs)
        if pair[0]:
            split[name] = difference(pair[1], pair[0])
    return Compared(
        bench=bench,
        condition=condition,
        first=fmean(one),
        second=fmean(other),
        gap=difference(other, one),
        categories=split,
        num_unpaired=len(units(decided(ours))) + len(units(decided(theirs))) - 2 * len(one),
    )


def _check_questions(bench: str, ours: Sequence[Line], theirs: Sequence[Line]) -> None:
    asked = {line["id"]: (line["about"], line["gold"]) for line in ours}
    for line in theirs:
        if line["id"] in asked and asked[line["id"]] != (line["about"], line["gold"]):
            raise DataError(f"question {line['id']} of {bench} is another one in each; compare results of one file")
