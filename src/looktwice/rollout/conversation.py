"""Conversations to examples with the crops in place: the one way for SFT data and for the prompts of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache

from PIL import Image

from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, format_call, parse_call, split_calls
from looktwice.errors import BoxError, DataError
from looktwice.geometry import Box, BoxFrame, Size, check_box, from_original, to_original
from looktwice.messages import (
    Conversation,
    CropPart,
    ImagePart,
    ImageSource,
    Message,
    Part,
    Purpose,
    TextPart,
    VideoPart,
)
from looktwice.processing.images import PatchedImage, image_size, open_image
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.processing.video import NUM_FRAMES, open_video
from looktwice.rollout.crop_tool import CropTool, rectangle_of


def open_images(conversation: Conversation, *, num_frames: int = NUM_FRAMES) -> Conversation:
    """The same conversation with its pictures and its video (`num_frames` of a file) decoded.

    Raises ImageError for one that fails.
    """

    def opened(part: Part) -> Part:
        if isinstance(part, ImagePart):
            return ImagePart(source=open_image(part.source))
        return VideoPart(source=open_video(part.source, num_frames)) if isinstance(part, VideoPart) else part

    messages = (replace(message, parts=tuple(map(opened, message.parts))) for message in conversation.messages)
    return Conversation(messages=tuple(messages))


def encode_conversation(
    conversation: Conversation,
    processor: Ovis2_5Processor,
    *,
    purpose: Purpose,
    thinking: bool = True,
) -> Example:
    """A conversation of `open_images` as an Example in which each call of an assistant is followed by its crop.

    Crops are cut by the tool that rollouts use, from the pictures that stand before the call.
    Raises DataError for a call that cannot be run; it names the message (counted from 1) unless it is the last.
    """
    images: list[Image.Image] = conversation.images  # type: ignore[assignment]
    tool = CropTool(processor, is_video=bool(conversation.videos))
    crops: list[PatchedImage] = []

    def cut(text: str, place: str, num_shown: int) -> None:
        observation = tool.look(text, images[:num_shown])
        if observation.image is None:
            raise DataError(f"{place}crop call refused: {observation.text}; mend its box")
        crops.append(observation.image)

    shown = with_crops(conversation, cut)
    upcoming = iter(crops)
    patched = [
        next(upcoming) if isinstance(part, CropPart) else _patched(part, processor)
        for message in shown.messages
        for part in message.parts
        if not isinstance(part, TextPart)
    ]
    return processor.assemble(processor.template.spans(shown, purpose=purpose, thinking=thinking), patched)


def _patched(part: ImagePart | VideoPart, processor: Ovis2_5Processor) -> PatchedImage:
    if isinstance(part, VideoPart):
        return processor.patch_video(part.source)  # type: ignore[arg-type]
    assert isinstance(part.source, Image.Image)
    return processor.patch_image(part.source)


def with_crops(conversation: Conversation, cut: Callable[[str, str, int], None]) -> Conversation:
    """The same conversation with the place of a crop after each call of an assistant.

    `cut` is told, in order, the text that ends in a call, where it stands ("message 2: ", of the last message ""), and
    how many pictures are shown before it.
    """

    def cut_at_calls(text: str, number: int, num_shown: int) -> Iterator[Part]:
        place = f"message {number}: " if number < len(conversation.messages) else ""
        for segment in split_calls(text):
            if segment:
                yield TextPart(text=segment)
            if segment.endswith(TOOL_CALL_CLOSE):
                cut(segment, place, num_shown)
                yield CropPart()

    return _with_answers(conversation, cut_at_calls)


def _with_answers(conversation: Conversation, written: Callable[[str, int, int], Iterable[Part]]) -> Conversation:
    """The same conversation with each text of an assistant as `written` gives it.

    `written` is told, in order, the text, the number of its message, counted from 1, and how many pictures are shown
    before it.
    """
    messages: list[Message] = []
    num_shown = 0
    for number, message in enumerate(conversation.messages, 1):
        parts: list[Part] = []
        for part in message.parts:
            if message.role == "assistant" and isinstance(part, TextPart):
                parts += written(part.text, number, num_shown)
            else:
                parts.append(part)
            num_shown += isinstance(part, ImagePart)
        messages.append(replace(message, parts=tuple(parts)))
    return Conversation(messages=tuple(messages))


def in_model_frame(
    conversation: Conversation,
    frame: BoxFrame | None,
    processor: Ovis2_5Processor,
    size_of: Callable[[ImageSource], Size] = image_size,
) -> Conversation:
    """The same conversation with the boxes of its calls, which are in `frame`, in the frame of the model.

    None is the model's frame already. Pixels and thousandths are written as whole numbers, fractions with three
    digits; a box keeps all its digits where rounding decides whether it can be cut. A call that cannot be read, or
    whose picture is not there, stays as it is.
    `size_of` gives the upright size of a picture; only those that calls name are asked for.
    """
    if frame is None or frame == processor.box_frame or not conversation.images:
        return conversation

    @cache
    def size_at(place: int) -> Size:
        return size_of(conversation.images[place])

    def moved(call: str, num_shown: int) -> str:
        try:
            requested = parse_call(call)
            original = size_at(requested.pick(range(num_shown)))
        except BoxError:
            return call
        box = _moved_box(requested.box, frame, processor, original)
        numbers = format_call(box).removeprefix(f"{TOOL_CALL_OPEN}[").removesuffix(f"]{TOOL_CALL_CLOSE}")
        # words may stand before the bracket
        return f"{call[: call.rindex('[') + 1]}{numbers}{call[call.rindex(']') :]}"

    def moved_calls(text: str, _: int, num_shown: int) -> Iterator[Part]:
        *segments, rest = split_calls(text)
        yield TextPart(text="".join([*(moved(segment, num_shown) for segment in segments), rest]))

    return _with_answers(conversation, moved_calls)


def _moved_box(box: Box, frame: BoxFrame, processor: Ovis2_5Processor, original: Size) -> Box:
    """A box in `frame` on a picture of this upright size, in the model's frame and rounded where it stays as good."""
    resized = processor.overview_size(original)

    def is_cut(box: Box) -> bool:
        try:
            rectangle_of(check_box(box), processor, original)
        except BoxError:
            return False
        return True

    pixels = to_original(box, frame=frame, original=original, resized=resized)
    box = from_original(pixels, frame=processor.box_frame, original=original, resized=resized)
    rounded = Box(*(round(side, 3 if processor.box_frame == "unit" else 0) for side in box))
    return rounded if is_cut(box) and is_cut(rounded) else box
