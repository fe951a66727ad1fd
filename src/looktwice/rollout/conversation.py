"""Conversations to examples with the crops in place: the one way for SFT data and for the prompts of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from PIL import Image

from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, format_call, parse_call, split_calls
from looktwice.errors import BoxError, DataError
from looktwice.geometry import Box, BoxFrame, Size, check_box, from_original, to_original
from looktwice.messages import Conversation, ImagePart, ImageSource, Purpose, TextPart, VideoPart
from looktwice.processing.images import PatchedImage, image_size, open_image
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.processing.video import NUM_FRAMES, open_video
from looktwice.rollout.crop_tool import CropTool, rectangle_of


def open_images(conversation: Conversation, *, num_frames: int = NUM_FRAMES) -> Conversation:
    """The same conversation with its pictures and its video (`num_frames` of a file) decoded.

    Raises ImageError for one that fails.
    """

    def opened(part: TextPart | ImagePart | VideoPart) -> TextPart | ImagePart | VideoPart:
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

    Crops are cut from the first picture, by the tool that rollouts use.
    Raises DataError for a call that cannot be run; it names the message (counted from 1) unless it is the last.
    """
    images = [source for source in conversation.images if isinstance(source, Image.Image)]
    tool = CropTool(processor, is_video=bool(conversation.videos))
    patched: list[PatchedImage] = []

    def with_crops(text: str, place: str) -> Iterator[TextPart | ImagePart]:
        for segment in split_calls(text):
            if segment:
                yield TextPart(text=segment)
            if segment.endswith(TOOL_CALL_CLOSE):
                observation = tool.look(segment, images[0] if images else None)
                if observation.image is None:
                    raise DataError(f"{place}crop call refused: {observation.text}; mend its box")
                patched.append(observation.image)
                yield ImagePart(source=images[0])

    messages = []
    for number, message in enumerate(conversation.messages, 1):
        parts: list[TextPart | ImagePart | VideoPart] = []
        place = f"message {number}: " if number < len(conversation.messages) else ""
        for part in message.parts:
            if isinstance(part, TextPart) and message.role == "assistant":
                parts += with_crops(part.text, place)
                continue
            if isinstance(part, ImagePart):
                assert isinstance(part.source, Image.Image)
                patched.append(processor.patch_image(part.source))
            elif isinstance(part, VideoPart):
                patched.append(processor.patch_video(part.source))  # type: ignore[arg-type]
            parts.append(part)
        messages.append(replace(message, parts=tuple(parts)))
    shown = Conversation(messages=tuple(messages))
    spans = processor.template.spans(shown, purpose=purpose, thinking=thinking)
    return processor.assemble(spans, patched)


def in_model_frame(
    conversation: Conversation,
    frame: BoxFrame | None,
    processor: Ovis2_5Processor,
    size_of: Callable[[ImageSource], Size] = image_size,
) -> Conversation:
    """The same conversation with the boxes of its calls, which are in `frame`, in the frame of the model.

    None is the model's frame already. Pixels and thousandths are written as whole numbers, fractions with three
    digits; a box keeps all its digits where rounding decides whether it can be cut. A call that cannot be read stays
    as it is.
    `size_of` gives the upright size of the first picture.
    """
    if frame is None or frame == processor.box_frame or not conversation.images:
        return conversation
    original = size_of(conversation.images[0])
    resized = processor.overview_size(original)

    def is_cut(box: Box) -> bool:
        try:
            rectangle_of(check_box(box), processor, original)
        except BoxError:
            return False
        return True

    def moved(call: str) -> str:
        try:
            box = to_original(parse_call(call), frame=frame, original=original, resized=resized)
        except BoxError:
            return call
        box = from_original(box, frame=processor.box_frame, original=original, resized=resized)
        rounded = Box(*(round(side, 3 if processor.box_frame == "unit" else 0) for side in box))
        numbers = format_call(rounded if is_cut(box) and is_cut(rounded) else box)
        numbers = numbers.removeprefix(f"{TOOL_CALL_OPEN}[").removesuffix(f"]{TOOL_CALL_CLOSE}")
        # words may stand before the bracket
        return f"{call[: call.rindex('[') + 1]}{numbers}{call[call.rindex(']') :]}"

    def moved_part(part: TextPart | ImagePart | VideoPart) -> TextPart | ImagePart | VideoPart:
        if not isinstance(part, TextPart):
            return part
        *segments, rest = split_calls(part.text)
        return TextPart(text="".join([*map(moved, segments), rest]))

    messages = (
        replace(message, parts=tuple(map(moved_part, message.parts))) if message.role == "assistant" else message
        for message in conversation.messages
    )
    return Conversation(messages=tuple(messages))
