"""The controls: what answers a call instead of its crop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from looktwice.data.sample import Sample
from looktwice.errors import DataError
from looktwice.evaluation.controls import CONTROLS, control_look, control_looks
from looktwice.geometry import Box, Size
from looktwice.messages import question_about
from looktwice.rollout.crop_tool import CropTool

CALL = "<tool_call>[100, 60, 140, 100]</tool_call>"


def test_no_crop_refuses_every_call_and_asks_for_the_answer(processor, image) -> None:
    look = control_look("no_crop", processor, 0)
    seen = look(CALL, [image])
    assert seen.text == "<tool_response>The crop tool is switched off.</tool_response>\n</think>\n\n<answer>"
    assert (seen.image, seen.call.box, seen.call.error) == (None, None, "switched_off")
    assert seen.call.requested == Box(100, 60, 140, 100)


def test_random_crop_cuts_the_same_size_elsewhere(processor, image) -> None:
    look = control_look("random_crop", processor, 0)
    boxes = []
    for _ in range(20):
        seen = look(CALL, [image])
        box = seen.call.box
        assert (box.x2 - box.x1, box.y2 - box.y1) == (40, 40)
        assert min(box.x1, box.y1) >= 0 and box.x2 <= 160 and box.y2 <= 120
        expected = CropTool(processor).look(str(list(box)), [image]).image
        assert torch.equal(seen.image.pixel_values, expected.pixel_values)
        boxes.append(box)
    assert len({box.x1 for box in boxes}) > 10 and len({box.y1 for box in boxes}) > 10
    assert Box(100, 60, 140, 100) not in boxes


def test_random_crop_of_the_whole_image_is_the_whole_image(processor, image) -> None:
    seen = control_look("random_crop", processor, 0)("[0, 0, 160, 120]", [image])
    assert seen.call.box == Box(0, 0, 160, 120)


def test_random_crops_repeat_with_the_seed(processor, image) -> None:
    boxes = []
    for seed in (0, 0, 1):
        look = control_look("random_crop", processor, seed)
        boxes.append([look(CALL, [image]).call.box for _ in range(5)])
    assert boxes[0] == boxes[1] != boxes[2]


def test_blank_crop_shows_grey_of_the_same_size(processor, image) -> None:
    seen = control_look("blank_crop", processor, 0)(CALL, [image])
    crop = CropTool(processor).look(CALL, [image])
    grey = processor.patch(Image.new("RGB", (48, 48), (128, 128, 128)))
    assert seen.call == crop.call and seen.call.size == Size(48, 48)
    assert seen.image.grid_thw == crop.image.grid_thw
    assert torch.equal(seen.image.pixel_values, grey.pixel_values)


def test_gold_crop_shows_the_box_of_the_answer_whatever_is_asked_for(processor, image) -> None:
    gold = Box(100, 60, 140, 100)
    right = CropTool(processor).look(CALL, [image])
    for asked in ("<tool_call>[0, 0, 40, 40]</tool_call>", "<tool_call>there</tool_call>"):
        seen = control_look("gold_crop", processor, 0, gold)(asked, [image])
        assert (seen.call.box, seen.call.error) == (gold, None)
        assert torch.equal(seen.image.pixel_values, right.image.pixel_values)


def test_gold_crop_holds_all_gold_boxes_of_a_sample(processor, image) -> None:
    boxes = {"gold_box": Box(100, 60, 140, 100), "more_gold_boxes": (Box(60, 80, 80, 110),)}
    sample = Sample(conversation=question_about("What?", Path("a.png")), where="a:1", field="A", **boxes)
    [look] = control_looks("gold_crop", processor, [sample], 0)
    assert look(CALL, [image]).call.box == Box(60, 60, 140, 110)


def test_gold_crop_needs_a_gold_box(processor) -> None:
    with pytest.raises(DataError, match="needs the box that holds the answer"):
        control_look("gold_crop", processor, 0)


@pytest.mark.parametrize("control", CONTROLS[:3])
def test_a_control_answers_for_the_picture_that_the_call_names(control, processor, image) -> None:
    shown = [image.crop((0, 0, 60, 60)), image]
    seen = control_look(control, processor, 0)("image 2 [100, 60, 140, 100]", shown)
    assert (seen.call.image_number, seen.call.requested) == (2, Box(100, 60, 140, 100))
    if control == "random_crop":
        expected = CropTool(processor).look(f"image 2 {list(seen.call.box)}", shown).image
        assert torch.equal(seen.image.pixel_values, expected.pixel_values)


@pytest.mark.parametrize("control", ["random_crop", "blank_crop"])
def test_a_call_that_cannot_be_run_is_refused_as_ever(control, processor, image) -> None:
    look, tool = control_look(control, processor, 0), CropTool(processor)
    for call, shown in (("[500, 0, 600, 40]", [image]), ("there", [image]), (CALL, [])):
        assert look(call, shown) == tool.look(call, shown)


def test_there_are_these_controls() -> None:
    assert CONTROLS == ("no_crop", "random_crop", "blank_crop", "gold_crop")
