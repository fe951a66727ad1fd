"""Samples to examples, and the order samples come in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from looktwice.data.examples import encode_sample
from looktwice.data.order import BatchOrder, balanced
from looktwice.data.sample import Sample
from looktwice.errors import DataError, ImageError
from looktwice.geometry import BoxFrame
from looktwice.messages import Conversation, Message, TextPart, assistant, system, user
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.conversation import in_model_frame
from looktwice.rollout.crop_tool import CropTool

RESPONSE = "<think>\nLook. <tool_call>[0, 0, 48, 48]</tool_call> Red.\n</think>\n\n<answer>red</answer>"


def answered(path: Path, response: str) -> Sample:
    conversation = Conversation(messages=(user("What colour?", path), assistant(response)))
    return Sample(conversation=conversation, solution="red", where="train.jsonl:3", field="QnA[1].A3")


@pytest.fixture
def path(tmp_path: Path, image: Image.Image) -> Path:
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def sample(path: Path) -> Sample:
    return answered(path, RESPONSE)


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


def test_an_answer_without_calls_has_one_image(path, processor) -> None:
    example = encode_sample(answered(path, "<answer>red</answer>"), processor, max_length=1000)
    assert len(example.images) == 1
    assert text_of(example, processor, is_trained=True) == "<answer>red</answer><|im_end|>"


def test_an_answer_may_begin_and_end_with_a_call(path, processor) -> None:
    call = "<tool_call>[0, 0, 48, 48]</tool_call>"
    example = encode_sample(answered(path, call + call), processor, max_length=1000)
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
def test_a_call_that_cannot_be_run_names_file_line_and_field(call, problem, path, processor) -> None:
    bad = answered(path, f"<tool_call>{call}</tool_call><answer>red</answer>")
    with pytest.raises(DataError) as caught:
        encode_sample(bad, processor, max_length=1000)
    message = str(caught.value)
    assert message.startswith("train.jsonl:3: QnA[1].A3: crop call refused: ")
    assert problem in message and message.endswith("; mend its box")


def test_a_sample_of_just_max_length_tokens_is_taken_and_a_longer_one_refused(sample, processor) -> None:
    length = len(encode_sample(sample, processor, max_length=1000))
    assert len(encode_sample(sample, processor, max_length=length)) == length
    with pytest.raises(
        DataError, match=rf"^train\.jsonl:3: QnA\[1\]\.A3: {length} tokens, more than max_length {length - 1}; .*lower"
    ):
        encode_sample(sample, processor, max_length=length - 1)


def test_an_image_that_turns_out_to_be_cut_short_is_named(sample, path, processor) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"picture\.png"):
        encode_sample(sample, processor, max_length=1000)


def talk(*messages: Message, box_frame: BoxFrame | None = None) -> Sample:
    return Sample(conversation=Conversation(messages=messages), box_frame=box_frame, where="a:1", field="m")


CALL = "<tool_call>[0, 0, 48, 48]</tool_call>"


def test_every_assistant_turn_is_trained_and_each_call_followed_by_its_crop(path, image, processor) -> None:
    sample = talk(
        system("Be brief."),
        user("Q", path, image.rotate(180)),
        assistant(f"{CALL} A"),
        user("R", path),
        assistant(CALL),
    )
    example = encode_sample(sample, processor, max_length=1000)
    think = "<think>\n\n</think>\n\n"
    assert text_of(example, processor, is_trained=True) == f"{CALL} A<|im_end|>{CALL}<|im_end|>"
    assert text_of(example, processor, is_trained=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n\n\nQ<|im_end|>\n"
        f"<|im_start|>assistant\n{think}\n<|im_start|>user\n\nR<|im_end|>\n<|im_start|>assistant\n{think}"
    )
    first, second, crop, third, again = example.images
    assert torch.equal(first.pixel_values, third.pixel_values) and not torch.equal(
        first.pixel_values, second.pixel_values
    )
    assert torch.equal(crop.pixel_values, CropTool(processor).look(CALL, [image]).image.pixel_values)
    assert torch.equal(again.pixel_values, crop.pixel_values)


def test_a_turn_that_is_not_trained_is_there_without_a_think_block(path, processor) -> None:
    said = Message(role="assistant", parts=(TextPart(text="A"),), is_trained=False)
    example = encode_sample(talk(user("Q", path), said, user("R"), assistant("B")), processor, max_length=1000)
    assert text_of(example, processor, is_trained=True) == "B<|im_end|>"
    assert "<|im_start|>assistant\nA<|im_end|>\n" in text_of(example, processor, is_trained=False)


@pytest.mark.parametrize(
    "messages",
    [(user("Q"),), (user("Q"), Message(role="assistant", parts=(TextPart(text="A"),), is_trained=False))],
)
def test_a_sample_without_a_turn_to_train_on_is_refused(messages, processor) -> None:
    with pytest.raises(DataError, match="^a:1: m: no assistant turn to train on; add the answer"):
        encode_sample(talk(*messages), processor, max_length=1000)


def test_a_bad_call_of_an_earlier_turn_names_its_message(path, processor) -> None:
    sample = talk(user("Q", path), assistant("<tool_call>[1]</tool_call>"), user("R"), assistant("A"))
    with pytest.raises(DataError, match="^a:1: m: message 2: crop call refused: .*A box has four numbers"):
        encode_sample(sample, processor, max_length=1000)


@pytest.mark.parametrize(
    ("frame", "model_frame", "written", "read"),
    [
        ("unit", "original_px", "[0.25, 0.5, 0.5, 0.752]", "[40, 60, 80, 90]"),
        ("norm1000", "unit", "cup 1 [250, 500, 333.3, 750]", "cup 1 [0.25, 0.5, 0.333, 0.75]"),
        ("original_px", "norm1000", "[40, 60, 80, 90]", "[250, 500, 500, 750]"),
        ("unit", "original_px", "[0.25, 0.5, 0.251, 0.75]", "[40, 60, 40.16, 90]"),
        ("unit", "unit", "[0.2500, 0.5, .5, 0.752]", "[0.2500, 0.5, .5, 0.752]"),
        (None, "unit", "[0.2500, 0.5, .5, 0.752]", "[0.2500, 0.5, .5, 0.752]"),
    ],
)
def test_boxes_are_written_in_the_frame_of_the_model(frame, model_frame, written, read, path, processor) -> None:
    framed = Ovis2_5Processor(processor.tokenizer, processor.config, processor.policy, model_frame)
    sample = talk(user("Q", path), assistant(f"a<tool_call>{written}</tool_call>b"), box_frame=frame)
    example = encode_sample(sample, framed, max_length=1000)
    assert text_of(example, framed, is_trained=True) == f"a<tool_call>{read}</tool_call>b<|im_end|>"


def test_a_box_is_moved_by_the_size_of_the_picture_that_its_call_names(path, tmp_path, processor) -> None:
    Image.new("RGB", (400, 1000)).save(tmp_path / "tall.png")  # the other is 160 x 120
    said = "".join(f"<tool_call>{words}[0.25, 0.5, 0.5, 0.75]</tool_call>" for words in ("", "image 2 ", "image 3 "))
    prompt = Conversation(messages=(user("Q", path, tmp_path / "tall.png"), assistant(said)))
    moved = in_model_frame(prompt, "unit", processor).messages[1].parts[0].text
    assert moved == (
        "<tool_call>[40, 60, 80, 90]</tool_call><tool_call>image 2 [100, 500, 200, 750]</tool_call>"
        "<tool_call>image 3 [0.25, 0.5, 0.5, 0.75]</tool_call>"
    )


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


def test_a_step_is_what_it_always_was() -> None:
    assert [order(seed=3)[step] for step in (0, 2, 4)] == [[6, 2, 0], [5], [4, 2, 0]]


def test_the_permutation_of_an_epoch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: made.append(1) or randperm(*args, **kwargs))
    steps = order()
    assert [len(steps[step]) for step in (4, 5, 3, 4)] == [3, 1, 3, 3]
    assert len(made) == 1


# -- balanced


def test_shares_have_about_the_same_sum() -> None:
    assert balanced([5, 3, 4, 2], 2) == [[0, 3], [1, 2]]
    assert balanced([9, 1, 1, 1], 2) == [[0], [1, 2, 3]]


def test_equal_costs_are_dealt_out_and_some_shares_may_be_empty() -> None:
    assert balanced([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]
    assert balanced([0, 0], 3) == [[0], [1], []]


@settings(max_examples=50, deadline=None)
@given(costs=st.lists(st.integers(0, 1000), max_size=12), num_shares=st.integers(1, 5))
def test_all_shares_together_have_each_place_once(costs: list[int], num_shares: int) -> None:
    shares = balanced(costs, num_shares)
    assert sorted(place for share in shares for place in share) == list(range(len(costs)))
    sums = [sum(costs[place] for place in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs, default=0)
