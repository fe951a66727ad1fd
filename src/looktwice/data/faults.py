"""What can be said of one sample, one picture, one box: its faults, as codes of REASONS and words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from looktwice.answers import find_answer_block
from looktwice.calls import split_calls
from looktwice.config import CheckConfig
from looktwice.data.problems import BOX_REASONS, Problem
from looktwice.data.sample import Sample, text_of
from looktwice.errors import BoxError, ImageError
from looktwice.geometry import Box, BoxFrame, PixelPolicy, Size, crop_rectangle, iou, smart_resize, to_original
from looktwice.messages import THINK_CLOSE, THINK_OPEN, Message, TextPart
from looktwice.processing.chat_template import TURN_CLOSE, TURN_OPEN
from looktwice.processing.images import DATA_ADDRESS, PictureHeader, open_image, read_header
from looktwice.processing.processor import TEXT_END, VISUAL_TOKENS, Ovis2_5Processor

SLACK_PX = 1.0
"""How far a box may reach over its picture before it is noted."""
MIN_SIDE_PX = 2
"""Shortest side of a box that is taken for pixels."""
WHOLE_SHARE = 0.98
"""Share of the picture from which on a crop counts as the whole of it."""
SPECIAL_TEXTS = (TURN_OPEN, TURN_CLOSE, TEXT_END, *(token for token in VISUAL_TOKENS if "_" in token))
RELEASED_FACTOR = 32

Source = str | Path


class Picture(NamedTuple):
    """What is known of a picture: its header, or the reason why it cannot be used."""

    header: PictureHeader | None
    reason: str = ""
    what: str = ""


@dataclass(frozen=True, kw_only=True)
class View:
    """How pictures are seen: by a processor, or where none is named by the released models' defaults."""

    policy: PixelPolicy
    factor: int = RELEASED_FACTOR
    box_frame: BoxFrame = "original_px"

    @classmethod
    def of(cls, processor: Ovis2_5Processor | None, config: CheckConfig) -> View:
        """What the processor sees, or without one what the settings make of the defaults."""
        if processor:
            return cls(policy=processor.policy, factor=processor.factor, box_frame=processor.box_frame)
        policy = PixelPolicy().override(**config.pixel_bounds)
        return cls(policy=policy, box_frame=config.box_frame or "original_px")

    def overview_size(self, original: Size) -> Size:
        low, high = self.policy.image_min_pixels, self.policy.image_max_pixels
        return smart_resize(original, factor=self.factor, min_pixels=low, max_pixels=high)


def turn_problems(sample: Sample, stage: str) -> Iterator[Problem]:
    """What is wrong with the turns of a sample and their texts."""
    messages = sample.conversation.messages
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(turns)):
        yield problem_of(sample, "role_order", f"the turns are {', '.join(roles)}")
    if stage != "grpo" and not any(message.role == "assistant" and message.is_trained for message in messages):
        yield problem_of(sample, "no_target", "no assistant turn is trained")
    if stage != "sft" and not sample.solution:
        yield problem_of(sample, "no_gold_answer", 'no <answer> block and no field "answer"')
    elif roles[-1] == "assistant" and find_answer_block(sample.response) is None:
        yield problem_of(sample, "no_answer_block", "no <answer>…</answer> in the answer")
    for message in messages:
        yield from text_problems(sample, message)


def text_problems(sample: Sample, message: Message) -> Iterator[Problem]:
    text = text_of(message)
    if spelled := [token for token in SPECIAL_TEXTS if token in text]:
        yield problem_of(sample, "spells_token", f"the {message.role} writes {', '.join(spelled)}")
    if message.role == "assistant":
        opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
        if opened != closed or opened > 1 or (opened and text.index(THINK_OPEN) > text.index(THINK_CLOSE)):
            yield problem_of(sample, "think_not_closed", f"{opened} {THINK_OPEN} and {closed} {THINK_CLOSE}")


