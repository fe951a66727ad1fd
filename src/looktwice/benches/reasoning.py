"""Benchmarks of reasoning and of vision alone: ScienceQA, MathVista, MMVP, CV-Bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from looktwice.benches.item import LETTERS, Item
from looktwice.benches.reading import DIRECT, Fields, choice_question, gold_letter, without_letters
from looktwice.errors import DataError


def science_qa(row: Fields) -> list[Item]:
    """A row of ScienceQA; none for a question without a picture."""
    if not row.has("image"):
        return []
    about, options = row.text("question"), row.texts("choices")
    context = row.text("hint", default="")
    place = int(float(row.text("answer")))
    if not 0 <= place < len(options):
        raise DataError(f"{row.where}: the answer is option {place} of {len(options)}, counted from 0")
    question = choice_question(about, options)
    return [
        Item(
            images=(row.image("image"),),
            question=f"Context: {context}\n{question}" if context else question,
            about=about,
            gold=(LETTERS[place],),
            options=options,
            category=row.text("subject", default=""),
        )
    ]


def math_vista(row: Fields) -> list[Item]:
    """A row of MathVista testmini, asked as its `query` says."""
    options = row.texts("choices") if row.values.get("choices") else ()
    facts = {name: row.text(name, default="") for name in ("answer_type", "precision", "question_type", "unit")}
    metadata = row.values.get("metadata")
    category = str(metadata.get("task", "")) if isinstance(metadata, dict) else ""
    return [
        Item(
            images=(row.image("decoded_image", "image"),),
            question=row.text("query", "question"),
            about=row.text("question", "query"),
            gold=(row.text("answer"),),
            options=options,
            category=category,
            facts=facts,
        )
    ]


def mmvp(row: Fields) -> list[Item]:
    """A row of MMVP's `Questions.csv`; two rows that follow each other are a pair, and one group."""
    number = int(float(row.text("Index", "lndex", "index")))
    written = row.text("Options", "options")
    places = [written.find(f"({letter})") for letter in "ab"]
    if min(places) < 0:
        raise DataError(f"{row.where}: the options are not written as (a) … (b) …")
    options = without_letters([written[places[0] : places[1]], written[places[1] :]])
    about = row.text("Question", "question")
    shown = row if row.has("image") else row.given(image=f"MMVP Images/{number}.jpg")
    return [
        Item(
            images=(shown.image("image"),),
            question=choice_question(about, options),
            about=about,
            gold=(gold_letter(row.text("Correct Answer", "answer"), row.where),),
            options=options,
            group=f"pair {(number - 1) // 2 + 1}",
        )
    ]


def by_pair(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """MMVP: the share of pairs of which both questions are answered rightly, the original score.

    Of several samples a pair is right as often as both are in the same sample.
    """
    pairs: dict[tuple[str, int], list[float]] = {}
    for line in lines:
        pairs.setdefault((line["group"], line["sample"]), []).append(line["score"])
    whole = [min(scores) for scores in pairs.values() if len(scores) == 2]
    return {"pairs": fmean(whole)} if whole else {}


def cv_bench(row: Fields) -> list[Item]:
    """A row of CV-Bench, 2D or 3D."""
    about, options = row.text("question"), row.texts("choices")
    question = f"{row.text('prompt')}\n{DIRECT}" if row.has("prompt") else choice_question(about, options)
    return [
        Item(
            images=(row.image("image", "filename"),),
            question=question,
            about=about,
            gold=(gold_letter(row.text("answer"), row.where),),
            options=options,
            category=f"{row.text('type', default='')}/{row.text('task', default='')}".strip("/"),
            facts={"type": row.text("type", default=""), "source": row.text("source", default="")},
        )
    ]


def by_source(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """CV-Bench: 2D is the mean of its two sources, 3D of its one, and the score the mean of 2D and 3D."""
    kinds: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        kinds.setdefault(line["facts"]["type"], {}).setdefault(line["facts"]["source"], []).append(line["score"])
    figures = {kind: fmean(map(fmean, sources.values())) for kind, sources in sorted(kinds.items())}
    return {**figures, "mean of 2D and 3D": fmean(figures.values())} if len(figures) > 1 else figures
