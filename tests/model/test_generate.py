"""transformers' `generate` on the model: rows of any length, pictures of any size, from a prompt or from a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.model.mixer import Mixer, image_inputs, padded_inputs
from torch import Tensor
from transformers import DynamicCache, TextIteratorStreamer

from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.processor import Example, Ovis2_5Processor

NUM_NEW = 4


@pytest.fixture
def mixer(model: Ovis2_5ForConditionalGeneration) -> Mixer:
    return Mixer(model.config, seed=0)


def greedy_by_hand(model: Ovis2_5ForConditionalGeneration, example: Example) -> list[int]:
    """The most likely continuation without visual ids, and without any cache."""
    example = example.copy()
    for _ in range(NUM_NEW):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids]), **image_inputs([example])).logits[0, -1]
        logits[list(model.config.visual_token_ids)] = -torch.inf
        example.append([int(logits.argmax())], is_trained=False)
    return example.input_ids[-NUM_NEW:]


def generate(model: Ovis2_5ForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    """The new ids of each row."""
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def test_a_left_padded_batch_goes_on_as_each_row_alone(model: Ovis2_5ForConditionalGeneration, mixer: Mixer) -> None:
    examples = [mixer.example(number) for number in (2, 0, 1, 0, 3)]
    together = generate(model, padded_inputs(examples, "left"))
    assert together == [greedy_by_hand(model, example) for example in examples]


def test_without_a_cache_every_step_sees_the_images_again(model: Ovis2_5ForConditionalGeneration, mixer: Mixer) -> None:
    examples = [mixer.example(number) for number in (2, 0, 1)]
    inputs = padded_inputs(examples, "left")
    assert generate(model, inputs, use_cache=False) == generate(model, inputs)


def test_a_ragged_batch_goes_on_from_its_cache_with_only_the_new_images(
    model: Ovis2_5ForConditionalGeneration, mixer: Mixer
) -> None:
    examples = [mixer.example(number) for number in (2, 0, 1)]
    first = padded_inputs(examples, "left")
    turn = model.generate(**first, max_new_tokens=2, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    additions = [Example(), Example(), Example()]
    for number, (example, addition) in enumerate(zip(examples, additions)):
        example.append(turn.sequences[number, -2:].tolist(), is_trained=True)
        for _ in range(number):
            mixer.append_image(addition, mixer.image())
        addition.append([7, 8, 9][number:], is_trained=False)
    second = padded_inputs(additions, "left")
    written = torch.ones(3, 2, dtype=torch.long)
    inputs = second | {
        "input_ids": torch.cat([turn.sequences, second["input_ids"]], dim=1),
        "attention_mask": torch.cat([first["attention_mask"], written, second["attention_mask"]], dim=1),
    }
    for example, addition in zip(examples, additions):
        example.append(addition.input_ids, is_trained=False)
        example.images += addition.images
    generated = generate(model, inputs, past_key_values=turn.past_key_values)
    assert generated == [greedy_by_hand(model, example) for example in examples]


def test_returned_sequences_of_a_cached_batch_see_the_images_of_their_own_row(
    model: Ovis2_5ForConditionalGeneration, mixer: Mixer
) -> None:
    prompt = mixer.example(1)
    first = padded_inputs([prompt], "left")
    with torch.no_grad():
        cache: DynamicCache = model(**first, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    whole = prompt.copy()
    mixer.append_image(whole, mixer.image())
    inputs = {"input_ids": torch.tensor([whole.input_ids]), **image_inputs([whole])}
    inputs["image_grid_thw"] = inputs["image_grid_thw"][1:]
    inputs["pixel_values"] = whole.images[1].pixel_values
    torch.manual_seed(0)
    generated = generate(model, inputs, past_key_values=cache, do_sample=True, num_return_sequences=2, top_k=1)
    assert generated == [greedy_by_hand(model, whole)] * 2


def test_equal_seeds_sample_equally_and_others_do_not(model: Ovis2_5ForConditionalGeneration, mixer: Mixer) -> None:
    inputs = padded_inputs([mixer.example(number) for number in (1, 0, 2)], "left")
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate(model, inputs, do_sample=True, temperature=2.0, top_k=0))
    assert runs[0] == runs[1] != runs[2]


def test_each_returned_sequence_sees_the_images_of_its_own_row(
    model: Ovis2_5ForConditionalGeneration, mixer: Mixer
) -> None:
    examples = [mixer.example(number) for number in (2, 0, 1)]
    generated = generate(
        model, padded_inputs(examples, "left"), do_sample=True, num_return_sequences=3, top_k=1, temperature=1.0
    )
    assert generated == [greedy_by_hand(model, example) for example in examples for _ in range(3)]


def test_beams_of_a_batch_are_those_of_each_row_alone(model: Ovis2_5ForConditionalGeneration, mixer: Mixer) -> None:
    examples = [mixer.example(number) for number in (2, 0, 1)]
    options = {"num_beams": 3, "num_return_sequences": 2}
    together = generate(model, padded_inputs(examples, "left"), **options)
    alone = [row for example in examples for row in generate(model, padded_inputs([example], "left"), **options)]
    assert together == alone


def test_an_image_is_encoded_once_for_all_sequences_of_its_row(
    model: Ovis2_5ForConditionalGeneration, mixer: Mixer
) -> None:
    example = mixer.example(2)
    encoded: list[Tensor] = []
    hook = model.model.visual_tokenizer.vit.register_forward_hook(lambda tower, inputs, out: encoded.append(inputs[0]))
    try:
        generate(model, padded_inputs([example], "left"), do_sample=True, num_return_sequences=4)
    finally:
        hook.remove()
    assert [len(pixels) for pixels in encoded] == [sum(len(image.pixel_values) for image in example.images)]


@pytest.mark.parametrize("suppressed", [None, [11, 12]])
def test_visual_ids_are_never_sampled_whatever_else_is_suppressed(
    model: Ovis2_5ForConditionalGeneration, suppressed: list[int] | None
) -> None:
    forbidden = {*model.config.visual_token_ids, *(suppressed or [])}
    likely = {*model.config.visual_token_ids, 11, 12, 13}

    def prefer(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        output.logits[..., sorted(likely)] += 1000.0

    hook = model.register_forward_hook(prefer)
    try:
        sampled = generate(
            model,
            {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)},
            do_sample=True,
            max_new_tokens=20,
            suppress_tokens=suppressed,
            top_k=3,
        )[0]
    finally:
        hook.remove()
    assert set(sampled) <= likely - forbidden


def test_the_users_own_generation_config_is_left_as_it_is(model: Ovis2_5ForConditionalGeneration) -> None:
    before = model.generation_config.to_dict()
    generate(model, {"input_ids": torch.tensor([[5, 6]])})
    assert model.generation_config.to_dict() == before


def test_text_streams_while_it_is_generated(
    model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, mixer: Mixer
) -> None:
    example = mixer.example(1)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    new_ids = generate(model, padded_inputs([example], "left"), streamer=streamer)[0]
    assert "".join(streamer) == processor.tokenizer.decode(new_ids)
