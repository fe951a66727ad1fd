"""The whole network: equal to the released implementation, packed equal to padded, and what it refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import looktwice.model.visual_tokenizer
import looktwice.training.losses
from looktwice.geometry import Size, smart_resize
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import IGNORE_INDEX, Ovis2_5ForConditionalGeneration
from looktwice.processing.images import open_image, patchify, resize
from looktwice.processing.packing import PackedBatch, pack
from looktwice.processing.processor import Example, Ovis2_5Processor

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
ALL_CASES, CASES_WITH_PICTURES = range(3), range(2)

# the golden vocabulary of 512 has no free ids, so visual positions get ids behind it
OUR_IDS = {-300: 514, -301: 515, -302: 516}
CONFIG_IDS = {
    "image_placeholder_id": 512,
    "video_placeholder_id": 513,
    "image_token_id": 514,
    "image_start_token_id": 515,
    "image_end_token_id": 516,
    "video_start_token_id": 517,
    "video_end_token_id": 518,
}
RELEASED_PREFIXES = {
    "llm.model.": "model.language_model.",
    "visual_tokenizer.vit.vision_model.": "model.visual_tokenizer.vit.",
    "visual_tokenizer.head.": "model.visual_tokenizer.head.",
    "vte.": "model.vte.",
}


def load_golden(**options: Any) -> Ovis2_5ForConditionalGeneration:
    config = Ovis2_5Config.from_pretrained(GOLDEN, **CONFIG_IDS)
    return Ovis2_5ForConditionalGeneration.from_pretrained(GOLDEN, config=config, **options).eval()


@pytest.fixture(scope="module")
def golden() -> Ovis2_5ForConditionalGeneration:
    """The golden checkpoint. Tests must not change its weights."""
    return load_golden()


def expected(case: int) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"expected_{case}.safetensors")


def golden_inputs(case: int) -> dict[str, Any]:
    """The released implementation's own inputs, with our ids."""
    stored = expected(case)
    ids = stored["input_ids"]
    for theirs, ours in OUR_IDS.items():
        ids = torch.where(ids == theirs, ours, ids)
    return {
        "input_ids": ids[None],
        "labels": stored["labels"][None],
        "pixel_values": stored.get("pixel_values"),
        "image_grid_thw": stored.get("grid_thws"),
    }


def assert_equal_to_golden(actual: Tensor, wanted: Tensor) -> None:
    """Within 1e-4 of the tensor's largest value."""
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= 1e-4 * wanted.abs().max()


# -- equal to the released implementation


