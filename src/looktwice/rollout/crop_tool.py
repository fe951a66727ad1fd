"""The crop tool: the text of a call in, a crop or a short refusal out. Used by SFT data, rollouts and inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from looktwice.calls import TOOL_RESPONSE_CLOSE, TOOL_RESPONSE_OPEN, Call, parse_call
from looktwice.errors import BoxError
from looktwice.geometry import Box, Size, crop_rectangle, crop_size, to_original
from looktwice.processing.images import PatchedImage, resize
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.trajectory import ToolCall

REFUSALS = {
    "no_box": "No box found. Write four numbers in square brackets.",
    "wrong_length": "A box has four numbers.",
    "not_a_number": "A box has four finite numbers.",
    "reversed": "The box must run from its top-left to its bottom-right corner.",
    "outside": "The box lies outside the picture.",
    "too_thin": "The box is too thin.",
    "no_picture": "There is no picture to look at.",
    "no_such_picture": "There is no picture with this number.",
    "video": "A video cannot be cropped.",
    "switched_off": "The crop tool is switched off.",
    "no_more_crops": "There are no more crops. Answer now.",
}
"""What the model reads for each reason: short, and without numbers that could give the answer's place away."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What follows a call: the record, and either the crop or a text in tool-response tags."""

    call: ToolCall
    image: PatchedImage | None
    text: str


class CropTool:
    """Cuts regions of pictures at full resolution, under the policy and box frame of the processor.

    With `is_video` the conversation is about a video and every box is refused: the model reads pictures or one video.
    """

    def __init__(self, processor: Ovis2_5Processor, *, is_video: bool = False) -> None:
        self.processor = processor
        self.is_video = is_video

    def look(self, call_text: str, images: Sequence[Image.Image]) -> Observation:
        """Run the call that ends `call_text` on the upright RGB pictures that are shown before it, in order.

        Never raises for what a model can write.
        """
        call: Call | None = None
        try:
            call = parse_call(call_text)
            if self.is_video:
                raise BoxError("video", "a crop was asked for in a conversation about a video")
            image = call.pick(images)
            rectangle = rectangle_of(call.box, self.processor, Size(*image.size))
        except BoxError as error:
            return refusal(error.reason, call)
        return self.cut(rectangle, image, call)

    def cut(self, rectangle: tuple[int, int, int, int], image: Image.Image, call: Call | None) -> Observation:
        """The crop of a rectangle that is already known to fit the picture that `call`, if there is one, names."""
        original = Size(*image.size)
        size = crop_size(rectangle, original=original, factor=self.processor.factor, policy=self.processor.policy)
        crop = self.processor.patch(resize(image, size, rectangle))
        box = Box(*(float(side) for side in rectangle))
        return Observation(call=_record(call, box=box, size=size), image=crop, text="")


def rectangle_of(requested: Box, processor: Ovis2_5Processor, original: Size) -> tuple[int, int, int, int]:
    """What is cut from a picture of this upright size for a box in the model's frame. Raises BoxError if nothing is."""
    resized = processor.overview_size(original)
    box = to_original(requested, frame=processor.box_frame, original=original, resized=resized)
    return crop_rectangle(box, original=original, min_side=processor.factor)


def written_call(text: str) -> Call | None:
    """The call that ends a text, None where it cannot be read."""
    try:
        return parse_call(text)
    except BoxError:
        return None


def refusal(reason: str, call: Call | None) -> Observation:
    """The short text that answers a call which cannot be run; None is one that cannot be read."""
    return Observation(call=_record(call, error=reason), image=None, text=tool_response(REFUSALS[reason]))


def _record(
    call: Call | None, *, box: Box | None = None, size: Size | None = None, error: str | None = None
) -> ToolCall:
    requested, image_number = call or (None, 1)
    return ToolCall(requested=requested, box=box, size=size, error=error, image_number=image_number)


def tool_response(text: str) -> str:
    """Tool text in the tags the model was trained to read."""
    return f"{TOOL_RESPONSE_OPEN}{text}{TOOL_RESPONSE_CLOSE}"


def observed(observation: Observation, processor: Ovis2_5Processor) -> tuple[list[int], list[PatchedImage]]:
    """The ids that follow a call, and the picture their atoms show (none for a refusal)."""
    if observation.image is None:
        return processor.template.encode(observation.text), []
    return processor.image_ids(observation.image), [observation.image]
