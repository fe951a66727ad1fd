"""Lengths from headers alone, against the sequences themselves, and the pixel bounds that make a sample fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from looktwice.data.examples import encode_sample, processor_for
from looktwice.data.lengths import sequence_lengths, shrunk_policy
from looktwice.data.sample import Sample
from looktwice.errors import DataError
from looktwice.geometry import BOX_FRAMES, PixelPolicy
from looktwice.messages import Conversation, ImagePart, Message, TextPart, system
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.conversation import encode_conversation, in_model_frame, open_images
from looktwice.rollout.episode import EpisodeRules, start_episodes

SCALES = {"original_px": 100, "resized_px": 50, "unit": 1, "norm1000": 1000}
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["<think>a</think> b", "\n\nnew", "<|im_end|>", "<image>", "  ", "e\u0301"]
)


@st.composite
def calls(draw: st.DrawFn, frame: str) -> str:
    low, high = draw(st.floats(0, 0.4)), draw(st.floats(0.6, 1.2))
    box = [round(share * SCALES[frame], 3) for share in (low, draw(st.floats(0, 0.4)), high, draw(st.floats(0.6, 1)))]
    words = draw(st.sampled_from(["", "Crop cup 1 ", "image 1 ", "image 2 ", "Crop cup in picture 3 "]))
    return f"<tool_call>{words}{box}</tool_call>"


@st.composite
def images(draw: st.DrawFn, folder: Path) -> Path:
    size = draw(st.tuples(st.integers(1, 400), st.integers(1, 400)))
    exif = Image.Exif()
    exif[0x0112] = draw(st.integers(1, 8))
    path = folder / f"{size[0]}x{size[1]}_{exif[0x0112]}.jpg"
    Image.new("RGB", size).save(path, exif=exif)
    return path


@st.composite
def samples(draw: st.DrawFn, folder: Path) -> Sample:
    frame = draw(st.sampled_from(BOX_FRAMES))
    shown = ImagePart(source=draw(images(folder)))
    messages = [system(draw(TEXTS))] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        more = [ImagePart(source=draw(images(folder)))] if draw(st.booleans()) else []
        parts = [*([] if turn else [shown]), *more, TextPart(text=draw(TEXTS))]
        messages.append(Message(role="user", parts=tuple(parts)))
        pieces = draw(st.lists(TEXTS | calls(frame), max_size=4))
        answer = TextPart(text="".join(pieces))
        messages.append(Message(role="assistant", parts=(answer,), is_trained=turn == 0 or draw(st.booleans())))
    box_frame = draw(st.sampled_from([None, frame])) if frame == "original_px" else frame
    return Sample(conversation=Conversation(messages=tuple(messages)), box_frame=box_frame, where="a:1", field="A3")  # type: ignore[arg-type]


def sequence_length(sample: Sample, processor: Ovis2_5Processor) -> int:
    [length] = sequence_lengths([sample], processor)
    return length


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_closed_formula_gives_the_length_of_the_sequence(data, processor, tmp_path_factory) -> None:
    sample = data.draw(samples(tmp_path_factory.mktemp("pictures")))
    try:
        length = sequence_length(sample, processor)
    except DataError:  # a box that rounding or an extreme picture makes too thin, or a picture that is not there
        with pytest.raises(DataError):
            encode_sample(sample, processor, max_length=10**9)
        return
    assert length == len(encode_sample(sample, processor, max_length=10**9))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_length_of_a_prompt_counts_the_crops_of_earlier_answers(data, processor, tmp_path_factory) -> None:
    sample = data.draw(samples(tmp_path_factory.mktemp("pictures")))
    try:
        [length] = sequence_lengths([sample], processor, purpose="prompt")
    except DataError:
        return
    prompt = open_images(in_model_frame(sample.prompt, sample.box_frame, processor))
    assert length == len(encode_conversation(prompt, processor, purpose="prompt"))


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    answer = "<think>Look. <tool_call>[0, 0, 300, 300]</tool_call></think>\n\n<answer>red</answer>"
    question = Message(role="user", parts=(ImagePart(source=tmp_path / "a.png"), TextPart(text="What?")))
    reply = Message(role="assistant", parts=(TextPart(text=answer),))
    return Sample(conversation=Conversation(messages=(question, reply)), where="a.jsonl:1", field="A3")


def test_an_image_is_not_decoded(sample: Sample, processor: Ovis2_5Processor) -> None:
    [path] = sample.image_paths
    length = sequence_length(sample, processor)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    assert sequence_length(sample, processor) == length


def test_texts_are_tokenised_at_once_with_the_same_counts(processor: Ovis2_5Processor) -> None:
    texts = ["<|im_end|>", "", "Look <think>", "e\u0301\n\n", "<image>"]
    assert processor.template.count(texts) == [len(processor.template.encode(text)) for text in texts]


@pytest.mark.parametrize("frame", ["original_px", "resized_px"])
def test_a_sample_fits_at_its_shrunk_policy_and_not_at_the_next_larger_one(sample, processor, frame) -> None:
    sample = replace(sample, box_frame=frame)
    length = sequence_length(sample, processor)
    limit = length - 8
    policy = shrunk_policy(sample, processor, limit)
    assert policy is not None
    shrunk = replace(sample, policy=policy)
    assert len(encode_sample(shrunk, processor, max_length=limit)) == sequence_length(shrunk, processor) <= limit
    assert (policy.image_max_pixels < processor.policy.image_max_pixels) == (frame == "original_px")
    larger = shrunk_policy(sample, processor, length - 1)
    assert larger is not None and larger.crop_max_pixels >= policy.crop_max_pixels


def test_a_sample_that_fits_keeps_its_policy(sample: Sample, processor: Ovis2_5Processor) -> None:
    assert shrunk_policy(sample, processor, 10**6) == processor.policy


def test_a_sample_whose_text_alone_is_too_long_has_no_policy(sample: Sample, processor: Ovis2_5Processor) -> None:
    assert shrunk_policy(sample, processor, 20) is None


def test_a_processor_at_another_policy_leaves_the_first_as_it_was(processor: Ovis2_5Processor) -> None:
    before = processor.policy
    small = PixelPolicy(image_min_pixels=1, image_max_pixels=64 * 64)
    other = processor.at(small)
    assert (other.policy, processor.policy) == (small, before)
    assert other.tokenizer is processor.tokenizer


def test_a_sample_without_bounds_of_its_own_takes_the_processor_itself(sample, processor) -> None:
    assert processor_for(sample, processor) is processor


def test_a_call_that_cannot_be_run_is_named(sample: Sample, processor: Ovis2_5Processor) -> None:
    far = Message(role="assistant", parts=(TextPart(text="<tool_call>[900, 900, 950, 950]</tool_call>"),))
    messages = (sample.conversation.messages[0], far)
    with pytest.raises(DataError, match=r"^a\.jsonl:1: A3: crop call refused: the box lies outside"):
        sequence_length(replace(sample, conversation=Conversation(messages=messages)), processor)


def test_rollouts_start_from_a_prompt_of_its_shrunk_size(sample: Sample, processor: Ovis2_5Processor) -> None:
    [length] = sequence_lengths([sample], processor, purpose="prompt")
    policy = shrunk_policy(sample, processor, length - 4, purpose="prompt")
    shrunk = replace(sample, policy=policy)
    [episode] = start_episodes(sample.prompt, processor_for(shrunk, processor), EpisodeRules())
    assert [len(episode.example)] == sequence_lengths([shrunk], processor, purpose="prompt") <= [length - 4]