def call_faults(requested: Box, frame: BoxFrame, header: PictureHeader, view: View) -> Iterator[tuple[str, str]]:
    """Code and words of what is wrong with the box of a call."""
    size = header.size
    box = to_original(requested, frame=frame, original=size, resized=view.overview_size(size))
    name = f"the picture of {size.width}x{size.height}"
    try:
        left, top, right, bottom = crop_rectangle(box, original=size, min_side=view.factor)
    except BoxError as error:
        yield BOX_REASONS[error.reason], str(error)
    else:
        if (over := _overhang(box, size)) > SLACK_PX:
            yield "box_partly_outside", f"it reaches {over:.0f} pixels over {name}"
        if (right - left) * (bottom - top) >= WHOLE_SHARE * size.width * size.height:
            yield "box_whole_picture", f"it shows all of {name}"
    yield from rotation_faults(box, header)
    if frame != "unit" and min(requested) >= 0 and max(requested) <= 1:
        yield "box_looks_unit", "no number is above 1"
    limit = {"unit": 1.0, "norm1000": 1000.0}.get(frame)
    are_sides_px = min(requested.x2 - requested.x1, requested.y2 - requested.y1) >= MIN_SIDE_PX
    if limit and max(requested) > limit * 1.05 and are_sides_px and _overhang(requested, size) <= SLACK_PX:
        yield "box_looks_px", f"a number is above {limit:.0f}, and as pixels the box lies inside {name}"


def gold_faults(box: Box, header: PictureHeader) -> Iterator[tuple[str, str]]:
    """Code and words of what is wrong with a gold box, which is in original pixels."""
    size = header.size
    name = f"the picture of {size.width}x{size.height}"
    if iou(box, Box(0, 0, *size)) == 0:
        yield "gold_box_outside", f"it lies outside {name}"
    elif (over := _overhang(box, size)) > SLACK_PX:
        yield "box_partly_outside", f"it reaches {over:.0f} pixels over {name}"
    yield from rotation_faults(box, header)
    if min(box) >= 0 and max(box) <= 1:
        yield "box_looks_unit", "no number is above 1"


def rotation_faults(box: Box, header: PictureHeader) -> Iterator[tuple[str, str]]:
    stored, size = header.stored, header.size
    if stored != size and _overhang(box, size) > SLACK_PX >= _overhang(box, stored):
        yield (
            "box_rotated",
            f"it fits {stored.width}x{stored.height}, the picture upright is {size.width}x{size.height}",
        )


def inspected(source: Source) -> Picture:
    """A picture by its header, or what is wrong with it."""
    try:
        return Picture(read_header(source))
    except ImageError as error:
        return _refused(source, error)


def decoded(source: Source) -> Picture:
    """As `inspected`, but decoded to its end."""
    picture = inspected(source)
    try:
        if picture.header:
            open_image(source)
    except ImageError as error:
        return _refused(source, error)
    return picture


def _refused(source: Source, error: ImageError) -> Picture:
    is_file = not str(source).startswith(DATA_ADDRESS)
    if isinstance(error.__cause__, FileNotFoundError):
        return Picture(None, "picture_missing", "no such picture")
    if is_file and os.path.isfile(source) and os.path.getsize(source) == 0:
        return Picture(None, "picture_empty", "the file has 0 bytes")
    if error.__cause__ is None or type(error.__cause__).__name__ == "DecompressionBombError":
        return Picture(None, "picture_huge", "too many pixels")
    return Picture(None, "picture_damaged", str(error).removeprefix(f"{shown_name(source)}: "))


def calls_of(sample: Sample) -> list[str]:
    """Texts that end in a call, in order."""
    return [
        segment
        for message in sample.conversation.messages
        if message.role == "assistant"
        for part in message.parts
        if isinstance(part, TextPart)
        for segment in split_calls(part.text)[:-1]
    ]


def problem_of(sample: Sample, reason: str, what: str) -> Problem:
    return Problem(reason=reason, where=sample.where, field=sample.field, what=what)


def shown_name(source: Source) -> str:
    return f"{str(source)[:40]}..." if str(source).startswith(DATA_ADDRESS) else str(source)


def _overhang(box: Box, size: Size) -> float:
    """How many pixels a box reaches over a picture, at most 0 for one that does not."""
    return max(-box.x1, -box.y1, box.x2 - size.width, box.y2 - size.height)


def written(box: Box) -> str:
    return f"[{', '.join(f'{side:g}' for side in box)}]"
