"""Conversations to examples with the crops in place: the one way for SFT data and for the prompts of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from PIL import Image

from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, format_call, parse_call, split_calls
from looktwice.errors import BoxError, DataError
from looktwice.geometry import Box, BoxFrame, Size, check_box, from_original, to_original
from looktwice.messages import Conversation, CropPart, ImagePart, ImageSource, Part, Purpose, TextPart, VideoPart
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

    Crops are cut from the first picture, by the tool that rollouts use.
    Raises DataError for a call that cannot be run; it names the message (counted from 1) unless it is the last.
    """
    first = next((source for source in conversation.images if isinstance(source, Image.Image)), None)
    tool = CropTool(processor, is_video=bool(conversation.videos))
    crops: list[PatchedImage] = []

    def cut(text: str, place: str) -> None:
        observation = tool.look(text, first)
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


def with_crops(conversation: Conversation, cut: Callable[[str, str], None]) -> Conversation:
    """The same conversation with the place of a crop after each call of an assistant.

    `cut` is told, in order, the text that ends in a call and where it stands: "message 2: ", of the last message "".
    """

    def cut_at_calls(text: str, place: str) -> Iterator[Part]:
        for segment in split_calls(text):
            if segment:
                yield TextPart(text=segment)
            if segment.endswith(TOOL_CALL_CLOSE):
                cut(segment, place)
                yield CropPart()

    messages = []
    for number, message in enumerate(conversation.messages, 1):
        if message.role == "assistant":
            place = f"message {number}: " if number < len(conversation.messages) else ""
            parts = [
                piece
                for part in message.parts
                for piece in (cut_at_calls(part.text, place) if isinstance(part, TextPart) else (part,))
            ]
            message = replace(message, parts=tuple(parts))
        messages.append(message)
    return Conversation(messages=tuple(messages))


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

    def moved_part(part: Part) -> Part:
        if not isinstance(part, TextPart):
            return part
        *segments, rest = split_calls(part.text)
        return TextPart(text="".join([*map(moved, segments), rest]))

    messages = (
        replace(message, parts=tuple(map(moved_part, message.parts))) if message.role == "assistant" else message
        for message in conversation.messages
    )
    return Conversation(messages=tuple(messages))
