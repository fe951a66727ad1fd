"""RefCOCO, RefCOCO+ and RefCOCOg: where in a picture is what a phrase says."""

from __future__ import annotations

import re

from looktwice.benches.item import Item
from looktwice.benches.reading import Fields
from looktwice.errors import DataError
from looktwice.grounding import grounding_question

_SPLIT = re.compile(r"[A-Za-z]*")


def ref_coco(row: Fields) -> list[Item]:
    """An item for each phrase of a row, its category the split that the file is named for. The box is x, y, width and
    height in original pixels, or corners where it is named `solution`."""
    phrases = row.texts("answer") if isinstance(row.values.get("answer"), list) else (row.text("answer", "sentence"),)
    corners = row.boxes("solution")
    boxes = corners or row.boxes("bbox", has_sides=True)
    if len(boxes) != 1:
        raise DataError(f"{row.where}: {len(boxes)} boxes where the phrase has one; it is no row of this benchmark")
    image = row.image("image", "file_name")
    written = ", ".join(f"{side:g}" for side in boxes[0])
    return [
        Item(
            images=(image,),
            question=grounding_question(phrase, "box"),
            about=phrase,
            gold=(f"[{written}]",),
            category=_SPLIT.match(row.file.name)[0],  # type: ignore[index]
            gold_boxes=boxes,
            group=row.where,
        )
        for phrase in phrases
    ]
