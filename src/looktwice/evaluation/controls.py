"""Controls of an evaluation: what answers a crop call instead of the crop, to show what the crop is worth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from PIL import Image

from looktwice.calls import parse_call
from looktwice.data.sample import Sample
from looktwice.engine.sampling import mixed_seed
from looktwice.errors import DataError
from looktwice.geometry import Box, Size, crop_rectangle, crop_size, hull, iou
from looktwice.messages import ANSWER_OPEN, THINK_CLOSE
from looktwice.processing.images import resize
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.crop_tool import CropTool, Observation, refusal
from looktwice.rollout.episode import Look

Control = Literal["no_crop", "random_crop", "blank_crop", "gold_crop", "call_without_result"]
CONTROLS: tuple[Control, ...] = get_args(Control)[:4]
"""Those of the demo. `conditions.py` has all that an evaluation asks under."""
GREY = (128, 128, 128)
ANSWER_NOW = f"\n{THINK_CLOSE}\n\n{ANSWER_OPEN}"
"""Closes thinking and opens the answer, so that a model without its crop guesses instead of calling again."""


def control_look(
    control: Control,
    processor: Ovis2_5Processor,
    seed: int,
    gold_box: Box | None = None,
    gold_image: Image.Image | None = None,
) -> Look:
    """The look of a control for one question.

    no_crop: the call is refused and the model must answer at once. random_crop: the same size, cut elsewhere in the
    same picture. blank_crop: grey of the same size. gold_crop: whatever the call asks for, the box that holds the
    answer (`gold_box`, in pixels of the original), which is the most that crops can do for this model; where a set
    gives the region as a picture of its own that is shown. call_without_result: nothing follows the first call, and a
    second one is refused as in no_crop.
    Raises DataError for gold_crop without box and picture.
    """
    tool = CropTool(processor)
    rng = random.Random(seed)
    has_called: list[bool] = []
    at_crops: Any = {"factor": processor.factor, "policy": processor.policy}
    if control == "gold_crop" and gold_box is None and gold_image is None:
        raise DataError("a gold crop needs the box that holds the answer; the question has none")

    def no_crop(call_text: str, images: Sequence[Image.Image]) -> Observation:
        refused = refusal("switched_off", None)
        call = replace(tool.look(call_text, images).call, box=None, size=None, error="switched_off")
        return replace(refused, call=call, text=refused.text + ANSWER_NOW)

    def random_crop(call_text: str, images: Sequence[Image.Image]) -> Observation:
        seen = tool.look(call_text, images)
        if seen.call.box is None:
            return seen
        call = parse_call(call_text)
        image = call.pick(images)
        return tool.cut(_elsewhere(seen.call.box, Size(*image.size), rng), image, call)

    def blank_crop(call_text: str, images: Sequence[Image.Image]) -> Observation:
        seen = tool.look(call_text, images)
        if seen.call.size is None:
            return seen
        return Observation(call=seen.call, image=processor.patch(Image.new("RGB", seen.call.size, GREY)), text="")

    def gold_crop(call_text: str, images: Sequence[Image.Image]) -> Observation:
        seen = tool.look(call_text, images)
        if gold_image is not None and images:
            size = crop_size((0, 0, *gold_image.size), original=Size(*images[0].size), **at_crops)
            call = replace(seen.call, box=None, size=size, error=None, image_number=1)
            return Observation(call=call, image=processor.patch(resize(gold_image, size)), text="")
        if gold_box is None or not images:
            return seen
        rectangle = crop_rectangle(gold_box, original=Size(*images[0].size), min_side=processor.factor)
        cut = tool.cut(rectangle, images[0], None)
        call = replace(seen.call, box=cut.call.box, size=cut.call.size, error=None, image_number=1)
        return replace(cut, call=call)

    def nothing(call_text: str, images: Sequence[Image.Image]) -> Observation:
        if has_called:
            return no_crop(call_text, images)
        has_called.append(True)
        call = replace(tool.look(call_text, images).call, box=None, size=None, error="no_result")
        return Observation(call=call, image=None, text="")

    looks = {
        "no_crop": no_crop,
        "random_crop": random_crop,
        "blank_crop": blank_crop,
        "gold_crop": gold_crop,
        "call_without_result": nothing,
    }
    return looks[control]


def control_looks(control: Control, processor: Ovis2_5Processor, samples: Sequence[Sample], seed: int) -> list[Look]:
    """The looks of a control, one for each question; chance goes by seed and the question's place."""
    return [
        control_look(control, processor, mixed_seed(seed, number), hull(sample.gold_boxes))
        for number, sample in enumerate(samples)
    ]


def _elsewhere(box: Box, original: Size, rng: random.Random) -> tuple[int, int, int, int]:
    """A rectangle of the same size, clear of the box when one of 50 draws is."""
    width, height = int(box.x2 - box.x1), int(box.y2 - box.y1)
    for _ in range(50):
        left, top = rng.randint(0, original.width - width), rng.randint(0, original.height - height)
        rectangle = left, top, left + width, top + height
        if iou(box, Box(*rectangle)) == 0:
            break
    return rectangle
