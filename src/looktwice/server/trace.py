"""What the model did on the way to an answer, as plain data: OpenAI's API has no place for it, so it is in a field of
its own, `looktwice`, of each choice."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image

from looktwice.asking.answer import Answer, Crop
from looktwice.asking.asked import Asked
from looktwice.calls import TOOL_CALL_OPEN
from looktwice.geometry import Box
from looktwice.messages import THINK_CLOSE, THINK_OPEN
from looktwice.rollout.trajectory import StopReason, Trajectory

SMALL_SIDE_PX = 256
"""The longer side of a crop's small picture, at the most."""
CUT: tuple[StopReason, ...] = (
    "max_turns",
    "max_tokens",
    "max_turn_tokens",
    "max_visual_tokens",
    "max_seconds",
    "no_room",
    "cancelled",
)
"""The reasons that OpenAI calls `length`: a limit ended the answer."""


Images = Mapping[tuple[int, Box | None], str | None]
"""The small pictures of crops by picture number and box, as data: URLs; they are made off the event loop."""


def crop_event(crop: Crop, number: int, images: Images | None) -> dict[str, Any]:
    """A crop as it happens: `number` counts the calls of an answer from 1, `box` is in whole pixels of the original
    picture number `image`, None where the call was refused for `error`; `label` are the words in the call."""
    return {"type": "crop", "number": number, **crop_fields(crop, images)}


def crop_fields(crop: Crop, images: Images | None) -> dict[str, Any]:
    """A crop with its label, and with its small picture where there are `images`."""
    fields = {**crop.plain(), "label": label_of(crop.text)}
    return fields if images is None else {**fields, "image_url": images.get(place_of(crop))}


def place_of(crop: Crop) -> tuple[int, Box | None]:
    """What a crop's small picture is kept by."""
    return crop.image_number, crop.box


def label_of(call: str) -> str | None:
    """The words before the bracket of a call as it was written; None without any."""
    return call.removeprefix(TOOL_CALL_OPEN).partition("[")[0].strip() or None


def small_image(crop: Crop) -> str | None:
    """The crop as a data: URL, its longer side of SMALL_SIDE_PX at the most."""
    if crop.box is None or not isinstance(crop.source, Image.Image):
        return None
    x1, y1, x2, y2 = (int(side) for side in crop.box)
    image = crop.source.crop((x1, y1, x2, y2))
    image.thumbnail((SMALL_SIDE_PX, SMALL_SIDE_PX))
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def trace_of(answer: Answer, images: Images | None, *, is_json: bool) -> dict[str, Any]:
    """All that an answer tells: response, parsed, tool_calls, grounding, crops, stop_reason, picture, tokens, seconds;
    boxes and points in pixels of the original."""
    crops = [crop_fields(crop, images) for crop in answer.crops]
    told = {"type": "trace", **answer, "crops": crops}
    # JSON by a schema needs no tags around it
    return {**told, "stop_reason": "answered"} if is_json and answer.stop_reason == "no_answer" else told


def finish_reason(reason: StopReason) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "length" if reason in CUT else "stop"


def usage_of(asked: list[Asked]) -> dict[str, Any]:
    """Tokens of all answers to a request. The prompt counts once; what crops put in counts as read, not as written."""
    answers = [one.answer for one in asked if one.answer is not None]
    prompt = max((answer.tokens.prompt for answer in answers), default=0)
    crops = sum(answer.tokens.crops for answer in answers)
    written = sum(answer.tokens.written for answer in answers)
    return {
        "prompt_tokens": prompt + crops,
        "completion_tokens": written,
        "total_tokens": prompt + crops + written,
        "prompt_tokens_details": {"cached_tokens": 0, "crop_tokens": crops},
        "completion_tokens_details": {"reasoning_tokens": sum(map(reasoning_tokens, asked))},
    }


def reasoning_tokens(asked: Asked) -> int:
    """Ids that were sampled between the tags of thinking."""
    template = asked.episode.processor.template
    return thinking_length(asked.episode.trajectory, template.token_id(THINK_OPEN), template.token_id(THINK_CLOSE))


def thinking_length(trajectory: Trajectory, open_id: int, close_id: int) -> int:
    """Sampled ids of a rollout between the first opening id and the closing one after it."""
    ids = trajectory.completion_ids
    if open_id not in ids:
        return 0
    first = ids.index(open_id) + 1
    last = ids.index(close_id, first) if close_id in ids[first:] else len(ids)
    return sum(trajectory.is_sampled[first:last])
