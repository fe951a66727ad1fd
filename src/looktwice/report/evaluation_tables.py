"""Evaluations as tables and sentences: the same ones in the terminal and on pages."""

from __future__ import annotations

from collections.abc import Iterator

from looktwice.benches.catalogue import CATALOGUE
from looktwice.errors import counted
from looktwice.evaluation.compare import Compared, Comparison
from looktwice.evaluation.conditions import CROPS, WORDS
from looktwice.evaluation.statistics import Difference, Estimate
from looktwice.evaluation.summary import NEEDED, Summary
from looktwice.report.tables import Table

FAILED_SHOWN = 10


def points(share: float) -> str:
    return f"{100 * share:.1f}"


def interval(found: Estimate | Difference) -> str:
    return f"{points(found.low)} to {points(found.high)}"


def p_value(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def summary_tables(summary: Summary) -> list[Table]:
    """The tables of one benchmark."""
    title = CATALOGUE[summary.bench].title
    tables = [_conditions(summary, title)]
    if summary.categories:
        rows = tuple(
            (name or "(none)", points(one.mean), interval(one), f"{one.num_units:,}")
            for name, one in summary.categories.items()
        )
        tables.append(Table(title=f"{title} by category", header=("", "score", "interval", "questions"), rows=rows))
    if own := {**summary.figures, **summary.measures}:
        figures = tuple((name, points(value)) for name, value in own.items())
        tables.append(Table(title=f"{title}, its own figures", header=("", "%"), rows=figures))
    tables.append(_tool(summary, title))
    if summary.failed:
        told = [f"{line['bench']} {line['id']} {line['condition']}: {line['error']}" for line in summary.failed]
        failed = tuple((line,) for line in told[:FAILED_SHOWN])
        note = f"{counted(len(told), 'question')} failed and count nowhere; the same command asks them again."
        tables.append(Table(title="Failed", header=("",), rows=failed, note=note))
    return tables


def _conditions(summary: Summary, title: str) -> Table:
    has_spread = any(one.spread is not None for one in summary.conditions.values())
    header = ["", "score", "interval", "crops better by", "interval", "p", "n", "calls", "valid", "cut off", "tokens"]
    rows = []
    for name, one in summary.conditions.items():
        gap = one.gap
        row = [WORDS[name], points(one.score.mean), interval(one.score)]
        row += ["", "", ""] if gap is None else [f"{100 * gap.mean:+.1f}", interval(gap), p_value(gap.p_value)]
        row += [f"{one.score.num_units:,}", f"{one.calls:.2f}", _share(one.valid_share), points(one.truncated_share)]
        row.append(f"{one.visual_tokens:,.1f}")
        if has_spread:
            row.append("" if one.spread is None else points(one.spread))
        rows.append(tuple(row))
    if has_spread:
        header.append("spread")
    return Table(title=title, header=tuple(header), rows=tuple(rows), note=_note(summary))


def _share(share: float | None) -> str:
    return "" if share is None else points(share)


def _note(summary: Summary) -> str:
    crops = summary.conditions[CROPS]
    note = "Percent, with 95 % intervals over questions; tokens are visual ones."
    if crops.num_without_answer:
        note += f" In {counted(crops.num_without_answer, 'answer')} with crops the rules found no answer."
    if undecided := sum(one.num_undecided for one in summary.conditions.values()):
        note += f" {counted(undecided, 'answer')} undecided by the judge, and left out."
    return note


def _tool(summary: Summary, title: str) -> Table:
    tool, grounding = summary.tool, summary.grounding
    rows = [("answers that call", points(tool.rate))]
    if tool.gain is not None and tool.harm is not None:
        rows += [("gain: wrong without crops, right with them", points(tool.gain))]
        rows += [("harm: right without crops, wrong with them", points(tool.harm))]
    if tool.on_hard is not None:
        rows.append(
            (f"calls, of {counted(tool.num_hard, 'answer')} to what is hard in text alone", points(tool.on_hard))
        )
    if tool.on_easy is not None:
        rows.append(
            (f"no call, of {counted(tool.num_easy, 'answer')} to what is easy in text alone", points(tool.on_easy))
        )
    if grounding is not None:
        rows += [
            (f"best IoU of a crop, mean of {grounding.num_answers:,} answers with crop and gold box",
             points(grounding.max_iou)),
            ("best IoU above 0.5", points(grounding.above_half)),
            ("gold boxes covered by crops", points(grounding.coverage)),
            ("seen in a crop and answered wrongly", points(grounding.read_wrong)),
            ("not seen in a crop and answered wrongly", points(grounding.located_wrong)),
        ]  # fmt: skip
    note = f"Hard and easy by {counted(tool.samples, 'answer')} to each question." if tool.samples else ""
    return Table(title=f"{title}, what the tool is worth", header=("", "%"), rows=tuple(rows), note=note)


def finding(summary: Summary) -> str:
    """One sentence on whether crops help: that they do is said only where they beat each of NEEDED for sure."""
    title = CATALOGUE[summary.bench].title
    if summary.helps is None:
        missing = [name for name in NEEDED if name not in summary.conditions]
        return f"{title}: whether crops help is not known without the controls {', '.join(missing)}."
    told = {name: summary.conditions[name].gap for name in NEEDED}
    if summary.helps:
        by = ", ".join(f"{100 * gap.mean:+.1f} over {_short(name)}" for name, gap in told.items() if gap)
        return f"{title}: crops help ({by}; all intervals above 0)."
    unsure = [_short(name) for name, gap in told.items() if gap is None or not gap.is_above]
    return f"{title}: not shown that crops help: no sure gain over {', '.join(unsure)}."


def _short(name: str) -> str:
    return {
        "blank_crop": "grey",
        "random_crop": "another place",
        "no_crop": "no crop",
        "more_pixels": "more pixels of equal tokens",
    }[name]


def comparison_tables(comparison: Comparison, first: str, second: str) -> list[Table]:
    """The tables of two results against each other."""
    header = ("", first, second, "gain", "interval", "won", "lost", "p", "n")
    rows = tuple((f"{part.bench} {part.condition}", *_cells(part)) for part in comparison.parts)
    test = " and ".join(sorted({part.gap.test for part in comparison.parts}))
    note = f"Percent; gain with its 95 % interval over questions; p by {test}, paired."
    if unpaired := sum(part.num_unpaired for part in comparison.parts):
        note += f" {counted(unpaired, 'question')} answered in one of them alone, and left out."
    tables = [Table(title=f"{first} and {second}", header=header, rows=rows, note=note)]
    split = [
        (f"{part.bench} {part.condition}: {name or '(none)'}", f"{100 * gap.mean:+.1f}", interval(gap),
         f"{gap.num_better:,}", f"{gap.num_worse:,}", p_value(gap.p_value), f"{gap.num_units:,}")
        for part in comparison.parts
        for name, gap in part.categories.items()
    ]  # fmt: skip
    if split:
        tables.append(Table(title="By category", header=("", *header[3:]), rows=tuple(split)))
    if comparison.recipes:
        rows = tuple((line,) for line in comparison.recipes)
        tables.append(
            Table(title="Their recipes differ, so what is compared is not the model alone", header=("",), rows=rows)
        )
    return tables


def _cells(part: Compared) -> Iterator[str]:
    gap = part.gap
    yield points(part.first)
    yield points(part.second)
    yield f"{100 * gap.mean:+.1f}"
    yield interval(gap)
    yield f"{gap.num_better:,}"
    yield f"{gap.num_worse:,}"
    yield p_value(gap.p_value)
    yield f"{gap.num_units:,}"


def verdict_of(comparison: Comparison, first: str, second: str) -> list[str]:
    """A sentence for each part: which is better, or that nobody can tell."""
    told = []
    for part in comparison.parts:
        gap = part.gap
        surely = gap.is_above or (gap.high < 0 and gap.p_value < 0.05)
        better = second if gap.mean > 0 else first
        words = f"{better} is better" if surely else "no sure difference"
        told.append(f"{part.bench} {part.condition}: {words} ({100 * gap.mean:+.1f}, p {p_value(gap.p_value)}).")
    return told
