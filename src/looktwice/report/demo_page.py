"""The HTML page of a demo: how often each model is right, the same questions before and after each stage, curves.

All of it is read from the run folder, so that the page can be written again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from looktwice.evaluation.accuracy import wilson_interval
from looktwice.geometry import Box, Size
from looktwice.metrics import LOG_FILE
from looktwice.processing.images import open_image, resize
from looktwice.report.charts import Chart, Line, curves
from looktwice.report.figures import Figure, Mark, crop_figure, merged, whole_figures
from looktwice.report.html import CHARTS, PLOTLY, write_html
from looktwice.report.passages import Passage, passages_of
from looktwice.report.run_page import alarm_table
from looktwice.report.tables import Table, share_text

SUMMARY_FILE, ANSWERS_FILE = "summary.json", "answers.jsonl"
STAGES = {"base": "pretrained", "sft": "after SFT", "grpo": "after R-GRPO"}
CONTROL_NAMES = {
    "no_crop": "no crop, must answer",
    "random_crop": "crop of another place",
    "blank_crop": "grey crop",
    "gold_crop": "crop of the right place",
}
CURVES = (
    ("sft", "loss", "SFT: loss", "nats a trained token"),
    ("grpo", "reward/accuracy", "R-GRPO: right answers of rollouts", "share"),
    ("grpo", "tool/mean_iou", "R-GRPO: crops and gold box", "overlap, IoU"),
)
SMALLEST_IMAGE = 160
EXAMPLES_EACH = 2
"""Questions shown of each course, such as wrong, wrong, right."""

Answered = Mapping[str, Any]
"""A line of answers.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How often somebody is right: a model, one with a control in place of its crop, or who guesses."""

    name: str
    share: float
    interval: tuple[float, float] | None = None
    counts: str = ""
    kind: str = "model"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one model said to a question, in passages and crops, and what it is worth."""

    model: str
    parts: tuple[Passage | Figure, ...]
    verdict: str
    is_right: bool


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its picture and the replies of all models."""

    question: str
    solution: str
    image: tuple[Figure, Figure]
    replies: tuple[Reply, ...]


@dataclass(frozen=True, kw_only=True)
class Course:
    """Questions that went the same way: which models were right and which were not."""

    title: str
    count: int
    examples: tuple[Example, ...]


def write_demo_page(folder: Path) -> Path:
    """Write `report.html` of a finished demo from its summary, its answers and its logs."""
    summary, answered = read_summary(folder), read_answers(folder)
    lead = (
        f"A tiny model learns to look twice: it cannot read the digits at the size at which it sees a picture, so it "
        f"has to cut out the right place. Asked are {len(answered)} questions about pictures never seen in training; "
        f"answers are greedy, the seed is {summary['seed']}."
    )
    path = folder / "report.html"
    write_html(
        path,
        "demo.html.jinja",
        scripts=(PLOTLY, CHARTS),
        title="looktwice demo",
        lead=lead,
        scores=scores_of(answered, summary["chance"]),
        chance=summary["chance"],
        crops=crop_table(summary["crop"]),
        courses=courses_of(answered, folder),
        num_asked=len(answered),
        alarms=alarm_table(read_lines(folder / "grpo"), title="Alarms of R-GRPO"),
        charts=[chart for chart in (read_curve(folder, *which) for which in CURVES) if chart],
        seconds=summary["seconds"],
        percent=share_text,
    )
    return path


def read_summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    return summary


def read_answers(folder: Path) -> list[Answered]:
    return [json.loads(line) for line in (folder / ANSWERS_FILE).read_text(encoding="utf-8").splitlines()]


def scores_of(answered: Sequence[Answered], chance: float) -> list[Score]:
    """The models one after the other, chance, and the last model with each control."""
    models = [_score(answered, key, name, "model") for key, name in STAGES.items()]
    controls = [_score(answered, key, name, "control") for key, name in CONTROL_NAMES.items()]
    return [*models, *controls, Score(name="guessing", share=chance, kind="chance")]


def _score(answered: Sequence[Answered], key: str, name: str, kind: str) -> Score:
    replies = [one["replies"][key] for one in answered]
    num_right = sum(reply["is_right"] for reply in replies)
    num_silent = sum(not _has_answer(reply) for reply in replies)
    counts = f"{num_right} right, {len(replies) - num_right - num_silent} wrong, {num_silent} without an answer"
    interval = wilson_interval(num_right, len(replies))
    return Score(name=name, share=num_right / len(replies), interval=interval, counts=counts, kind=kind)


def _has_answer(reply: Mapping[str, Any]) -> bool:
    return bool(reply["is_right"] or reply["stop_reason"] == "answered")


def demo_tables(folder: Path) -> list[Table]:
    """What the page opens with, for the terminal."""
    summary = read_summary(folder)
    rows = tuple(
        (score.name, share_text(score.share), " to ".join(map(share_text, score.interval or ())))
        for score in scores_of(read_answers(folder), summary["chance"])
    )
    table = Table(title="Right answers", header=("", "share", "95 % interval"), rows=rows)
    return [table, crop_table(summary["crop"])]


def crop_table(crop: Mapping[str, float | None]) -> Table:
    """How the last model uses its crops; a dash where it has none."""
    valid, overlap = crop["valid_share"], crop["mean_iou"]
    rows = (
        ("calls per answer", f"{crop['calls_per_answer']:.2f}"),
        ("valid calls", "-" if valid is None else share_text(valid)),
        ("mean overlap with the gold box (IoU)", "-" if overlap is None else f"{overlap:.2f}"),
    )
    return Table(title="Crops after R-GRPO", header=("", ""), rows=rows)


def courses_of(answered: Sequence[Answered], folder: Path) -> list[Course]:
    """The courses that questions took through the stages, the most frequent first, with examples of each."""

    def course(one: Answered) -> tuple[bool, ...]:
        return tuple(one["replies"][key]["is_right"] for key in STAGES)

    groups = [(rights, list(group)) for rights, group in groupby(sorted(answered, key=course), key=course)]
    return [
        Course(
            title=", ".join(
                f"{name} {'right' if is_right else 'not right'}" for name, is_right in zip(STAGES.values(), rights)
            ),
            count=len(group),
            examples=tuple(example_of(one, folder) for one in group[:EXAMPLES_EACH]),
        )
        for rights, group in sorted(groups, key=lambda pair: -len(pair[1]))
    ]


def example_of(one: Answered, folder: Path) -> Example:
    """A question with its picture, on which the boxes of all stages stand, and what each stage said."""
    image, seen = open_image(folder / one["image"]), Size(*one["seen"])
    marks = [Mark(box=Box(*one["gold_box"]), is_gold=True)] if one["gold_box"] else []
    for key, name in STAGES.items():
        boxes = [crop["box"] for crop in one["replies"][key]["crops"] if crop["box"]]
        marks += [Mark(box=Box(*box), label=name.removeprefix("after ")) for box in boxes]
    return Example(
        question=one["question"],
        solution=one["solution"],
        image=whole_figures(
            image,
            resize(image, seen),
            caption=f"{one['image']}, {image.width} x {image.height}",
            seen_caption=f"as the model sees it: {seen.width} x {seen.height}",
            marks=merged(marks),
            smallest=SMALLEST_IMAGE,
        ),
        replies=tuple(_reply(one["replies"][key], name, image) for key, name in STAGES.items()),
    )


def _reply(reply: Mapping[str, Any], model: str, image: Image.Image) -> Reply:
    verdict = "no answer"
    if _has_answer(reply):
        verdict = f"{reply['parsed']['answer_content']} is {'right' if reply['is_right'] else 'wrong'}"
    elif reply["stop_reason"] == "error":
        verdict = f"ended by an error: {reply['error']}"
    elif reply["stop_reason"] == "no_room":
        verdict = "no answer: longer than the cache"
    elif reply["stop_reason"] != "no_answer":
        verdict = "no answer before the limit"
    return Reply(model=model, parts=tuple(_read(reply, image)), verdict=verdict, is_right=reply["is_right"])


def _read(reply: Mapping[str, Any], image: Image.Image) -> Iterator[Passage | Figure]:
    """What was said, each call followed by its crop; the answer is left to the verdict.

    A call that a limit cut off before it ran, or whose tag was spelled in other tokens, is told without one.
    """
    crops = iter(reply["crops"])
    for passage in passages_of(reply["response"]):
        crop = next(crops, None) if passage.kind == "call" else None
        if crop and crop["box"]:
            size = Size(*crop["size"])
            caption = f"{passage.text}, seen as {size.width} x {size.height}"
            yield crop_figure(resize(image, size, tuple(crop["box"])), caption=caption)
        elif passage.kind != "answer":
            yield passage


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The log of a run, a mapping a step."""
    return [json.loads(line) for line in (run / LOG_FILE).read_text(encoding="utf-8").splitlines()]


def read_curve(folder: Path, stage: str, metric: str, title: str, y_name: str) -> Chart | None:
    """A metric of a stage's log at the steps that have it, None where no step has."""
    pairs = [(line["step"], line[metric]) for line in read_lines(folder / stage) if metric in line]
    if not pairs:
        return None
    steps, values = zip(*pairs)
    line = Line(name=y_name, steps=steps, values=values)
    return curves([line], title=title, y_name=y_name, is_share=metric != "loss")