@pytest.mark.parametrize("case", CASES_WITH_PICTURES)
def test_pictures_become_the_golden_pixels(case: int) -> None:
    wanted = expected(case)
    record = CASES[case]
    patched = []
    for name in record["images"]:
        image = open_image(GOLDEN / name)
        size = smart_resize(
            Size(*image.size), factor=32, min_pixels=record["min_pixels"], max_pixels=record["max_pixels"]
        )
        patched.append(patchify(resize(image, size), patch_size=16, stride=2))
    assert [list(image.grid_thw) for image in patched] == wanted["grid_thws"].tolist()
    pixels = torch.cat([image.pixel_values for image in patched])
    # (v / 255 - 0.5) / 0.5 and v / 127.5 - 1 differ in the last bit; one grey value is 0.0078
    torch.testing.assert_close(pixels, wanted["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES_WITH_PICTURES)
@torch.no_grad()
def test_the_tower_gives_the_golden_features(golden: Ovis2_5ForConditionalGeneration, case: int) -> None:
    wanted = expected(case)
    features = golden.model.visual_tokenizer.vit(wanted["pixel_values"], wanted["grid_thws"])
    assert_equal_to_golden(features, wanted["vit_features"])


@pytest.mark.parametrize("case", CASES_WITH_PICTURES)
@torch.no_grad()
def test_features_become_the_golden_visual_tokens(golden: Ovis2_5ForConditionalGeneration, case: int) -> None:
    wanted = expected(case)
    visual_tokens = golden.model.visual_tokenizer.probabilities(wanted["vit_features"])
    assert_equal_to_golden(F.pad(visual_tokens, (0, 4)), wanted["visual_probs"])


@pytest.mark.parametrize("case", CASES_WITH_PICTURES)
@torch.no_grad()
def test_ids_and_pictures_merge_into_the_golden_embeddings(golden: Ovis2_5ForConditionalGeneration, case: int) -> None:
    inputs = golden_inputs(case)
    features = golden.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    embeds = golden.model.embed(inputs["input_ids"], features)
    assert_equal_to_golden(embeds[0], expected(case)["inputs_embeds"])


@pytest.mark.parametrize("case", ALL_CASES)
@torch.no_grad()
def test_the_model_gives_the_golden_logits(golden: Ovis2_5ForConditionalGeneration, case: int) -> None:
    assert_equal_to_golden(golden(**golden_inputs(case)).logits[0], expected(case)["logits"])


@pytest.mark.parametrize("case", ALL_CASES)
@torch.no_grad()
def test_the_model_gives_the_golden_loss(golden: Ovis2_5ForConditionalGeneration, case: int) -> None:
    assert_equal_to_golden(golden(**golden_inputs(case)).loss[None], expected(case)["loss"])


@pytest.mark.parametrize("case", ALL_CASES)
def test_the_loss_has_the_golden_gradients(case: int) -> None:
    model = load_golden()
    model(**golden_inputs(case)).loss.backward()
    parameters = dict(model.named_parameters())
    wanted = {name.removeprefix("grad."): value for name, value in expected(case).items() if name.startswith("grad.")}
    assert len(wanted) == 6
    for name, gradient in wanted.items():
        prefix = next(prefix for prefix in RELEASED_PREFIXES if name.startswith(prefix))
        ours = parameters[RELEASED_PREFIXES[prefix] + name.removeprefix(prefix)].grad
        assert_equal_to_golden(torch.zeros_like(gradient) if ours is None else ours, gradient)


def test_saving_gives_the_released_tensors_back_bit_for_bit(
    golden: Ovis2_5ForConditionalGeneration, tmp_path: Path
) -> None:
    golden.save_pretrained(tmp_path)
    released, saved = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == released.keys()
    assert [name for name in released if not torch.equal(saved[name], released[name])] == []


def test_the_divisor_of_the_loss_can_be_given(golden: Ovis2_5ForConditionalGeneration) -> None:
    inputs = golden_inputs(0)
    num_trained = int((inputs["labels"] != IGNORE_INDEX).sum())
    with torch.no_grad():
        loss = golden(**inputs, num_items_in_batch=2 * num_trained).loss
    assert_equal_to_golden(2 * loss[None], expected(0)["loss"])


# -- packed, padded and alone


class Mixer:
    """Random examples for the tiny model: text of any length around pictures of any small size."""

    def __init__(self, processor: Ovis2_5Processor, seed: int) -> None:
        self.processor = processor
        self.rng = np.random.default_rng(seed)

    def example(self, num_images: int) -> Example:
        example = Example()
        self._text(example)
        for _ in range(num_images):
            self.processor.append_image(example, self.image())
            self._text(example)
        example.loss_mask[0] = False
        return example

    def image(self) -> Any:
        height, width = self.rng.integers(1, 5, 2) * self.processor.factor
        return self.processor.patch(Image.fromarray(self.rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))

    def _text(self, example: Example) -> None:
        length = int(self.rng.integers(2, 9))
        example.append([int(token) for token in self.rng.integers(0, 450, length)], is_trained=False)
        example.loss_mask[-length:] = [bool(flag) for flag in self.rng.integers(0, 2, length)]


@pytest.fixture
def mix(processor: Ovis2_5Processor) -> Callable[..., list[Example]]:
    def make(*num_images: int, seed: int = 0) -> list[Example]:
        mixer = Mixer(processor, seed)
        return [mixer.example(number) for number in num_images]

    return make


def without_mask(batch: PackedBatch) -> dict[str, Any]:
    inputs = batch.model_inputs()
    del inputs["loss_mask"]
    return inputs


@torch.no_grad()
def logits_alone(model: Ovis2_5ForConditionalGeneration, example: Example) -> Tensor:
    images = example.images
    return model(
        input_ids=torch.tensor([example.input_ids]),
        pixel_values=torch.cat([image.pixel_values for image in images]) if images else None,
        image_grid_thw=torch.tensor([image.grid_thw for image in images]) if images else None,
    ).logits[0]


MIXES = [(0, 0), (1, 0, 2), (0, 3, 1), (2, 2, 0, 1)]


@pytest.mark.parametrize("num_images", MIXES)
def test_packed_sequences_give_the_logits_they_give_alone(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]], num_images: tuple[int, ...]
) -> None:
    examples = mix(*num_images)
    with torch.no_grad():
        packed = model(**without_mask(pack(examples))).logits[0]
    alone = torch.cat([logits_alone(model, example) for example in examples])
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_images", MIXES)
def test_padded_rows_give_the_logits_they_give_alone(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]], num_images: tuple[int, ...], side: str
) -> None:
    examples = mix(*num_images)
    longest = max(len(example) for example in examples)
    rows, masks = [], []
    for example in examples:
        padding = [model.config.llm_config.pad_token_id] * (longest - len(example))
        ones, zeros = [1] * len(example), [0] * len(padding)
        rows.append(padding + example.input_ids if side == "left" else example.input_ids + padding)
        masks.append(zeros + ones if side == "left" else ones + zeros)
    batch = pack(examples)
    attention_mask = torch.tensor(masks)
    with torch.no_grad():
        padded = model(
            input_ids=torch.tensor(rows),
            attention_mask=attention_mask,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
        ).logits
    alone = torch.cat([logits_alone(model, example) for example in examples])
    torch.testing.assert_close(padded[attention_mask.bool()], alone, atol=2e-5, rtol=1e-5)


