"""Samples to examples, and the order samples come in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from looktwice.data.dataset import BatchOrder, encode_sample
from looktwice.data.records import Sample
from looktwice.errors import DataError, ImageError
from looktwice.processing.processor import Example, Ovis2_5Processor

RESPONSE = "<think>\nLook. <tool_call>[0, 0, 48, 48]</tool_call> Red.\n</think>\n\n<answer>red</answer>"


@pytest.fixture
def sample(tmp_path: Path, picture: Image.Image) -> Sample:
    picture.save(tmp_path / "picture.png")
    return Sample(
        image_path=tmp_path / "picture.png",
        question="What colour?",
        response=RESPONSE,
        solution="red",
        gold_box=None,
        where="train.jsonl:3",
        field="QnA[1].A3",
    )


def text_of(example: Example, processor: Ovis2_5Processor, *, is_trained: bool) -> str:
    return processor.decode([i for i, flag in zip(example.input_ids, example.loss_mask) if flag is is_trained])


# -- encode_sample


def test_the_answer_and_its_turn_end_are_trained_and_nothing_else(sample, processor) -> None:
    example = encode_sample(sample, processor, max_length=1000)
    assert text_of(example, processor, is_trained=True) == f"{RESPONSE}<|im_end|>"
    assert text_of(example, processor, is_trained=False) == (
        "<|im_start|>user\n\nWhat colour?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_crop_stands_right_behind_its_call(sample, processor) -> None:
    example = encode_sample(sample, processor, max_length=1000)
    place = example.input_ids.index(processor.template.token_id("</tool_call>")) + 1
    crop = processor.image_ids(example.images[1])
    assert example.input_ids[place : place + len(crop)] == crop
    assert not any(example.loss_mask[place : place + len(crop)])


def test_an_answer_without_calls_has_one_picture(sample, processor) -> None:
    example = encode_sample(replace(sample, response="<answer>red</answer>"), processor, max_length=1000)
    assert len(example.images) == 1
    assert text_of(example, processor, is_trained=True) == "<answer>red</answer><|im_end|>"


def test_an_answer_may_begin_and_end_with_a_call(sample, processor) -> None:
    call = "<tool_call>[0, 0, 48, 48]</tool_call>"
    example = encode_sample(replace(sample, response=call + call), processor, max_length=1000)
    assert len(example.images) == 3
    assert text_of(example, processor, is_trained=True) == f"{call}{call}<|im_end|>"


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("[500, 500, 600, 600]", "The box lies outside the picture."),
        ("[48, 0, 0, 48]", "The box must run from its top-left to its bottom-right corner."),
        ("there", "No box found."),
    ],
)
def test_a_call_that_cannot_be_run_names_file_line_and_field(call, problem, sample, processor) -> None:
    bad = replace(sample, response=f"<tool_call>{call}</tool_call><answer>red</answer>")
    with pytest.raises(DataError) as caught:
        encode_sample(bad, processor, max_length=1000)
    message = str(caught.value)
    assert message.startswith("train.jsonl:3: QnA[1].A3: crop call refused: ")
    assert problem in message and message.endswith("; mend its box")


def test_a_sample_of_just_max_length_tokens_is_taken_and_a_longer_one_refused(sample, processor) -> None:
    length = len(encode_sample(sample, processor, max_length=1000))
    assert len(encode_sample(sample, processor, max_length=length)) == length
    with pytest.raises(
        DataError, match=rf"^train\.jsonl:3: {length} tokens, more than max_length {length - 1}; .*lower"
    ):
        encode_sample(sample, processor, max_length=length - 1)


def test_a_picture_that_turns_out_to_be_cut_short_is_named(sample, processor) -> None:
    data = sample.image_path.read_bytes()
    sample.image_path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"picture\.png"):
        encode_sample(sample, processor, max_length=1000)


# -- BatchOrder


def order(*, num_epochs: float = 2, max_steps: int | None = None, seed: int = 0) -> BatchOrder:
    return BatchOrder(7, samples_per_step=3, num_epochs=num_epochs, max_steps=max_steps, seed=seed)


def test_each_epoch_takes_every_sample_once_and_its_last_step_is_short() -> None:
    steps = [order()[step] for step in range(6)]
    assert [len(step) for step in steps] == [3, 3, 1, 3, 3, 1]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(number for step in epoch for number in step) == list(range(7))
    assert steps[:3] != steps[3:]


def test_a_step_is_a_function_of_seed_and_step_alone() -> None:
    first = order()
    for step in (4, 0, 2, 4):
        assert order()[step] == first[step]
    assert [order(seed=1)[step] for step in range(3)] != [first[step] for step in range(3)]


@pytest.mark.parametrize(
    ("num_epochs", "max_steps", "total_steps"),
    [(2, None, 6), (0.5, None, 2), (1.2, None, 4), (0, None, 0), (2, 4, 4), (1, 4, 4), (0, 4, 4)],
)
def test_epochs_and_max_steps_limit_the_run(num_epochs, max_steps, total_steps) -> None:
    assert order(num_epochs=num_epochs, max_steps=max_steps).total_steps == total_steps


def test_epochs_are_counted_in_steps() -> None:
    assert [order().epoch(step) for step in (0, 1, 3, 6)] == pytest.approx([0, 1 / 3, 1, 2])
