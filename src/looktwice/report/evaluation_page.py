"""The HTML page of evaluations: scores with intervals, controls, categories, and every item with what was answered.

Of several results the first is compared with each other one, and the items on which they differ stand first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looktwice.benches.catalogue import CATALOGUE
from looktwice.benches.item import Item
from looktwice.errors import DataError, LooktwiceError, counted
from looktwice.evaluation.compare import Comparison, compare
from looktwice.evaluation.conditions import CONDITIONS, CROPS, WORDS
from looktwice.evaluation.result import Items, Line, Result, read_result
from looktwice.evaluation.statistics import Estimate
from looktwice.evaluation.summary import RIGHT, Summary, summary_of
from looktwice.report.album import Album
from looktwice.report.charts import Chart, Interval, intervals
from looktwice.report.evaluation_tables import comparison_tables, finding, summary_tables, verdict_of
from looktwice.report.html import CHARTS, PLOTLY, write_html
from looktwice.report.passages import passages_of
from looktwice.report.run_page import flat, short_names, value_tables
from looktwice.report.tables import Table

ITEMS, SCRIPT = "items.js", "evaluation.js"
TEXT_BYTES = 6_000_000
LONGEST_TEXT = 4_000
LABELS = {
    CROPS: "with crops",
    "no_crop": "no crop",
    "random_crop": "another place",
    "blank_crop": "grey crop",
    "gold_crop": "gold crop",
    "call_without_result": "call, no result",
    "result_without_call": "result, no call",
    "more_pixels": "more pixels",
    "question_only": "no picture",
    "text_only": "text alone",
}
"""Of the conditions, short enough for the chart on a phone."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the page says of one benchmark: charts of scores and categories, the tables of each result."""

    title: str
    findings: tuple[str, ...]
    charts: tuple[Chart, ...]
    tables: tuple[tuple[str, list[Table]], ...]


@dataclass(frozen=True, kw_only=True)
class Versus:
    """The first result against another one."""

    title: str
    verdicts: list[str]
    tables: list[Table]


def write_evaluation_page(path: Path, paths: Sequence[Path]) -> None:
    """Write the page of one result or more. Raises DataError for a file that is none, or has no answer with crops."""
    results = dict(zip([name.removesuffix(".jsonl") for name in short_names(paths)], map(read_result, paths)))
    summaries = {name: summaries_of(result) for name, result in results.items()}
    benches = [*dict.fromkeys(bench for of in summaries.values() for bench in of)]
    if not benches:
        raise DataError(f"{paths[0]}: no question was answered with crops; finish the evaluation first")
    items, num_left_out = items_within(results)
    album = add_images(items, results)
    names = [*results]
    write_html(
        path,
        "evaluation.html.jinja",
        scripts=(PLOTLY, CHARTS, ITEMS, SCRIPT),
        title=" and ".join(names) if len(names) < 3 else f"{len(names)} evaluations",
        lead=_lead(results, items, num_left_out, album.num_left_out),
        versus=[versus(results, names[0], other) for other in names[1:]],
        benches=[bench_of(bench, summaries) for bench in benches],
        recipes=value_tables("Settings", {name: recipe_of(result) for name, result in results.items()}),
        data={"images": album.entries, "items": items, "names": names, "words": WORDS},
        several=len(names) > 1,
    )


def summaries_of(result: Result) -> dict[str, Summary]:
    """By benchmark, of those that were answered with crops."""
    found = {bench: summary_of(result, bench) for bench in result.recipe["benches"]}
    return {bench: summary for bench, summary in found.items() if summary}


def _lead(results: Mapping[str, Result], items: Sequence[Line], num_left_out: int, num_images: int) -> str:
    models = [f"{name}: {result.recipe['model']['name']}" for name, result in results.items()]
    told = f"{'; '.join(models)}. {counted(len(items), 'question')}."
    if num_left_out:
        told += f" {num_left_out:,} more have no room on the page, those that all answer alike first."
    if num_images:
        told += f" {num_images:,} pictures have no room."
    return told


def versus(results: Mapping[str, Result], first: str, second: str) -> Versus:
    """Raises DataError where the two share no question, or it is another one in each."""
    comparison: Comparison = compare(results[first], results[second])
    return Versus(
        title=f"{second} against {first}",
        verdicts=verdict_of(comparison, first, second),
        tables=comparison_tables(comparison, first, second),
    )


def bench_of(bench: str, summaries: Mapping[str, Mapping[str, Summary]]) -> Bench:
    """A benchmark with all results that have it."""
    having = {name: of[bench] for name, of in summaries.items() if bench in of}
    title = CATALOGUE[bench].title
    several = len(having) > 1
    return Bench(
        title=title[:1].upper() + title[1:],
        findings=tuple(f"{name}: {finding(of)}" if several else finding(of) for name, of in having.items()),
        charts=tuple(bench_charts(having)),
        tables=tuple((name if several else "", summary_tables(summary)) for name, summary in having.items()),
    )