def test_a_picture_shown_in_two_sequences_needs_to_be_stored_only_once(
    model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor
) -> None:
    mixer = Mixer(processor, seed=0)
    shared, other = mixer.image(), mixer.image()
    first, second = Example(), Example()
    for example, images in ((first, [shared, other]), (second, [shared])):
        for image in images:
            processor.append_image(example, image)
            example.append([5, 6, 7], is_trained=True)
    once = pack([first, second])
    twice = without_mask(once) | {
        "pixel_values": torch.cat([image.pixel_values for image in (shared, other, shared)]),
        "image_grid_thw": torch.tensor([image.grid_thw for image in (shared, other, shared)]),
        "image_index": None,
    }
    assert len(once.image_grid_thw) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(**without_mask(once)).logits, model(**twice).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_the_logprobs_of_a_pack_are_those_of_its_logits(
    model: Ovis2_5ForConditionalGeneration,
    mix: Callable[..., list[Example]],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    monkeypatch.setattr(looktwice.training.losses, "LOGPROB_CHUNK", chunk)
    batch = pack(mix(1, 0, 2))
    with torch.no_grad():
        output = model(**batch.model_inputs(), temperature=0.7)
        logits = model(**without_mask(batch)).logits[0]
    places = batch.loss_mask[0].nonzero()[:, 0]
    wanted = F.log_softmax(logits[places - 1] / 0.7, dim=-1)
    chosen = wanted.gather(1, batch.input_ids[0, places][:, None])[:, 0]
    torch.testing.assert_close(output.logprobs, chosen, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(output.entropy, -(wanted.exp() * wanted).sum(-1), atol=2e-5, rtol=1e-5)


def test_no_logits_are_kept_when_only_logprobs_are_asked_for(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    with torch.no_grad():
        assert model(**pack(mix(0)).model_inputs()).logits is None


def gradients(model: Ovis2_5ForConditionalGeneration, batch: PackedBatch) -> dict[str, Tensor]:
    """Of the summed loss, in training mode, with the model left as it was."""
    model.train()
    model.zero_grad()
    (-model(**batch.model_inputs()).logprobs.sum()).backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    model.eval()
    return found


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4)


def test_gradients_do_not_depend_on_where_chunks_end(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = copy.deepcopy(model), pack(mix(2, 1, 0))
    whole = gradients(model, batch)
    monkeypatch.setattr(looktwice.training.losses, "LOGPROB_CHUNK", 3)
    monkeypatch.setattr(looktwice.model.visual_tokenizer, "CHUNK", 2)
    assert_same_gradients(gradients(model, batch), whole)


def test_a_pack_gives_the_sum_of_the_gradients_of_its_sequences(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    model, examples = copy.deepcopy(model), mix(1, 2)
    together = gradients(model, pack(examples))
    parts = [gradients(model, pack([example])) for example in examples]
    assert_same_gradients(together, {name: parts[0][name] + parts[1][name] for name in parts[0]})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_recomputes_every_layer_and_gives_the_same_gradients(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    model, batch = copy.deepcopy(model), pack(mix(1, 0))
    kept = gradients(model, batch)
    model.gradient_checkpointing_enable()
    calls = []
    layers = [*model.model.language_model.layers, *model.model.visual_tokenizer.vit.encoder.layers]
    for number, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    assert_same_gradients(gradients(model, batch), kept)
    assert sorted(calls) == sorted([*range(len(layers))] * 2)


# -- what is refused, and what is allowed


def test_more_visual_tokens_than_pictures_give_is_an_error(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    inputs = without_mask(pack(mix(1)))
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, 0] = model.config.image_token_id
    with pytest.raises(ValueError, match=r"\d+ visual tokens in input_ids, \d+ in the pictures"):
        model(**inputs)


def test_visual_tokens_without_pictures_are_an_error(model: Ovis2_5ForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="1 visual tokens in input_ids, 0 in the pictures"):
        model(input_ids=torch.tensor([[5, model.config.image_token_id, 6]]))


def test_patches_that_do_not_fit_the_grid_are_an_error(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    inputs = without_mask(pack(mix(1)))
    inputs["pixel_values"] = inputs["pixel_values"][:-4]
    with pytest.raises(ValueError, match="image_grid_thw describes"):
        model(**inputs)


def test_a_packed_row_refuses_a_cache(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="uses no cache"):
        model(**without_mask(pack(mix(0))), past_key_values=cache)


def test_a_packed_row_makes_no_cache_even_when_asked(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    with torch.no_grad():
        assert model(**without_mask(pack(mix(0, 0))), use_cache=True).past_key_values is None


def test_a_pack_of_two_rows_is_refused(model: Ovis2_5ForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="one row"):
        model(input_ids=torch.tensor([[5, 6], [7, 8]]), cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))


def test_packed_rows_refuse_an_attention_that_would_mix_them(mix: Callable[..., list[Example]]) -> None:
    eager = load_golden(attn_implementation="eager")
    with pytest.raises(ValueError, match='not "eager"'):
        eager(**without_mask(pack(mix(0, 0))))


def test_padded_rows_give_the_same_logits_with_eager_attention(golden: Ovis2_5ForConditionalGeneration) -> None:
    inputs = golden_inputs(0)
    with torch.no_grad():
        eager = load_golden(attn_implementation="eager")(**inputs).logits
        torch.testing.assert_close(eager, golden(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_frozen_embeddings_with_input_gradients_train(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    model = copy.deepcopy(model)
    model.get_input_embeddings().requires_grad_(False)
    model.enable_input_require_grads()
    found = gradients(model, pack(mix(1, 0)))
    assert "model.language_model.embed_tokens.weight" not in found
    assert "model.vte.weight" in found


# -- generation


def greedy(model: Ovis2_5ForConditionalGeneration, example: Example, num_tokens: int) -> list[int]:
    """The most likely continuation without visual ids, and without any cache."""
    example = example.copy()
    for _ in range(num_tokens):
        logits = logits_alone(model, example)[-1]
        logits[list(model.config.visual_token_ids)] = -torch.inf
        example.append([int(logits.argmax())], is_trained=False)
    return example.input_ids[-num_tokens:]


def greedy_options(model: Ovis2_5ForConditionalGeneration, num_tokens: int) -> dict[str, Any]:
    return {
        "max_new_tokens": num_tokens,
        "do_sample": False,
        "suppress_tokens": list(model.config.visual_token_ids),
        "eos_token_id": None,
    }


def test_generate_continues_a_left_padded_batch_as_each_row_alone(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    examples = mix(2, 0, 1)
    longest = max(len(example) for example in examples)
    lengths = [longest - len(example) for example in examples]
    batch = pack(examples)
    generated = model.generate(
        input_ids=torch.tensor([[0] * n + example.input_ids for n, example in zip(lengths, examples)]),
        attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in lengths]),
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.image_grid_thw,
        **greedy_options(model, 4),
    )
    assert generated[:, longest:].tolist() == [greedy(model, example, 4) for example in examples]


def test_generate_goes_on_from_a_cache_with_only_the_new_picture(
    model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor
) -> None:
    mixer = Mixer(processor, seed=1)
    example = mixer.example(1)
    first = without_mask(pack([example]))
    with torch.no_grad():
        cache = model(
            input_ids=first["input_ids"],
            pixel_values=first["pixel_values"],
            image_grid_thw=first["image_grid_thw"],
            use_cache=True,
        ).past_key_values
    crop = mixer.image()
    processor.append_image(example, crop)
    generated = model.generate(
        input_ids=torch.tensor([example.input_ids]),
        past_key_values=cache,
        pixel_values=crop.pixel_values,
        image_grid_thw=torch.tensor([crop.grid_thw]),
        **greedy_options(model, 4),
    )
    assert generated[0, len(example) :].tolist() == greedy(model, example, 4)
