"""Where the crops of an answer lie: how well they meet the boxes that hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from looktwice.geometry import Box, iou

LOCATED = 0.5
"""Of the gold boxes' area: so much of it seen in crops counts as found."""


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Over the `num_answers` that cropped and have a gold box: the best IoU of a crop, how much of the gold boxes all
    crops cover, and the share whose best IoU is above 0.5. Of these answers `read_wrong` is the share that saw it and
    was wrong, and `located_wrong` that which did not see it and was wrong."""

    num_answers: int
    max_iou: float
    coverage: float
    above_half: float
    read_wrong: float
    located_wrong: float


def grounding_of(lines: Sequence[Mapping[str, Any]]) -> Grounding | None:
    """The grounding of answers' lines; None where none cropped beside a gold box."""
    found = []
    for line in lines:
        golds, crops = boxes_of(line["gold_boxes"]), crops_of(line)
        if golds and crops and line["score"] is not None:
            best = max(iou(crop, gold) for crop in crops for gold in golds)
            found.append((best, coverage(golds, crops), line["score"] >= 0.5))
    if not found:
        return None
    return Grounding(
        num_answers=len(found),
        max_iou=fmean(best for best, _, _ in found),
        coverage=fmean(covered for _, covered, _ in found),
        above_half=fmean(best > 0.5 for best, _, _ in found),
        read_wrong=fmean(covered >= LOCATED and not is_right for _, covered, is_right in found),
        located_wrong=fmean(covered < LOCATED and not is_right for _, covered, is_right in found),
    )


def crops_of(line: Mapping[str, Any]) -> list[Box]:
    """What was cut from the first picture, in original pixels."""
    return boxes_of([crop["box"] for crop in line["crops"] if crop["box"] is not None and crop["image"] == 1])


def boxes_of(written: Sequence[Sequence[float]]) -> list[Box]:
    return [Box(*box) for box in written]


def coverage(golds: Sequence[Box], crops: Sequence[Box]) -> float:
    """How much of the area of the gold boxes lies in a crop; what several boxes or crops share counts once.

    Example: coverage([Box(0, 0, 10, 10)], [Box(0, 0, 5, 10), Box(0, 0, 10, 5)]) == 0.75
    """
    xs = np.unique([side for box in (*golds, *crops) for side in (box.x1, box.x2)])
    ys = np.unique([side for box in (*golds, *crops) for side in (box.y1, box.y2)])
    areas = np.outer(np.diff(ys), np.diff(xs))
    gold, seen = _within(golds, xs, ys), _within(crops, xs, ys)
    total = areas[gold].sum()
    return float(areas[gold & seen].sum() / total) if total else 0.0


def _within(boxes: Sequence[Box], xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Which cells between the lines `xs` [X] and `ys` [Y] lie in a box, [Y - 1, X - 1]."""
    inside = np.zeros((len(ys) - 1, len(xs) - 1), dtype=bool)
    for box in boxes:
        columns = (xs[:-1] >= box.x1) & (xs[1:] <= box.x2)
        rows = (ys[:-1] >= box.y1) & (ys[1:] <= box.y2)
        inside |= np.outer(rows, columns)
    return inside
