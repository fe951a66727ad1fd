"""An answer: what a finished rollout says, as attributes with types and under the documented keys as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, repeat
from typing import Any

from PIL import Image

from looktwice.answers import after_thinking, extract_answer, split_thinking, strip_tool_text
from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, split_calls
from looktwice.geometry import Box, Size
from looktwice.grounding import Grounding, parse_grounding
from looktwice.messages import ANSWER_CLOSE, ANSWER_OPEN, Conversation, ImageSource
from looktwice.processing.images import PatchedImage, open_image
from looktwice.rollout.trajectory import StopReason, ToolCall, Trajectory


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A crop call and what came of it.

    `text` is the call as the model wrote it, tags included; `box` what was cut, in whole pixels of the original picture
    number `image_number` (from 1), None where the call was refused for `error`; `requested` the box as written, in the
    model's frame; `size` what the crop was resized to. `source` is the picture that it was cut from.
    """

    text: str
    image_number: int
    box: Box | None
    requested: Box | None
    size: Size | None
    error: str | None
    source: ImageSource | None = field(default=None, repr=False, compare=False)

    @property
    def image(self) -> Image.Image | None:
        """The region at full resolution, cut anew at each call; None of a refused call. Raises ImageError as
        `open_image` does, when the picture's file has gone."""
        if self.box is None or self.source is None:
            return None
        x1, y1, x2, y2 = (int(side) for side in self.box)
        return open_image(self.source).crop((x1, y1, x2, y2))

    def plain(self) -> dict[str, Any]:
        """The crop as plain data."""
        return {
            "image": self.image_number,
            "box": None if self.box is None else [int(side) for side in self.box],
            "requested": None if self.requested is None else list(self.requested),
            "size": None if self.size is None else list(self.size),
            "error": self.error,
        }


def crop_of(call: ToolCall, text: str, sources: Sequence[ImageSource]) -> Crop:
    """The crop of a call that ends `text`; `sources` are the pictures of the conversation in order."""
    _, opening, written = text.rpartition(TOOL_CALL_OPEN)
    is_there = 1 <= call.image_number <= len(sources)
    return Crop(
        text=opening + written if opening else TOOL_CALL_CLOSE,
        image_number=call.image_number,
        box=call.box,
        requested=call.requested,
        size=call.size,
        error=call.error,
        source=sources[call.image_number - 1] if is_there else None,
    )


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The parts of a response: its thinking, its short answer ("" where it has none), its boxes and points."""

    think_content: str
    answer_content: str
    grounding: tuple[Grounding, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """How many ids: `prompt` with its visual tokens, `written` by the model, `crops` of visual tokens put in."""

    prompt: int
    written: int
    crops: int


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds from when a question was handed over: until the first id (None without any), and until the end."""

    first: float | None
    total: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer(dict[str, Any]):
    """What came of a question.

    Each attribute is a key too, as plain data that JSON can hold: `answer.parsed.answer_content` is
    `answer["parsed"]["answer_content"]`. `response` is all the model wrote; `crops` are its calls in order, refused
    ones too, and the key `tool_calls` has them as written; `stop_reason` says why it ended, `error` what was raised, if
    that ended it; `seen`, under the key `picture`, is what was shown first (sizes in pixels `original` and `seen`,
    `num_tokens`, and `frames` of a video; None without a picture). `history` is the conversation to go on with, its
    pictures as they were given; it is no key. Two answers are equal when all but their seconds are.
    """

    response: str
    parsed: Parsed
    crops: tuple[Crop, ...] = ()
    stop_reason: StopReason
    error: str | None = None
    seen: dict[str, Any] | None = None
    tokens: Tokens
    seconds: Seconds | None = None
    history: Conversation = field(default=Conversation(messages=()), repr=False)

    def __post_init__(self) -> None:
        grounding = [
            {**asdict(found), "coordinates": None if found.coordinates is None else list(found.coordinates)}
            for found in self.grounding
        ]
        calls = [(crop, crop.plain()) for crop in self.crops]
        plain = {
            "response": self.response,
            "parsed": {**asdict(self.parsed), "grounding": grounding},
            "tool_calls": [
                {"text": one.text, "image": one.image_number, "box": told["requested"]} for one, told in calls
            ],
            "grounding": grounding,
            "crops": [told for _, told in calls],
            "stop_reason": self.stop_reason,
            "error": self.error,
            "picture": self.seen,
            "tokens": asdict(self.tokens),
            "seconds": None if self.seconds is None else asdict(self.seconds),
        }
        self.update(plain)

    @property
    def grounding(self) -> tuple[Grounding, ...]:
        """Boxes and points of the response, in original pixels of the first picture."""
        return self.parsed.grounding

    @property
    def said(self) -> str:
        """What was said aloud: the response without thinking, calls, and the tags of the answer block."""
        return remembered(self.response).replace(ANSWER_OPEN, "").replace(ANSWER_CLOSE, "").strip()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, dict):
            return NotImplemented
        return {**self, "seconds": None} == {**other, "seconds": None}

    __hash__ = None  # type: ignore[assignment]


def answer_of(
    trajectory: Trajectory,
    *,
    history: Conversation | None = None,
    seen: PatchedImage | None = None,
    num_crop_tokens: int = 0,
    seconds: Seconds | None = None,
) -> Answer:
    """The answer of a finished rollout; `history` is the conversation with it, `seen` the first picture or the video
    of its prompt."""
    history = history or Conversation(messages=())
    size, sources = trajectory.image_size, history.images
    texts = chain(split_calls(trajectory.text), repeat(""))
    grounding = tuple(parse_grounding(trajectory.text, size)) if size else ()
    return Answer(
        response=trajectory.text,
        parsed=Parsed(
            think_content=split_thinking(trajectory.text)[0],
            answer_content=extract_answer(trajectory.text) or "",
            grounding=grounding,
        ),
        crops=tuple(crop_of(call, text, sources) for call, text in zip(trajectory.calls, texts)),
        stop_reason=trajectory.stop_reason,
        error=trajectory.error,
        seen=None if seen is None or size is None else _sizes(size, seen),
        tokens=Tokens(prompt=len(trajectory.prompt_ids), written=trajectory.num_sampled, crops=num_crop_tokens),
        seconds=seconds,
        history=history,
    )


def remembered(response: str) -> str:
    """What of a response stands in the history of a conversation: what follows its thinking, without calls, as the
    model reads earlier answers of its own."""
    text, _, _ = strip_tool_text(after_thinking(response)).partition(TOOL_CALL_OPEN)
    return text.replace(TOOL_CALL_CLOSE, "").strip()


def _sizes(original: Size, seen: PatchedImage) -> dict[str, Any]:
    sizes = {"original": list(original), "seen": list(seen.size), "num_tokens": seen.num_tokens}
    return {**sizes, "frames": seen.grid_thw[0]} if seen.is_video else sizes
