"""The HTML page of a run: figures, curves and answered questions with their pictures, all in one file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image, ImageDraw

from looktwice.answers import extract_answer, split_thinking
from looktwice.geometry import Box, Size
from looktwice.rollout.episode import Episode

SHOWN_WIDTH = 360
BOX_COLOUR = (230, 30, 30)
GOLD_COLOUR = (20, 160, 60)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table; `rows` are cells already written as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


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
        return " ".join(
            f"{300 * (step - first) / max(1e-9, last - first):.1f},{100 - 100 * (value - low) / max(1e-9, high - low):.1f}"
            for step, value in zip(self.steps, self.values)
        )

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One answered question. `picture` and `crops` are data URIs."""

    question: str
    solution: str
    answer: str
    thinking: str
    is_right: bool
    picture: str
    crops: tuple[str, ...]
    boxes: tuple[str, ...]


def write_page(
    path: Path, *, title: str, lead: str, tables: Sequence[Table], curves: Sequence[Curve], cards: Sequence[Card]
) -> None:
    """Write the page; it needs no other file and no network."""
    environment = Environment(loader=PackageLoader("looktwice", "report"), autoescape=True)
    style = Markup(environment.loader.get_source(environment, "page.css")[0]) if environment.loader else ""
    template = environment.get_template("page.html.jinja")
    html = template.render(title=title, lead=lead, tables=tables, curves=curves, cards=cards, style=style)
    path.write_text(html, encoding="utf-8")


def read_curve(log: Path, metric: str, title: str) -> Curve:
    """A metric of a stage's log.jsonl, at the steps that have it."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    pairs = [(line["step"], line[metric]) for line in lines if metric in line]
    return Curve(title=title, steps=tuple(step for step, _ in pairs), values=tuple(value for _, value in pairs))


def make_card(episode: Episode, question: str, solution: str, *, is_right: bool, gold_box: Box | None) -> Card:
    """A finished episode as a card: its boxes drawn on the picture, its crops as the model saw them."""
    assert episode.image is not None, "a card shows a picture"
    trajectory = episode.trajectory
    thinking, _ = split_thinking(trajectory.text)
    valid = [call for call in trajectory.calls if call.box is not None and call.size is not None]
    crops = tuple(
        data_uri(episode.image.crop(tuple(int(side) for side in call.box)).resize(call.size, Image.Resampling.BILINEAR))
        for call in valid
        if call.box is not None and call.size is not None
    )
    return Card(
        question=question,
        solution=solution,
        answer=extract_answer(trajectory.text) or "none",
        thinking=thinking,
        is_right=is_right,
        picture=data_uri(draw_boxes(episode.image, [call.box for call in valid if call.box], gold_box)),
        crops=crops,
        boxes=tuple(str([int(side) for side in call.box]) for call in valid if call.box),
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


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