def bench_charts(having: Mapping[str, Summary]) -> Iterator[Chart]:
    """The score under each condition, then of each category."""
    scores = {
        name: [_interval(LABELS[condition], of.score) for condition, of in summary.conditions.items()]
        for name, summary in having.items()
    }
    yield intervals(scores, title="Score under each condition, 95 % intervals", x_name="percent")
    categories = {
        name: [_interval(category or "(none)", of) for category, of in summary.categories.items()]
        for name, summary in having.items()
        if summary.categories
    }
    if categories:
        yield intervals(categories, title="Score of each category, 95 % intervals", x_name="percent")


def _interval(name: str, found: Estimate) -> Interval:
    return Interval(name=name, value=100 * found.mean, low=100 * found.low, high=100 * found.high)


def recipe_of(result: Result) -> dict[str, str]:
    """The recipe and where it ran, by dotted names."""
    start = {name: value for name, value in result.starts[-1]["start"].items() if name not in ("places", "folders")}
    return dict(flat({**result.recipe, "start": start}))


def items_within(results: Mapping[str, Result]) -> tuple[list[Line], int]:
    """The questions whose texts have room, differing ones first, then wrong ones; and how many have none."""
    items = all_items(results)
    kept, left = [], TEXT_BYTES
    for item in sorted(items, key=lambda one: (-one["spread"], one["mean"])):
        left -= len(json.dumps(item))
        if left < 0:
            break
        kept.append(item)
    return kept, len(items) - len(kept)


def all_items(results: Mapping[str, Result]) -> list[Line]:
    """Every question with its answers, as the page takes it.

    `spread` is by how much the score with crops differs between results, `mean` its mean; `order` is the place in the
    files. `line` of an answer is for `add_images`, which takes it away.
    """
    items: dict[tuple[str, str], Line] = {}
    for number, result in enumerate(results.values()):
        for bench in result.recipe["benches"]:
            for condition in CONDITIONS:
                for line in result.of(bench, condition):
                    item = items.setdefault((bench, line["id"]), item_of(line, len(items)))
                    item["answers"].append(answer_of(line, number, condition))
    for item in items.values():
        scores = [scores_of(item, number) for number in range(len(results))]
        known = [sum(of) / len(of) for of in scores if of]
        item["spread"] = max(known) - min(known) if known else 0.0
        item["mean"] = sum(known) / len(known) if known else 0.0
    return [*items.values()]


def scores_of(item: Line, number: int) -> list[float]:
    """The decided scores with crops of one result."""
    return [
        one["score"]
        for one in item["answers"]
        if one["result"] == number and one["condition"] == CROPS and one["score"] is not None
    ]


def item_of(line: Line, order: int) -> Line:
    return {
        "order": order,
        "bench": line["bench"],
        "id": line["id"],
        "where": line.get("where", ""),
        "row": line["row"],
        "about": line["about"][:LONGEST_TEXT],
        "options": line["options"],
        "gold": line["gold"],
        "goldBoxes": line["gold_boxes"],
        "category": line["category"],
        "sizes": line.get("sizes", []),
        "answers": [],
    }


def answer_of(line: Line, number: int, condition: str) -> Line:
    """An answer; of one with crops its passages, each call followed by its crop, of a control the text."""
    answer: Line = {
        "result": number,
        "condition": condition,
        "sample": line["sample"],
        "score": line["score"],
        "right": line["score"] is not None and line["score"] >= RIGHT,
        "said": line["prediction"],
        "by": line["by"],
        "stop": line["stop_reason"],
        "calls": [
            {"box": crop["box"], "size": crop["size"], "error": crop["error"], "image": crop["image"]}
            for crop in line["crops"]
        ],
    }
    text = line["response"][:LONGEST_TEXT]
    if condition == CROPS:
        answer["parts"] = [[*passage] for passage in passages_of(text)]
    else:
        answer["text"] = text
    return answer


def add_images(items: Sequence[Line], results: Mapping[str, Result]) -> Album:
    """Put the numbers of pictures and of the crops with crops into the items; files that have gone leave none."""
    crops = {
        (item["bench"], item["id"], str(call["box"]))
        for item in items
        for one in item["answers"]
        if one["condition"] == CROPS
        for call in one["calls"]
        if call["box"]
    }
    album = Album(len(crops) + sum(len(item["sizes"]) for item in items))
    readers = [Items(result) for result in results.values()]
    for item in items:
        sources = _sources(item, readers, results)
        item["images"] = [album.whole(source) for source in sources] or [None] * len(item["sizes"])
        for one in item["answers"]:
            for call in one["calls"]:
                if one["condition"] == CROPS and call["box"] and 0 < call["image"] <= len(sources):
                    call["crop"] = album.crop(sources[call["image"] - 1], call["box"], call["size"])
        del item["row"]
    return album


def _sources(item: Line, readers: Sequence[Items], results: Mapping[str, Result]) -> Sequence[Any]:
    """The pictures of an item, read again from the files of the first result that has it."""
    for number, (reader, result) in enumerate(zip(readers, results.values())):
        if not any(one["result"] == number for one in item["answers"]):
            continue
        line = next(line for key, line in result.answers.items() if (key.bench, key.id) == (item["bench"], item["id"]))
        try:
            found: Item = reader.of(line)
        except (LooktwiceError, OSError, KeyError):
            continue
        return found.images
    return ()
