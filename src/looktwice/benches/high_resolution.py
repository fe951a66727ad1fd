"""Benchmarks of small things in large pictures: V*, HR-Bench, MME-RealWorld, ZoomBench, TreeBench."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import Any

from looktwice.benches.item import Item
from looktwice.benches.reading import (
    BRIEF,
    Fields,
    choice_question,
    gold_letter,
    lettered,
    split_options,
    without_letters,
)
from looktwice.errors import DataError

MME_INSTRUCTION = (
    "Select the best answer to the above multiple-choice question based on the image. "
    "Respond with only the letter (A, B, C, D, or E) of the correct option.\nThe best answer is:"
)
TREE_INSTRUCTION = (
    "Select the best answer to the above multiple-choice question based on the image. "
    "Respond with only the letter of the correct option."
)


def vstar(row: Fields) -> list[Item]:
    """A line of `test_questions.jsonl`: the question as it is given, its options in the order of the file, and the
    boxes of the file beside the picture."""
    image, text = row.image("image"), row.text("text")
    about, options = split_options(text)
    return [
        Item(
            images=(image,),
            question=text,
            about=about,
            gold=(gold_letter(row.text("label"), row.where),),
            options=options,
            category=row.text("category"),
            gold_boxes=_sidecar(image, row.where),
        )
    ]


def _sidecar(image: object, where: str) -> tuple[Any, ...]:
    """The target boxes that the file beside a picture lists as x, y, width, height; none where there is no file."""
    path = image.with_suffix(".json") if isinstance(image, Path) else None
    if path is None or not path.is_file():
        return ()
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return Fields(facts, str(path), path).boxes("bbox", has_sides=True)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: {path}: the boxes of the picture cannot be read ({error})") from error


def hr_bench(row: Fields) -> list[Item]:
    """A row of HR-Bench: one of the four orders of the options of a question, which are one group."""
    options = tuple(row.text(letter) for letter in "ABCD")
    about = row.text("question")
    image = row.image("image")
    return [
        Item(
            images=(image,),
            question=choice_question(about, options),
            about=about,
            gold=(gold_letter(row.text("answer"), row.where),),
            options=options,
            category=row.text("category"),
            group=_key(about, str(image), *sorted(options)),
            facts={"cycle": row.text("cycle_category", default="")},
        )
    ]


def _key(*facts: str) -> str:
    return blake2b("\0".join(facts).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def by_cycle(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """HR-Bench: the accuracy within each order of the options, and the mean over these."""
    cycles: dict[str, list[float]] = {}
    for line in lines:
        cycles.setdefault(line["facts"].get("cycle", ""), []).append(line["score"])
    if len(cycles) < 2:
        return {}
    found = {f"cycle {name}": fmean(scores) for name, scores in sorted(cycles.items())}
    return {**found, "mean over cycles": fmean(found.values())}


def mme_realworld(row: Fields) -> list[Item]:
    """A row of MME-RealWorld or -Lite, of the original JSON or of the tables that harnesses made of it."""
    about = row.text("Text", "question")
    options = row.texts("Answer choices", "multi-choice options")
    subtask = row.text("Subtask", "category")
    task = row.text("Task", default="")
    return [
        Item(
            images=(row.image("Image", "bytes", "image"),),
            question=f"{about.strip()} The choices are listed below:\n" + "\n".join(options) + f"\n{MME_INSTRUCTION}",
            about=about,
            gold=(gold_letter(row.text("Ground truth", "answer"), row.where),),
            options=without_letters(options),
            category=f"{task}/{subtask}" if task else subtask,
        )
    ]


def by_task(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """MME-RealWorld: perception and reasoning, each the accuracy over its questions and the mean over its subtasks, and
    the mean of the two."""
    tasks: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        task, _, subtask = line["category"].partition("/")
        tasks.setdefault(task, {}).setdefault(subtask, []).append(line["score"])
    figures = {}
    for task, subtasks in sorted(tasks.items()):
        figures[task] = fmean(score for scores in subtasks.values() for score in scores)
        figures[f"{task}, mean over subtasks"] = fmean(map(fmean, subtasks.values()))
    if len(tasks) > 1:
        figures["mean of the tasks"] = fmean(figures[task] for task in tasks)
    return figures


def zoom_bench(row: Fields) -> list[Item]:
    """A row of ZoomBench, asked about the whole picture; the region that holds the evidence is the gold crop."""
    return [_zoom(row, row.image("image"))]


def zoom_bench_crop(row: Fields) -> list[Item]:
    """The same question asked about that region alone: the other view of the benchmark."""
    return [replace(_zoom(row, row.image("crop_image")), gold_image=None)]


def _zoom(row: Fields, image: Any) -> Item:
    query = row.text("query", "question")
    about, options = split_options(query)
    gold = row.text("response", "answer")
    return Item(
        images=(image,),
        question=query if options else f"{query}\n{BRIEF}",
        about=about,
        gold=(gold_letter(gold, row.where),) if options else (gold,),
        options=options,
        category=row.text("dimension", "sub_task", "category", default=""),
        gold_image=row.image("crop_image") if row.has("crop_image") else None,
    )


def tree_bench(row: Fields) -> list[Item]:
    """A row of TreeBench; its target boxes are in original pixels."""
    about = row.text("question")
    if row.has("A"):
        options = tuple(row.text(letter) for letter in "ABCDEF" if row.has(letter))
        question = f"{about}\n{lettered(options)}"
    elif row.has("multi-choice options"):
        written = row.text("multi-choice options")
        options = split_options(written)[1]
        question = f"{about} Options:\n{written}"
    else:
        about, options = split_options(about)
        question = row.text("question")
    return [
        Item(
            images=(row.image("image"),),
            question=f"{question}\n{TREE_INSTRUCTION}",
            about=about,
            gold=(gold_letter(row.text("answer"), row.where),),
            options=options,
            category=row.text("category", default=""),
            gold_boxes=row.boxes("target_instances") or row.boxes("bbox"),
        )
    ]
