"""Lines of a result as an evaluation writes them, for tests of what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECIPE = {
    "model": {"name": "m", "fingerprint": "f", "dtype": "float32", "quantization": "none"},
    "pixels": {"image_max_pixels": 100},
    "generation": {"temperature": 0.0},
    "samples": 1,
    "preset": "none",
    "judge": None,
    "benches": {"vstar": {"files": {"a.jsonl": "1"}, "rows": 4, "limit": None}},
}


def line(id: str, condition: str, score: float | None, **other: Any) -> dict[str, Any]:
    """The line of an answer with one crop unless `crops` says otherwise."""
    crop = {"image": 1, "box": [0, 0, 10, 10], "requested": None, "size": [48, 48], "error": None}
    return {
        "bench": "vstar",
        "id": id,
        "condition": condition,
        "sample": 0,
        "row": int(id.split(".")[0]) - 1,
        "about": f"Question {id}",
        "question": f"Question {id}",
        "options": ["red", "blue"],
        "gold": ["A"],
        "gold_boxes": [[0, 0, 10, 10]],
        "category": "direct_attributes",
        "group": id,
        "facts": {},
        "score": score,
        "prediction": "A" if score else "B",
        "by": "lone",
        "measures": {},
        "crops": [] if condition in ("no_crop", "text_only", "question_only", "more_pixels") else [crop],
        "response": "<answer>A</answer>",
        "stop_reason": "answered",
        "error": None,
        "tokens": {"prompt": 50, "written": 10, "crops": 9},
        "num_overview_tokens": 30,
        **other,
    }


def write(path: Path, *lines: dict[str, Any], **recipe: Any) -> Path:
    start = {"recipe": {**RECIPE, **recipe}, "start": {}}
    path.write_text("".join(json.dumps(one) + "\n" for one in (start, *lines)), encoding="utf-8")
    return path
