"""The HTML page of a run: figures, curves and answered questions with their pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from looktwice.answers import extract_answer, split_thinking
from looktwice.data.sample import Sample
from looktwice.geometry import Box, Size
from looktwice.processing.images import open_image, resize
from looktwice.report.html import image_uri, write_html
from looktwice.report.tables import Table
from looktwice.rollout.trajectory import Trajectory

SHOWN_WIDTH = 360
BOX_COLOUR = (230, 30, 30)
GOLD_COLOUR = (20, 160, 60)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over the steps of a stage."""

    title: str
    steps: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def points(self) -> str:
        """The line in a box of 300 x 100, y upwards from the smallest value to the largest."""
        low, high = min(self.values), max(self.values)
        first, last = self.steps[0], self.steps[-1]
        across = [300 * (step - first) / max(1e-9, last - first) for step in self.steps]
        down = [100 - 100 * (value - low) / max(1e-9, high - low) for value in self.values]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down))

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One answered question. `image` and `crops` are data URIs."""

    question: str
    solution: str
    answer: str
    thinking: str
    is_right: bool
    image: str
    crops: tuple[str, ...]
    boxes: tuple[str, ...]


def write_page(
    path: Path, *, title: str, lead: str, tables: Sequence[Table], curves: Sequence[Curve], cards: Sequence[Card]
) -> None:
    """Write the page."""
    values = {"title": title, "lead": lead, "tables": tables, "curves": curves, "cards": cards}
    write_html(path, "run.html.jinja", styles=["page.css"], **values)


def read_curve(log: Path, metric: str, title: str) -> Curve:
    """A metric of a stage's log.jsonl, at the steps that have it."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    pairs = [(line["step"], line[metric]) for line in lines if metric in line]
    return Curve(title=title, steps=tuple(step for step, _ in pairs), values=tuple(value for _, value in pairs))


def make_card(trajectory: Trajectory, sample: Sample, *, is_right: bool) -> Card:
    """A finished rollout as a card: its boxes drawn on the picture, its crops as the model saw them."""
    image = open_image(sample.image_paths[0])
    thinking, _ = split_thinking(trajectory.text)
    cut = [(call.box, call.size) for call in trajectory.calls if call.box is not None and call.size is not None]
    boxes = [(int(box.x1), int(box.y1), int(box.x2), int(box.y2)) for box, _ in cut]
    return Card(
        question=sample.question,
        solution=sample.solution,
        answer=extract_answer(trajectory.text) or "none",
        thinking=thinking,
        is_right=is_right,
        image=image_uri(draw_boxes(image, [box for box, _ in cut], sample.gold_box)),
        crops=tuple(image_uri(resize(image, size, box)) for box, (_, size) in zip(boxes, cut)),
        boxes=tuple(str(list(box)) for box in boxes),
    )


def draw_boxes(image: Image.Image, boxes: Sequence[Box], gold_box: Box | None) -> Image.Image:
    """The picture at page width with the model's boxes and the gold box, which is drawn first and a little larger."""
    scale = SHOWN_WIDTH / image.width
    shown = image.resize(Size(SHOWN_WIDTH, round(image.height * scale)))
    draw = ImageDraw.Draw(shown)
    if gold_box:
        draw.rectangle(
            [side * scale + shift for side, shift in zip(gold_box, (-4, -4, 4, 4))], outline=GOLD_COLOUR, width=2
        )
    for box in boxes:
        draw.rectangle([side * scale for side in box], outline=BOX_COLOUR, width=2)
    return shown
