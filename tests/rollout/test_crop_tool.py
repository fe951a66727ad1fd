"""The crop tool: what is refused and in which words, what is cut, and that SFT data and rollouts show the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from looktwice.data.examples import encode_sample
from looktwice.data.sample import Sample
from looktwice.geometry import Box, BoxFrame, PixelPolicy, Size
from looktwice.messages import Conversation, assistant, user
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.crop_tool import REFUSALS, CropTool, observed, refusal

STRIP = Image.new("RGB", (2000, 16))


def with_frame(processor: Ovis2_5Processor, frame: BoxFrame) -> Ovis2_5Processor:
    return Ovis2_5Processor(processor.tokenizer, processor.config, processor.policy, frame)


@pytest.mark.parametrize(
    ("call", "reason", "requested"),
    [
        ("<tool_call>there</tool_call>", "no_box", None),
        ("[1, 2, 3, 4]</tool_call>", "no_box", None),
        ("", "no_box", None),
        ("<tool_call>[1, 2, 3]</tool_call>", "wrong_length", None),
        ("<tool_call>[1, 2, 3, NaN]</tool_call>", "not_a_number", None),
        ("<tool_call>[1, 2, 3, 1e999]</tool_call>", "not_a_number", None),
        ("<tool_call>[30, 2, 1, 40]</tool_call>", "reversed", None),
        ("<tool_call>[1, 2, 1, 40]</tool_call>", "reversed", None),
        ("<tool_call>[160, 0, 170, 10]</tool_call>", "outside", (160, 0, 170, 10)),
        ("<tool_call>[-20, -20, 0, 10]</tool_call>", "outside", (-20, -20, 0, 10)),
    ],
)
def test_a_call_that_cannot_be_run_is_refused_with_its_reason(call, reason, requested, processor, image) -> None:
    observation = CropTool(processor).look(call, [image])
    assert observation.image is None
    assert observation.text == f"<tool_response>{REFUSALS[reason]}</tool_response>"
    assert (observation.call.error, observation.call.is_valid) == (reason, False)
    assert (observation.call.requested, observation.call.box, observation.call.size) == (requested, None, None)


def test_a_strip_is_refused_as_too_thin(processor) -> None:
    assert CropTool(processor).look("[0, 0, 2000, 16]", [STRIP]).call.error == "too_thin"


def test_a_call_without_an_image_is_refused_and_keeps_the_box_as_written(processor) -> None:
    call = CropTool(processor).look("[1, 2, 30, 40]", []).call
    assert (call.error, call.requested) == ("no_picture", Box(1, 2, 30, 40))


@pytest.mark.parametrize("number", [0, 3, 99])
def test_a_picture_that_is_not_there_is_refused_and_named_in_the_record(number, processor, image) -> None:
    call = CropTool(processor).look(f"image {number} [1, 2, 30, 40]", [image, image]).call
    assert (call.error, call.requested, call.image_number) == ("no_such_picture", Box(1, 2, 30, 40), number)


@pytest.mark.parametrize(
    ("words", "number"), [("", 1), ("picture 1 ", 1), ("Crop cup 2 ", 1), ("image 2 ", 2), ("Crop cup in image 3 ", 3)]
)
def test_a_crop_is_cut_from_the_picture_that_its_call_names(words, number, processor, image) -> None:
    shown = [image, image.rotate(90, expand=True), image.resize((300, 200))]
    tool = CropTool(processor)
    seen = tool.look(f"<tool_call>{words}[20, 10, 90.5, 110]</tool_call>", shown)
    alone = tool.look("[20, 10, 90.5, 110]", [shown[number - 1]])
    assert torch.equal(seen.image.pixel_values, alone.image.pixel_values)
    assert seen.call == replace(alone.call, image_number=number)


def test_a_call_about_a_video_is_refused_and_keeps_the_box_as_written(processor, image) -> None:
    tool = CropTool(processor, is_video=True)
    call = tool.look("[1, 2, 30, 40]", [image]).call
    assert (call.error, call.requested, call.box) == ("video", Box(1, 2, 30, 40), None)
    assert tool.look("[1, 2]", []).call.error == "wrong_length"


def test_the_model_reads_these_words() -> None:
    assert REFUSALS == {
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


def test_a_refusal_is_inserted_as_its_text(processor) -> None:
    ids, images = observed(refusal("outside", None), processor)
    assert processor.decode(ids) == "<tool_response>The box lies outside the picture.</tool_response>"
    assert images == []


@pytest.mark.parametrize(
    ("frame", "call"),
    [
        ("original_px", "[40, 24, 120, 96]"),
        ("resized_px", "[24, 16, 72, 64]"),
        ("unit", "[0.25, 0.2, 0.75, 0.8]"),
        ("norm1000", "[250, 200, 750, 800]"),
    ],
)
def test_the_same_region_is_cut_in_every_box_frame(frame, call, processor, image) -> None:
    assert processor.overview_size(Size(*image.size)) == Size(96, 80)
    tool = CropTool(with_frame(processor, frame))
    observation = tool.look(call, [image])
    assert observation.call.box == Box(40, 24, 120, 96)
    expected = CropTool(processor).look("[40, 24, 120, 96]", [image]).image
    assert torch.equal(observation.image.pixel_values, expected.pixel_values)


def test_a_crop_has_the_pixels_of_the_original(processor, image) -> None:
    # 48 x 48 pixels are cut and, at this policy, shown at 48 x 48: not one pixel is interpolated
    observation = CropTool(processor).look("<tool_call>Crop it [90, 50, 138, 98]</tool_call>", [image])
    expected = processor.patch(image.crop((90, 50, 138, 98)))
    assert torch.equal(observation.image.pixel_values, expected.pixel_values)
    assert observation.image.grid_thw == (1, 6, 6)
    assert observation.call.size == Size(48, 48)


def test_a_box_is_rounded_outwards_and_clamped_to_the_image(processor, image) -> None:
    call = CropTool(processor).look("[100.6, -7, 1e9, 60.2]", [image]).call
    assert (call.requested, call.box) == (Box(100.6, -7, 1e9, 60.2), Box(100, 0, 160, 61))


def test_a_tiny_box_is_enlarged_to_one_visual_token(processor, image) -> None:
    assert CropTool(processor).look("[158, 50, 159, 51]", [image]).call.box == Box(144, 43, 160, 59)


def test_a_crop_is_sized_by_its_own_bounds(processor, image) -> None:
    roomy = Ovis2_5Processor(
        processor.tokenizer, processor.config, PixelPolicy(crop_min_pixels=16 * 16, crop_max_pixels=160 * 160)
    )
    small = CropTool(roomy).look("[0, 0, 32, 32]", [image]).call
    whole = CropTool(roomy).look("[0, 0, 160, 120]", [image]).call
    assert (small.size, whole.size) == (Size(64, 64), Size(160, 128))


def test_a_crop_is_inserted_between_its_indicators(processor, image) -> None:
    observation = CropTool(processor).look("[0, 0, 48, 48]", [image])
    ids, images = observed(observation, processor)
    config = processor.config
    assert ids == [config.image_start_token_id, *[config.image_token_id] * 9, config.image_end_token_id]
    assert images == [observation.image]


@pytest.mark.parametrize(
    ("response", "thinking"),
    [
        ("<think>\nI look {0} and {1}.\n</think>\n\n<answer>7</answer>", True),
        ("<think>\n{0}{1}</think>\n\n<answer>7</answer>", True),
        ("I look {0}\nIt says {1} <answer>7</answer>", False),
    ],
)
def test_sft_data_and_a_rollout_of_the_same_text_are_the_same_ids_and_pixels(
    response, thinking, processor, image, play_scripts, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    image.save(path)
    response = response.format("<tool_call>[90, 50, 138, 98]</tool_call>", "<tool_call>[0, 0, 80, 60.5]</tool_call>")
    conversation = Conversation(messages=(user("What is it?", path), assistant(response)))
    sample = Sample(conversation=conversation, solution="7", where="a:1", field="A3")
    trained = encode_sample(sample, processor, max_length=1000)
    [episode], _ = play_scripts(response + "<|im_end|>", shown=path, question="What is it?", thinking=thinking)
    assert episode.example.input_ids == trained.input_ids
    assert episode.example.loss_mask == trained.loss_mask
    assert len(trained.images) == 3
    for rolled, taught in zip(episode.example.images, trained.images, strict=True):
        assert torch.equal(rolled.pixel_values, taught.pixel_values) and rolled.grid_thw == taught.grid_thw


def test_sft_data_and_a_rollout_cut_the_same_from_each_of_several_pictures(
    processor, image, play_scripts, tmp_path: Path
) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    image.save(paths[0])
    image.rotate(90, expand=True).save(paths[1])
    response = (
        "<tool_call>image 2 [60, 100, 110, 150]</tool_call><tool_call>[0, 0, 80, 60]</tool_call><answer>7</answer>"
    )
    conversation = Conversation(messages=(user("What?", *paths), assistant(response)))
    trained = encode_sample(Sample(conversation=conversation, where="a:1", field="A3"), processor, max_length=1000)
    episode = play_scripts(response + "<|im_end|>", shown=paths, question="What?", thinking=False)[0][0]
    assert episode.example.input_ids == trained.input_ids
    for rolled, taught in zip(episode.example.images, trained.images, strict=True):
        assert torch.equal(rolled.pixel_values, taught.pixel_values)
    assert [call.image_number for call in episode.trajectory.calls] == [2, 1]
